"""Peers that do not read, do not speak or ask for too much: what they hold up is themselves, and what they cost is bounded."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from trio.testing import MockClock

from policy.wire import Endpoint
from proxy.app import Sidecar
from tests.scenarios.mesh import ANYONE, FOR_CART, WEB, Mesh, inbound_policy, mesh
from tests.scenarios.peers import MIB, PATIENCE_S, Exchange, H11App, Http1, read_all, read_until

_ENDLESS = 256 * MIB  # far more than three connections take when nobody reads: each up to 36 MiB (tcp_rmem, tcp_wmem)
_PIECE = random.Random(3).randbytes(64 * 1024)
_HELD_MAX = 1 * MIB  # of a sidecar, for one connection: a read of 256 KiB, in records, on either side
_ASK = b"GET /endless HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n"


def _held(sidecar: Sidecar) -> int:
    """Bytes that the sidecar keeps because somebody does not read."""
    return sum(len(part) for link in sidecar.relay._links.values() for part in link._held)


class Source:
    """Writes to every connection as fast as it is taken, until told that it is enough. written: how many bytes the first one took."""

    def __init__(self) -> None:
        self.written = 0
        self.enough = False
        self._first: trio.SocketStream | None = None

    async def write(self, stream: trio.SocketStream) -> None:
        self._first = self._first or stream
        while not self.enough and self.written < _ENDLESS:
            await stream.send_all(_PIECE)
            if stream is self._first:
                self.written += len(_PIECE)

    async def wait_stuck(self) -> None:
        """Until nothing more was taken for a while: buffers of kernels have no event that says so. Fails if it is never stuck."""
        with trio.fail_after(PATIENCE_S):
            unchanged, before = 0, 0
            while unchanged < 4:
                await trio.sleep(0.05)
                unchanged = unchanged + 1 if self.written == before > 0 else 0
                before = self.written
        assert self.written < _ENDLESS

    async def opaque(self, stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(100)
            with suppress(trio.BrokenResourceError):
                await self.write(stream)

    async def http(self, stream: trio.SocketStream) -> None:
        async with stream:
            await read_until(stream, b"\r\n\r\n")
            await stream.send_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
            with suppress(trio.BrokenResourceError):
                await self.write(stream)


async def _after_head(stream: trio.SocketStream) -> bytes:
    """What came of the body together with the head of the answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some(65536)
        assert more, f"the connection ended after {data!r}"
        data += more
    return data.partition(b"\r\n\r\n")[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opaque", "http"])
async def test_a_client_that_does_not_read_stops_the_app_and_gets_everything_later(kind: str):
    source = Source()
    async with mesh(getattr(source, kind)) as made:
        stream = await made.dial()
        await stream.send_all(b"\x00" if kind == "opaque" else _ASK)
        await source.wait_stuck()
        assert _held(made.client) <= _HELD_MAX
        assert _held(made.server) <= _HELD_MAX
        other = await made.dial()  # nobody else is held up
        await other.send_all(b"\x00" if kind == "opaque" else _ASK)
        assert await other.receive_some(1000)
        source.enough = True
        start = b"" if kind == "opaque" else await _after_head(stream)
        digest, size = hashlib.sha256(start), len(start)
        async for data in stream:
            digest.update(data)
            size += len(data)
        assert size == source.written
        assert digest.digest() == hashlib.sha256(_PIECE * (size // len(_PIECE))).digest()


@pytest.mark.slow
async def test_an_app_that_does_not_read_stops_the_client_and_gets_everything_later():
    source, go = Source(), trio.Event()
    received = 0

    async def app(stream: trio.SocketStream) -> None:
        nonlocal received
        async with stream:
            await go.wait()
            async for data in stream:
                received += len(data)
            await stream.send_all(b"thanks")

    async with mesh(app) as made, trio.open_nursery() as nursery:
        stream = await made.dial()

        async def upload() -> None:
            await source.write(stream)
            await stream.send_eof()

        nursery.start_soon(upload)
        await source.wait_stuck()
        assert max(_held(made.client), _held(made.server)) <= _HELD_MAX
        source.enough = True
        go.set()
        assert await read_all(stream) == b"thanks"
        assert received == source.written


async def test_a_client_that_leaves_while_its_answer_is_stuck_frees_everything():
    source = Source()
    async with mesh(source.http) as made:
        stream = await made.dial()
        await stream.send_all(_ASK)
        await source.wait_stuck()
        await stream.aclose()
        with trio.fail_after(PATIENCE_S):
            await made.client.live.wait_none()
            await made.server.live.wait_none()
        assert made.metric(made.client, "pillion_errors_total", error="client-gone") == 1


async def _reply(exchange: Exchange) -> None:
    await exchange.answer(await exchange.body())


@asynccontextmanager
async def _open(made: Mesh, count: int) -> AsyncIterator[list[trio.SocketStream]]:
    streams = [await made.dial() for _ in range(count)]
    yield streams
    for stream in streams:
        await stream.aclose()


async def test_half_a_request_line_is_given_up_after_the_detection_time(autojump_clock: MockClock):
    async with mesh(H11App(_reply)) as made:
        stream = await made.dial()
        await stream.send_all(b"GET /")
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        assert 9 < trio.current_time() - began < 12
        assert made.metric(made.client, "pillion_errors_total", error="request-head-timeout") == 1


async def test_a_head_that_drips_is_answered_408_however_often_it_drips(autojump_clock: MockClock):
    async with mesh(H11App(_reply)) as made, trio.open_nursery() as nursery:
        stream = await made.dial()
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: web\r\n")
        began = trio.current_time()

        async def drip() -> None:
            try:
                while True:
                    await trio.sleep(1)
                    await stream.send_all(b"x: 1\r\n")
            except trio.BrokenResourceError:
                pass

        nursery.start_soon(drip)
        with trio.fail_after(30):
            assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 408")
        assert 9 < trio.current_time() - began < 13
        nursery.cancel_scope.cancel()


async def test_half_a_client_hello_is_given_up_as_well(autojump_clock: MockClock):
    async with mesh(H11App(_reply), policy=inbound_policy(ANYONE)) as made:
        for dial in (made.dial, made.dial_unmeshed):
            stream = await dial()
            await stream.send_all(b"\x16\x03\x01\x02\x00\x01")
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(15):
                await stream.receive_some(1)


async def test_a_handshake_that_does_not_go_on_is_given_up(autojump_clock: MockClock):
    async def silent(stream: trio.SocketStream) -> None:
        async with stream:
            await trio.sleep_forever()

    async with mesh(silent) as made:
        made.destination(Endpoint(str(made.app), WEB.uri))  # speaks no TLS, and nothing else
        began = trio.current_time()
        status, _, headers = await Http1(await made.dial()).ask()
        assert (status, headers[b"pillion-proxy-error"]) == (502, b"tls-handshake-failed")
        assert 4 < trio.current_time() - began < 7


async def test_an_idle_connection_is_closed_in_order(autojump_clock: MockClock):
    async with mesh(H11App(_reply), PILLION_IDLE_TIMEOUT_S="30") as made:
        client = Http1(await made.dial())
        assert (await client.ask())[0] == 200
        began = trio.current_time()
        with trio.fail_after(60):
            assert await client.stream.receive_some(1) == b""
        assert 28 < trio.current_time() - began < 40


async def test_more_connections_than_allowed_are_refused_and_the_others_live():
    async with mesh(H11App(_reply), PILLION_MAX_CONNECTIONS="2") as made:
        assert made.client.intake.admit_outbound()
        async with _open(made, 4) as streams:
            for stream in streams:
                client = Http1(stream)
                assert (await client.ask())[0] == 200
            assert not made.client.intake.admit_outbound()
        with trio.fail_after(PATIENCE_S):
            await made.client.live.wait_none()


async def test_callers_leave_the_app_room_to_call_others():
    async with mesh(H11App(_reply), policy=inbound_policy(ANYONE, protocol="http1"), PILLION_MAX_CONNECTIONS="8") as made:
        silent = [await made.dial_unmeshed() for _ in range(7)]
        while made.server.live.arriving < 7:
            await trio.lowlevel.checkpoint()
        assert (made.server.intake.admit_inbound(), made.server.intake.admit_outbound()) == (False, True)
        for stream in silent:
            await stream.aclose()


async def test_connections_leave_descriptors_to_the_admin_port(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("proxy.app.most_files", lambda: 16)
    async with mesh(H11App(_reply), policy=inbound_policy(ANYONE, protocol="http1")) as made:
        silent = [await made.dial_unmeshed() for _ in range(4)]
        while made.server.live.arriving < 4:
            await trio.lowlevel.checkpoint()
        assert not made.server.intake.admit_outbound()
        for stream in silent:
            await stream.aclose()


async def test_connections_that_say_nothing_count_as_well():
    async with mesh(H11App(_reply), policy=inbound_policy(ANYONE, protocol="http1"), PILLION_MAX_CONNECTIONS="2") as made:
        silent = [await made.dial_unmeshed() for _ in range(2)]
        while made.server.live.arriving < 2:
            await trio.lowlevel.checkpoint()
        assert not made.server.intake.admit_outbound()
        for stream in silent:
            await stream.aclose()
        with trio.fail_after(PATIENCE_S):
            await made.server.live.wait_none()
        assert made.server.intake.admit_outbound()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcd",
        b"GET / HTTP/1.1\r\nhost: web\r\nx : 1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: web\r\nx: 1\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: web\r\nhost: other\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
    ],
    ids=["CL and TE", "two lengths", "space before colon", "folded", "two hosts", "bad chunk size"],
)
@pytest.mark.parametrize("side", ["app", "unmeshed client"])
async def test_a_request_with_two_readings_reaches_nobody(request_bytes: bytes, side: str):
    app = H11App(_reply)
    async with mesh(app, policy=FOR_CART if side == "app" else inbound_policy(ANYONE)) as made:
        stream = await (made.dial() if side == "app" else made.dial_unmeshed())
        await stream.send_all(request_bytes)
        answer = await read_until(stream, b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400")
        assert (b"pillion-proxy-error: bad-request" in answer) is (side == "app")
        assert app.requests == []
