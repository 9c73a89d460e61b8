"""Timeouts of routes through both sidecars: what a caller sees when a rule allows no more time, and what a timeout leaves alone."""

from __future__ import annotations

import socket
import struct

import grpc
import h2.errors
import h2.events
import h11
import pytest
import trio

from core.addrs import Addr
from policy.wire import Action, Endpoint, Share, Timeouts
from proxy.outbound.deadlines import Deadlines
from tests.scenarios.grpc_peers import Cart, Client, calling, grpc_server, status_of
from tests.scenarios.h2_peers import H2, H2App
from tests.scenarios.mesh import WEB, Mesh, mesh
from tests.scenarios.peers import PATIENCE_S, Exchange, H11App, Http1, read_until
from tests.scenarios.test_scenarios_http2 import connected
from tests.scenarios.test_scenarios_routes import Backend, Ref, live, tell

LONG = Timeouts(600.0, 600.0)
both_kinds = pytest.mark.parametrize("short", [Timeouts(0.1), Timeouts(0.0, 0.1)], ids=["request", "backendRequest"])
"""For what never answers: whatever takes its time meanwhile, the end is the same."""
both_long = pytest.mark.parametrize("long", [Timeouts(600.0), Timeouts(0.0, 600.0)], ids=["request", "backendRequest"])
"""For what has to have begun before its time is over: `elapse` ends it."""


def timed(made: Mesh, short: Timeouts) -> None:
    """``/slow`` and ``/begin`` have little time, everything else has enough."""
    little, enough = Action((Share(0),), timeouts=short), Action((Share(0),), timeouts=LONG)
    tell(made, ("/slow", little), ("/begin", little), ("/shop.Cart/Wait", little), ("/", enough), backends=(live(made),))


def pending(made: Mesh) -> Deadlines:
    return made.client.outbound.toolkit.deadlines


def elapse(made: Mesh) -> None:
    """Ten minutes and more pass for the deadlines that are set now."""
    deadlines = pending(made)
    assert len(deadlines)
    deadlines._now = lambda: trio.current_time() + 1e9  # later than any monotonic clock
    deadlines._earlier.set()


async def until(deadlines: Deadlines, count: int) -> None:
    """Until so many are set."""
    with trio.fail_after(PATIENCE_S):
        while len(deadlines) != count:  # noqa: ASYNC110 - what happens on a connection wakes no task
            await trio.sleep(0.01)


async def reluctant(exchange: Exchange) -> None:
    """Answers nothing on ``/slow``, only the beginning on ``/begin``."""
    if exchange.path == b"/slow":
        await trio.sleep_forever()
    if exchange.path == b"/begin":
        await exchange.send(h11.Response(status_code=200, headers=[("content-length", "10")]), h11.Data(b"begun"))
        await trio.sleep_forever()
    await exchange.answer(await exchange.body())


async def reluctant_h2(end: H2, event: h2.events.Event) -> None:
    """The same with HTTP/2."""
    if isinstance(event, h2.events.StreamEnded):
        number = event.stream_id
        path = dict(end.got(number, h2.events.RequestReceived)[0].headers)[":path"]
        if path != "/slow":
            end.h2.send_headers(number, [(":status", "200")])
            end.h2.send_data(number, b"begun", end_stream=path != "/begin")


@both_kinds
async def test_http1_gets_504_and_its_connection_goes_on(short: Timeouts) -> None:
    async with mesh(H11App(reluctant)) as made:
        timed(made, short)
        client = Http1(await made.dial())
        assert (await client.ask("/", "POST", b"before"))[:2] == (200, b"before")
        for body in (b"", b"some body"):
            status, _, headers = await client.ask("/slow", "POST", body)
            assert (status, headers[b"pillion-proxy-error"]) == (504, b"route-timeout")
        assert (await client.ask("/", "POST", b"after"))[:2] == (200, b"after")
        assert len(pending(made)) == 0
        assert made.metric(made.client, "pillion_response_total", status_code="504", classification="failure") == 2


@both_long
async def test_an_http1_answer_that_has_begun_is_cut(long: Timeouts) -> None:
    async with mesh(H11App(reluctant)) as made:
        timed(made, long)
        stream = await made.dial()
        await stream.send_all(b"GET /begin HTTP/1.1\r\nhost: web.shop\r\n\r\n")
        assert b" 200 " in await read_until(stream, b"begun")
        elapse(made)
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(PATIENCE_S):
            assert await stream.receive_some(65536) == b"never an orderly end"
        assert len(pending(made)) == 0


