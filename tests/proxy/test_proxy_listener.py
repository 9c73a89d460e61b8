"""The relay's listening sockets: what is accepted is handed on, and nothing that goes wrong with one connection ends the listening."""

from __future__ import annotations

import errno
import socket

import pytest
import trio

from proxy.transport.relay import Relay

Peer = tuple[object, ...]


class Taker:
    """Takes what is accepted. fail: raise instead, that often."""

    def __init__(self, fail: int = 0) -> None:
        self.socks: list[socket.socket] = []
        self._fail = fail
        self.took = trio.Event()

    def __call__(self, sock: socket.socket, _: Peer) -> None:
        if self._fail:
            self._fail -= 1
            sock.close()
            raise ValueError("a bug")
        self.socks.append(sock)
        self.took.set()


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock


def dial(listening: socket.socket) -> socket.socket:
    return socket.create_connection(listening.getsockname())


@pytest.mark.parametrize("take_turns", [True, False], ids=["where trio would sleep", "as a task"])
async def test_what_is_accepted_is_handed_on_until_the_listener_is_aborted(listening, take_turns: bool, nursery: trio.Nursery):
    relay = Relay(lambda error: None, take_turns=take_turns)
    nursery.start_soon(relay.run)
    taker = Taker()
    listener = relay.listen(listening, taker)
    with dial(listening) as near:
        await taker.took.wait()
        assert taker.socks[0].getpeername() == near.getsockname()
        taker.socks[0].close()
    address = listening.getsockname()
    listener.abort()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


async def test_a_bug_with_one_connection_is_reported_and_the_next_is_taken(listening, nursery: trio.Nursery):
    reported: list[BaseException] = []
    relay = Relay(reported.append)
    nursery.start_soon(relay.run)
    taker = Taker(fail=1)
    relay.listen(listening, taker)
    with dial(listening), dial(listening):
        await taker.took.wait()
    assert [str(error) for error in reported] == ["a bug"]
    taker.socks[0].close()


class Exhausted:
    """A listening socket whose accept fails as one without descriptors does, that often."""

    def __init__(self, sock: socket.socket, failures: int) -> None:
        self._sock = sock
        self.failures = failures

    def accept(self) -> tuple[socket.socket, Peer]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "too many open files")
        return self._sock.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


async def test_without_descriptors_it_pauses_instead_of_spinning_and_goes_on_later(listening, autojump_clock: trio.testing.MockClock):
    async with trio.open_nursery() as nursery:
        relay = Relay(lambda error: None, trio.current_time)
        nursery.start_soon(relay.run)
        taker, exhausted = Taker(), Exhausted(listening, failures=2)
        relay.listen(exhausted, taker)  # type: ignore[arg-type]
        began = trio.current_time()
        with dial(listening):
            await taker.took.wait()
        assert exhausted.failures == 0
        assert trio.current_time() - began >= 2
        taker.socks[0].close()
        nursery.cancel_scope.cancel()
