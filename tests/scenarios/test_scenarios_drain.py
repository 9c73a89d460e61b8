"""The end of a sidecar and its ports: drain, loops, and what the admin port tells whom."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import h2.events
import pytest
import trio

from core.addrs import Addr, ClientAddr, OriginalDst
from core.runtime.admin import Request, Response
from proxy.app import Sidecar, accept_both, admin_routes, finish
from proxy.transport.listener import Listener
from tests.ports import unused_port
from tests.scenarios.h2_peers import H2, H2App
from tests.scenarios.mesh import ANYONE, VIP, WEB, Mesh, inbound_policy, mesh, only
from tests.scenarios.peers import PATIENCE_S, Exchange, H11App, Http1, read_all

_GRACE_S = 20
OTHER = OriginalDst(Addr("10.96.0.77", 80))


def _free_ports() -> dict[str, str]:
    """Listen addresses of a sidecar that nobody else uses."""
    return {name: f"127.0.0.1:{unused_port()}" for name in ("PILLION_INBOUND_LISTEN", "PILLION_OUTBOUND_LISTEN")}


class Ending:
    """A drain under way. over: the sidecar would exit now."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.took_s = -1.0

    async def run(self, sidecar: Sidecar, listeners: tuple[Listener, Listener]) -> None:
        await sidecar.drain.wait_started()
        began = trio.current_time()
        await finish(sidecar, listeners)
        self.took_s = trio.current_time() - began
        self.over.set()


@asynccontextmanager
async def accepting(sidecar: Sidecar) -> AsyncIterator[Ending]:
    """The sidecar listens on its ports and ends as the process would."""
    async with trio.open_nursery() as nursery:
        ending = Ending()
        nursery.start_soon(ending.run, sidecar, accept_both(sidecar))
        yield ending
        nursery.cancel_scope.cancel()