@both_kinds
async def test_http2_gets_504_and_other_streams_go_on(short: Timeouts) -> None:
    async with mesh(H2App(reluctant_h2)) as made:
        timed(made, short)
        async with connected(made) as client:
            slow = [await client.request("/slow"), await client.request("/slow", "POST", b"never read")]
            assert (await client.answer(await client.request("/")))[0] == "200"
            for number in slow:
                await client.wait(lambda number=number: bool(client.got(number, h2.events.ResponseReceived)))
                head = dict(client.got(number, h2.events.ResponseReceived)[0].headers)
                assert (head[":status"], head["pillion-proxy-error"]) == ("504", "route-timeout")
            assert (await client.answer(await client.request("/")))[0] == "200"
        await until(pending(made), 0)


@both_long
async def test_an_http2_answer_that_has_begun_is_reset_and_the_app_hears_of_it(long: Timeouts) -> None:
    app = H2App(reluctant_h2)
    async with mesh(app) as made:
        timed(made, long)
        async with connected(made) as client:
            number = await client.request("/begin")
            await client.wait(lambda: client.data(number) == b"begun")
            elapse(made)
            await client.wait(lambda: bool(client.got(number, h2.events.StreamReset)))
            assert client.got(number, h2.events.StreamReset)[0].error_code != h2.errors.ErrorCodes.NO_ERROR
            (end,) = app.connections
            await end.wait(lambda: any(isinstance(event, h2.events.StreamReset) for event in end.events))
            assert (await client.answer(await client.request("/")))[0] == "200"


@both_kinds
async def test_grpc_is_told_that_the_deadline_has_passed(short: Timeouts) -> None:
    cart = Cart()

    def talk(client: Client) -> None:
        client.echo(b"", timeout=PATIENCE_S)
        code, message = status_of(lambda: client.wait(b"", timeout=PATIENCE_S))
        assert (code, message) == (grpc.StatusCode.DEADLINE_EXCEEDED, "route-timeout")
        assert client.echo(b"still here", timeout=PATIENCE_S) == b"still here"

    with grpc_server(cart) as app:
        async with mesh(app) as made:
            timed(made, short)
            async with made.entry() as entry:
                await trio.to_thread.run_sync(calling, entry, talk)


async def test_a_connection_that_is_not_made_in_time_is_504_and_the_next_request_has_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # the kernel accepts, nobody shakes hands
        async with mesh(H11App(reluctant)) as made:
            silent = Backend(Ref("", "Service", "shop", "silent"), (Endpoint(str(Addr(*mute.getsockname())), WEB.uri),))
            shares = [("/silent", Action((Share(1),), timeouts=Timeouts(0.1))), ("/", Action((Share(0),), timeouts=LONG))]
            tell(made, *shares, backends=(live(made), silent))
            client = Http1(await made.dial())
            status, _, headers = await client.ask("/silent")
            assert (status, headers[b"pillion-proxy-error"]) == (504, b"route-timeout")
            assert (await client.ask("/"))[0] == 200
            async with connected(made) as second:
                number = await second.request("/silent")
                await second.wait(lambda: bool(second.got(number, h2.events.StreamEnded)))
                assert dict(second.got(number, h2.events.ResponseReceived)[0].headers)[":status"] == "504"
            assert len(pending(made)) == 0


async def test_the_time_for_an_attempt_does_not_run_while_its_connection_is_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with mesh(H11App(reluctant), PILLION_HANDSHAKE_TIMEOUT_MS="300") as made:
            silent = Backend(Ref("", "Service", "shop", "silent"), (Endpoint(str(Addr(*mute.getsockname())), WEB.uri),))
            tell(made, ("/", Action((Share(0),), timeouts=Timeouts(0.0, 0.1))), backends=(silent,))
            client = Http1(await made.dial())
            _, _, headers = await client.ask("/")
            assert headers[b"pillion-proxy-error"] != b"route-timeout"


@both_long
async def test_a_tunnel_outlives_the_time_for_its_request(long: Timeouts) -> None:
    async def echo(stream: trio.SocketStream) -> None:
        await read_until(stream, b"\r\n\r\n")
        await stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
        async with stream:
            while data := await stream.receive_some(65536):
                await stream.send_all(data)

    async with mesh(echo) as made:
        timed(made, long)
        stream = await made.dial()
        await stream.send_all(b"GET /slow HTTP/1.1\r\nhost: web.shop\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
        assert b" 101 " in await read_until(stream, b"\r\n\r\n")
        elapse(made)
        await until(pending(made), 0)
        await stream.send_all(b"still here")
        assert await read_until(stream, b"still here") == b"still here"


async def test_a_caller_that_leaves_takes_its_deadlines_along() -> None:
    async with mesh(H11App(reluctant)) as made:
        tell(made, ("/", Action((Share(0),), timeouts=LONG)), backends=(live(made),))
        stream = await made.dial()
        await stream.send_all(b"GET /slow HTTP/1.1\r\nhost: web.shop\r\n\r\n")
        await until(pending(made), 2)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset: after a mere FIN it might still read
        await stream.aclose()
        await until(pending(made), 0)
