"""Connections that arrive together are taken together, and one address waits for itself alone."""

from __future__ import annotations

import errno
import os
import socket

import pytest
import trio
import trio.testing

from core.addrs import Addr, ListenAddr
from core.runtime import arrivals
from core.runtime.arrivals import Turns, serve_arrivals
from core.runtime.listen import listen, trio_listener
from tests.ports import unused_port


class Rounds(trio.abc.Instrument):
    """How often the loop has looked for what happened."""

    passed = 0

    def before_io_wait(self, timeout: float) -> None:
        self.passed += 1


async def test_all_that_wait_are_accepted_in_one_round() -> None:
    port, rounds, taken = unused_port(), Rounds(), list[int]()
    listener = trio_listener(listen(ListenAddr(Addr("127.0.0.1", port))))
    clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(20)]

    async def handle(stream: trio.SocketStream) -> None:
        taken.append(rounds.passed)
        await stream.aclose()

    trio.lowlevel.add_instrument(rounds)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_arrivals, [listener], handle, nursery)
        for client in clients:
            assert await client.receive_some() == b""
            await client.aclose()
        nursery.cancel_scope.cancel()
    assert len(taken) == 20 and len(set(taken)) == 1
    with pytest.raises(OSError, match="all attempts to connect"):
        await trio.open_tcp_stream("127.0.0.1", port)


class Short(socket.socket):
    """A listening socket of a process that is short of descriptors, and whose first client has left."""

    refusals = (errno.EMFILE, errno.ECONNABORTED)

    def accept(self) -> tuple[socket.socket, object]:
        if self.refusals:
            number, *rest = self.refusals
            self.refusals = tuple(rest)  # type: ignore[assignment]
            raise OSError(number, os.strerror(number))
        return super().accept()


async def test_what_cannot_be_accepted_now_is_accepted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_PAUSE_S", 0)
    monkeypatch.setattr("core.runtime.arrivals.socket.fromfd", lambda fd, *_: Short(fileno=os.dup(fd)))
    port, taken = unused_port(), list[trio.SocketStream]()
    listener = trio_listener(listen(ListenAddr(Addr("127.0.0.1", port))))

    async def handle(stream: trio.SocketStream) -> None:
        taken.append(stream)
        await stream.send_all(b"here")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_arrivals, [listener], handle, nursery)
        client = await trio.open_tcp_stream("127.0.0.1", port)
        with trio.fail_after(30):
            assert await client.receive_some() == b"here"
        await client.aclose()
        await taken[0].aclose()
        nursery.cancel_scope.cancel()


async def test_an_address_that_has_its_turns_waits_and_others_do_not() -> None:
    turns, begun = Turns(2), list[str]()

    async def visit(name: str) -> None:
        async with turns.one(name[0]):
            begun.append(name)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for name in ("a1", "a2", "a3", "b1"):
            nursery.start_soon(visit, name)
            await trio.testing.wait_all_tasks_blocked()
        assert begun == ["a1", "a2", "b1"]
        nursery.cancel_scope.cancel()
    assert len(turns) == 0
