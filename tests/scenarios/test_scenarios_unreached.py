"""A pod whose app has ended before its sidecar: requests that it could not reach go to another pod, once, whoever asks in what protocol.

The app holds its first two requests until both are there. So one of the two met the pod without an app: while the one is under way at
the pod that works, the balancer prefers the other pod.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import grpc
import pytest
import trio

from core.addrs import Addr
from policy.wire import Endpoint
from tests.scenarios.grpc_peers import Cart, Client, calling, grpc_server, status_of
from tests.scenarios.mesh import Mesh, mesh
from tests.scenarios.peers import PATIENCE_S, Exchange, H11App, Http1, curl

RETRIES = "pillion_retries_total"


@pytest.fixture
def nowhere() -> Iterator[Addr]:
    """An address that refuses connections, and that nobody else gets."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield Addr(*bound.getsockname())


class Holding:
    """An app that answers with the body it got, once two requests are there."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.hold()

    def hold(self) -> None:
        """From now on, until two more are there."""
        self._missing, self._both = 2, trio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        body = await exchange.body()
        self.bodies.append(body)
        self._missing -= 1
        if not self._missing:
            self._both.set()
        with trio.fail_after(PATIENCE_S):
            await self._both.wait()
        await exchange.answer(body)


async def _both(made: Mesh, method: str, *bodies: bytes) -> list[tuple[int, bytes]]:
    """The answers to two requests that are under way at once, on connections of their own."""
    seen: list[tuple[int, bytes]] = []

    async def ask(body: bytes) -> None:
        with trio.fail_after(2 * PATIENCE_S):
            seen.append((await Http1(await made.dial()).ask("/", method, body))[:2])

    async with trio.open_nursery() as nursery:
        for body in bodies:
            nursery.start_soon(ask, body)
    return sorted(seen)


def _beside(made: Mesh, dead: Addr) -> None:
    """Two endpoints, one of which has lost its app."""
    made.destination(made.add_peer().endpoint, made.add_peer(dead).endpoint)


@pytest.mark.parametrize(("method", "bodies"), [("GET", (b"", b"")), ("POST", (b"one", b"two")), ("POST", (b"a" * 9000, b"b" * 16384))])
async def test_a_request_to_a_pod_without_its_app_is_answered_by_another(nowhere: Addr, method: str, bodies: tuple[bytes, bytes]):
    app = Holding()
    async with mesh(H11App(app)) as made:
        _beside(made, nowhere)
        assert await _both(made, method, *bodies) == sorted((200, body) for body in bodies)
        assert sorted(app.bodies) == sorted(bodies), "each came whole, and once"
        assert made.metric(made.client, RETRIES, direction="outbound", error="connect-refused") == 1
        assert made.metric(made.server, "pillion_errors_total", error="connect-refused") == 1
        assert made.metric(made.client, "pillion_errors_total", error="connect-refused") == 0
        [line] = made.log("outbound retried")
        assert line["cause"] == "connect-refused"


async def test_a_body_too_long_to_be_kept_fails_rather_than_being_cut(nowhere: Addr):
    async with mesh(H11App(Holding())) as made:
        made.destination(made.add_peer(nowhere).endpoint, made.add_peer(nowhere).endpoint)
        status, _, headers = await Http1(await made.dial()).ask("/", "POST", b"x" * 16385)
        assert (status, headers[b"pillion-proxy-error"]) == (502, b"connect-refused")
        assert made.metric(made.client, RETRIES) == 0


async def test_where_no_pod_has_its_app_a_request_is_tried_twice_and_no_more(nowhere: Addr):
    async with mesh(H11App(Holding())) as made:
        made.destination(*(made.add_peer(nowhere).endpoint for _ in range(4)))
        client = Http1(await made.dial())
        for turn in (1, 2, 3):
            status, _, headers = await client.ask()
            assert (status, headers[b"pillion-proxy-error"]) == (502, b"connect-refused")
            assert made.metric(made.client, RETRIES) == turn
            assert made.metric(made.server, "pillion_request_total") == 2 * turn


async def test_a_pod_that_is_alone_answers_as_before_on_the_connection_it_has(nowhere: Addr):
    async with mesh(H11App(Holding())) as made:
        peer = made.add_peer(nowhere)
        made.destination(peer.endpoint)
        client = Http1(await made.dial())
        assert [(await client.ask())[0] for _ in range(3)] == [502] * 3
        assert (made.metric(made.client, RETRIES), peer.accepted) == (0, 1)


@pytest.mark.parametrize("meshed", [True, False], ids=["an app behind its sidecar", "an unmeshed server"])
async def test_nobody_but_a_sidecar_moves_a_request(meshed: bool):
    """An app that proxies copies headers of its upstreams: what it answered, it has acted on."""

    async def lie(exchange: Exchange) -> None:
        await exchange.answer(b"acted", 502, pillion_proxy_error="connect-refused")

    app = H11App(lie)
    async with mesh(app) as made:
        unmeshed = Endpoint(str(made.app)), Endpoint("127.0.0.1:1")
        made.destination(*(made.add_peer().endpoint for _ in range(2)) if meshed else unmeshed)
        status, body, headers = await Http1(await made.dial()).ask("/pay", "POST", b"once")
        assert (status, body) == (502, b"acted")
        assert b"pillion-proxy-error" not in headers
        assert len(app.requests) == 1 and made.metric(made.client, RETRIES) == 0


@pytest.mark.needs("curl")
async def test_curl_notices_nothing(nowhere: Addr):
    async with mesh(H11App(Holding())) as made, made.entry() as entry:
        _beside(made, nowhere)
        seen: list[bytes] = []

        async def ask() -> None:
            seen.append((await curl(entry, "/", "--data", "paid", "-w", "%{http_code}")).out)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
        assert seen == [b"paid200"] * 2
        assert made.metric(made.client, RETRIES) == 1


async def test_a_grpc_call_is_answered_by_another_pod(nowhere: Addr):
    """Two calls of one channel: the first stays open at the pod that works until the second was answered."""
    cart = Cart()

    def talk(client: Client) -> bytes:
        waiting = client.wait.future(b"x", timeout=2 * PATIENCE_S)
        assert cart.waiting.wait(PATIENCE_S)
        answer = client.echo(b"body", timeout=PATIENCE_S)
        waiting.cancel()
        return bytes(answer)

    with grpc_server(cart) as app:
        async with mesh(app) as made, made.entry() as entry:
            _beside(made, nowhere)
            with trio.fail_after(3 * PATIENCE_S):
                assert await trio.to_thread.run_sync(calling, entry, talk) == b"body"
            assert made.metric(made.client, RETRIES, error="connect-refused") == 1
            assert cart.calls == 2


async def test_a_grpc_call_that_reaches_no_app_is_unavailable(nowhere: Addr):
    def talk(client: Client) -> tuple[grpc.StatusCode, str]:
        return status_of(lambda: client.echo(b"body", timeout=PATIENCE_S))

    with grpc_server(Cart()) as app:
        async with mesh(app) as made, made.entry() as entry:
            made.destination(made.add_peer(nowhere).endpoint, made.add_peer(nowhere).endpoint)
            with trio.fail_after(2 * PATIENCE_S):
                code, detail = await trio.to_thread.run_sync(calling, entry, talk)
            assert (code, detail) == (grpc.StatusCode.UNAVAILABLE, "connect-refused")
            assert made.metric(made.client, RETRIES) == 1


async def test_an_app_that_ends_with_connections_open_is_left_at_the_next_request():
    """Its listener goes and its connections end; its sidecar still takes requests, as while a pod terminates."""
    stays = Holding()
    async with mesh(H11App(stays)) as made, trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        ends, scope = H11App(stays), trio.CancelScope()

        async def serve() -> None:
            with scope:
                await trio.serve_listeners(ends, listeners)

        nursery.start_soon(serve)
        _beside(made, Addr(*listeners[0].socket.getsockname()))
        assert await _both(made, "GET", b"", b"") == [(200, b"")] * 2
        assert ends.connections == 1
        links = made.server.relay.open_links
        scope.cancel()
        with trio.fail_after(PATIENCE_S):
            while made.server.relay.open_links == links:
                await trio.lowlevel.checkpoint()
        stays.hold()
        assert await _both(made, "POST", b"one", b"two") == [(200, b"one"), (200, b"two")]
        assert made.metric(made.client, RETRIES, error="connect-refused") == 1