def congestion_control(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


async def test_only_what_stays_in_the_pod_is_sent_without_the_nodes_congestion_control():
    with socket.socket() as made_by_nobody:
        of_the_node = congestion_control(made_by_nobody)
    async with mesh(H11App(Slow()), **_free_ports()) as made:
        inbound, outbound = accept_both(made.client)
        assert (congestion_control(inbound.sock), congestion_control(outbound.sock)) == (of_the_node, b"reno")


class Slow:
    """An app that answers ``/slow`` when it is told to."""

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.go = trio.Event()
        self.seen: list[dict[bytes, bytes]] = []

    async def __call__(self, exchange: Exchange) -> None:
        self.seen.append(exchange.headers)
        if exchange.path == b"/slow":
            self.asked.set()
            await self.go.wait()
        await exchange.answer(b"done")


Side = Callable[[Mesh], Sidecar]


@pytest.mark.parametrize("side", [lambda made: made.client, lambda made: made.server], ids=["of the client", "of the server"])
async def test_a_drain_finishes_the_request_under_way_and_takes_no_other(side: Side, autojump_clock: trio.testing.MockClock):
    app = Slow()
    async with mesh(H11App(app), PILLION_SHUTDOWN_GRACE_S=str(_GRACE_S), **_free_ports()) as made, trio.open_nursery() as nursery:
        sidecar = side(made)
        async with accepting(sidecar) as ending:
            idle, busy, answers = Http1(await made.dial()), Http1(await made.dial()), []
            assert (await idle.ask())[0] == 200

            async def ask() -> None:
                answers.append(await busy.ask("/slow"))

            nursery.start_soon(ask)
            await app.asked.wait()
            sidecar.drain.start("SIGTERM")
            await trio.sleep(1)
            assert not ending.over.is_set()
            assert "draining: SIGTERM" in sidecar.not_ready()
            for listen in (sidecar.config.inbound_listen, sidecar.config.outbound_listen):
                with pytest.raises(OSError, match="attempt"):
                    await trio.open_tcp_stream(listen.ip, listen.port)
            app.go.set()
            await ending.over.wait()
            assert ending.took_s < 5  # these clients close nothing themselves, which costs the linger time
            status, body, headers = answers[0]
            assert (status, body) == (200, b"done")
            if sidecar is made.client:
                assert headers[b"connection"] == b"close"
                assert await read_all(idle.stream) == b""
                assert await read_all(busy.stream) == b""
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("waits_for", ["its policy", "the rest of its first line"])
async def test_a_drain_waits_for_connections_that_have_only_begun(waits_for: str, autojump_clock: trio.testing.MockClock):
    async def answer(exchange: Exchange) -> None:
        await exchange.answer(b"served")

    async with mesh(H11App(answer), PILLION_SHUTDOWN_GRACE_S=str(_GRACE_S), **_free_ports()) as made:
        if waits_for == "its policy":
            made.policy(inbound_policy(ANYONE))
            made.client_controller.watch_destination(str(OTHER)).set(None)
        async with accepting(made.client) as ending:
            stream = await made.dial(OTHER if waits_for == "its policy" else VIP)
            await stream.send_all(b"GET / HT")
            await trio.sleep(0.5)
            made.client.drain.start("SIGTERM")
            await trio.sleep(0.5)
            assert not ending.over.is_set()
            if waits_for == "its policy":
                made.client_controller.watch_destination(str(OTHER)).set(made.client_controller.watch_destination(str(VIP)).value)
            await stream.send_all(b"TP/1.1\r\nhost: web\r\n\r\n")
            assert b"served" in await read_all(stream)
            await stream.aclose()
            await ending.over.wait()
            assert ending.took_s < 5


async def test_a_drain_does_not_wait_for_clients_that_have_said_nothing(autojump_clock: trio.testing.MockClock):
    async def mute(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await read_all(stream)

    async def drained(made: Mesh, sidecar: Sidecar, dial: Callable[[], Awaitable[trio.SocketStream]]) -> None:
        async with accepting(sidecar) as ending:
            stream = await dial()
            await trio.sleep(3)
            sidecar.drain.start("SIGTERM")
            await ending.over.wait()
            assert ending.took_s < 1
            with contextlib.suppress(trio.BrokenResourceError):
                assert await read_all(stream) == b""

    for policy in (inbound_policy(ANYONE), inbound_policy(ANYONE, protocol="http1"), inbound_policy(only(WEB))):
        async with mesh(mute, policy=policy, PILLION_SHUTDOWN_GRACE_S=str(_GRACE_S), **_free_ports()) as made:
            await drained(made, made.server, made.dial_unmeshed)
    async with mesh(mute, PILLION_SHUTDOWN_GRACE_S=str(_GRACE_S), **_free_ports()) as made:
        await drained(made, made.client, made.dial)


async def test_a_drain_tells_http2_clients_by_goaway_and_waits_for_their_streams(autojump_clock: trio.testing.MockClock):
    asked = trio.Event()

    async def late(end: H2, event: object) -> None:
        if isinstance(event, h2.events.RequestReceived):
            end.h2.send_headers(event.stream_id, [(":status", "200")])
            asked.set()

    app = H2App(late)
    async with mesh(app, **_free_ports()) as made, accepting(made.client) as ending:
        client = H2(await made.dial(), client=True)  # it only writes: the h2 package takes no frame after a GOAWAY
        await client.start()
        await client.request()
        await asked.wait()
        made.client.drain.start("SIGTERM")
        frames = await _frames_until(client, _PING)
        assert (frames[-2].kind, frames[-2].payload[:4]) == (_GOAWAY, b"\x7f\xff\xff\xff")  # what was sent before it was read still counts
        await client.stream.send_all(_frame(_PING, frames[-1].payload, flags=1))
        assert (await _frames_until(client, _GOAWAY))[-1].payload[:4] == b"\0\0\0\x01"
        assert not ending.over.is_set()
        app.connections[0].h2.send_data(1, b"late", end_stream=True)
        await app.connections[0].flush()
        assert (await _frames_until(client, _DATA))[-1].payload == b"late"
        await read_all(client.stream)  # it ends by itself
        await client.stream.aclose()
        await ending.over.wait()
        assert ending.took_s < 2


_DATA, _PING, _GOAWAY = 0, 6, 7


class Frame(NamedTuple):
    kind: int
    payload: bytes


def _frame(kind: int, payload: bytes, flags: int) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + bytes(4) + payload


async def _frames_until(client: H2, kind: int) -> list[Frame]:
    """The frames that arrive, up to the first of this kind."""
    frames: list[Frame] = []
    while not frames or frames[-1].kind != kind:
        head = await _exactly(client.stream, 9)
        frames.append(Frame(head[3], await _exactly(client.stream, int.from_bytes(head[:3], "big"))))
    return frames


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    with trio.fail_after(PATIENCE_S):
        while len(data) < size:
            more = await stream.receive_some(size - len(data))
            assert more
            data += more
    return data


async def test_what_does_not_end_by_itself_is_cut_when_the_grace_time_is_over(autojump_clock: trio.testing.MockClock):
    async def echo(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send_all(data)

    async with mesh(echo, PILLION_SHUTDOWN_GRACE_S=str(_GRACE_S), **_free_ports()) as made, accepting(made.client) as ending:
        stream = await made.dial()
        for at in range(2):
            await stream.send_all(b"\x00")
            assert await stream.receive_some(1) == b"\x00"  # opaque bytes go on while the grace time lasts
            if not at:
                made.client.drain.start("SIGTERM")
                await trio.sleep(_GRACE_S - 1)
        await ending.over.wait()
        assert _GRACE_S <= ending.took_s < _GRACE_S + 0.5


async def test_a_second_signal_ends_the_wait(autojump_clock: trio.testing.MockClock):
    app = Slow()
    async with mesh(H11App(app), **_free_ports()) as made, accepting(made.client) as ending:
        stream = await made.dial()
        await stream.send_all(b"GET /slow HTTP/1.1\r\nhost: web\r\n\r\n")
        await app.asked.wait()
        made.client.drain.start("SIGTERM")
        await trio.sleep(1)
        made.client.drain.hurry()
        await ending.over.wait()
        assert ending.took_s < 2


async def test_dialling_a_port_of_the_sidecar_itself_is_refused():
    app = Slow()
    async with mesh(H11App(app), policy=inbound_policy(ANYONE), **_free_ports()) as made, accepting(made.server):
        config = made.server.config
        for at, listen in enumerate((config.inbound_listen, config.outbound_listen), 1):
            with pytest.raises((trio.BrokenResourceError, OSError)):  # reset at once: maybe before connect(2) has returned
                async with await trio.open_tcp_stream(listen.ip, listen.port) as stream:
                    await stream.receive_some(1)
            assert made.metric(made.server, "pillion_errors_total", error="loop-detected") == at
        assert app.seen == []


async def test_a_redirect_that_names_a_port_of_the_sidecar_is_refused_before_anything_is_asked():
    async with mesh(H11App(Slow())) as made:
        for port in (4143, 4140):
            stream = await made.dial(OriginalDst(Addr("10.1.0.9", port)))  # the client's own pod
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
        assert made.metric(made.client, "pillion_errors_total", direction="outbound", error="loop-detected") == 2


async def test_a_port_of_the_sidecar_is_refused_by_every_loopback_address():
    """All of 127.0.0.0/8 leads to its listener: it would be dialled on, accepted, and dialled on again."""
    async with mesh(H11App(Slow())) as made:
        for ip in ("127.0.0.1", "127.0.0.2", "127.255.255.254", "::1"):
            stream = await made.dial(OriginalDst(Addr(ip, 4140)))
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
        assert made.metric(made.client, "pillion_errors_total", direction="outbound", error="loop-detected") == 4
        assert made.client_controller.destinations.keys() == {str(VIP)}, "nobody was asked"


async def test_a_redirect_that_names_the_caller_is_refused_before_anything_is_asked():
    async with mesh(H11App(Slow())) as made:
        stream = await made.dial_with_reversed_target()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        assert made.metric(made.client, "pillion_errors_total", direction="outbound", error="loop-detected") == 1


async def _get(sidecar: Sidecar, path: str, method: str = "GET", client: str = "10.1.0.5") -> Response:
    return await admin_routes(sidecar)[method, path](Request(method, path, client=ClientAddr(Addr(client, 40000))))


async def test_shutdown_is_taken_from_the_pod_itself_only():
    async with mesh(H11App(Slow())) as made:
        assert (await _get(made.client, "/shutdown", "POST")).status == 403
        assert not made.client.drain.started
        assert (await _get(made.client, "/shutdown", "POST", "127.0.0.1")).status == 200
        assert made.client.drain.started
        assert (await _get(made.client, "/ready")).status == 503


async def test_no_admin_answer_and_no_log_line_holds_a_secret():
    async with mesh(H11App(Slow()), PILLION_ACCESS_LOG="all") as made:
        client = Http1(await made.dial())
        secret = "Bearer not-for-logs"
        assert (await client.ask("/", authorization=secret, cookie="session=not-for-logs"))[0] == 200
        for side in (made.client, made.server):
            credentials = side.credentials.value
            assert credentials is not None
            key = credentials.key_pem.decode().splitlines()[1]
            answers = [
                (await _get(side, path)).body.decode() for (method, path) in admin_routes(side) if method == "GET" and "probe" not in path
            ]
            assert len(answers) >= 7
            assert any(credentials.identity.uri in answer for answer in answers)  # the dumps do say something
            for text in (*answers, str(made.log())):
                assert "not-for-logs" not in text
                assert "PRIVATE KEY" not in text
                assert key not in text


async def test_the_dumps_show_what_the_sidecar_knows():
    async with mesh(H11App(Slow())) as made:
        assert (await Http1(await made.dial()).ask())[0] == 200
        assert str(made.peer).encode() in (await _get(made.client, "/endpoints")).body
        assert b"AuthorizationPolicy" in (await _get(made.server, "/policy")).body
        assert b"spiffe://cluster.local/ns/shop/sa/web" in (await _get(made.server, "/certs")).body
        assert b'"policy_wait_s": 2' in (await _get(made.server, "/config")).body
