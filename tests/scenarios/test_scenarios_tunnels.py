"""Tunnels follow policy: a WebSocket, a CONNECT and an HTTP/2 extended CONNECT lose their connection with their permit; requests finish."""

from __future__ import annotations

import queue
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import h2.errors
import h2.events
import pytest
import trio
import websockets.exceptions
import websockets.sync.client

from core.addrs import Addr
from core.names import WorkloadId
from core.refs import Ref
from policy.wire import HttpMatch, PathMatch, Route, Rule, ValueMatch
from tests.scenarios.grpc_peers import Cart, Client, calling, grpc_server, status_of
from tests.scenarios.h2_peers import H2, H2App
from tests.scenarios.mesh import CART, FOR_CART, WEB, Mesh, inbound_policy, mesh, only
from tests.scenarios.peers import PATIENCE_S, Exchange, H11App, Http1, read_all, read_until
from tests.scenarios.websocket_peers import websocket_server

TERMINATED = "pillion_inbound_http_authz_terminate_total"


@pytest.fixture
def chat() -> Iterator[Addr]:
    with websocket_server() as addr:
        yield addr


def route(name: str, match: HttpMatch, *who: WorkloadId) -> Route:
    ref = Ref("gateway.networking.k8s.io", "HTTPRoute", "shop", name)
    return Route(ref, "http", (), (Rule((match,)),), (only(*who),))


def below(path: str) -> HttpMatch:
    return HttpMatch(PathMatch("PathPrefix", path))


class Talk:
    """A conversation of the websockets library, whose calls wait in threads."""

    def __init__(self, connection: websockets.sync.client.ClientConnection) -> None:
        self._connection = connection

    async def say(self, word: str) -> str:
        def exchange() -> str:
            self._connection.send(word)
            return str(self._connection.recv(PATIENCE_S))

        return await trio.to_thread.run_sync(exchange)

    async def is_cut(self) -> bool:
        """Wait for the end, and say whether it came without a word of the protocol."""

        def wait() -> bool:
            try:
                self._connection.recv(PATIENCE_S)
            except websockets.exceptions.ConnectionClosed as closed:
                return closed.rcvd is None
            return False

        return await trio.to_thread.run_sync(wait)


@asynccontextmanager
async def talking(made: Mesh, path: str = "/chat", team: str = "blue") -> AsyncIterator[Talk]:
    async with made.entry() as entry:

        def connect() -> websockets.sync.client.ClientConnection:
            connecting = websockets.sync.client.connect(f"ws://{entry}{path}", proxy=None, additional_headers={"X-Team": team})
            return connecting.__enter__()

        connection = await trio.to_thread.run_sync(connect)
        try:
            assert await trio.to_thread.run_sync(connection.recv, PATIENCE_S) == f"welcome {CART.uri}"
            yield Talk(connection)
        finally:
            await trio.to_thread.run_sync(connection.close)


async def test_a_websocket_is_cut_when_its_client_loses_its_permit(chat: Addr):
    async with mesh(chat, PILLION_ACCESS_LOG="errors") as made, talking(made) as talk:
        assert await talk.say("one") == "one"
        made.policy(inbound_policy(only(CART, WEB)))
        assert await talk.say("two") == "two", "a policy that still lets it in changes nothing"
        made.policy(inbound_policy(only(WEB)))
        assert await talk.is_cut()
        assert made.metric(made.server, TERMINATED, client_id=CART.uri, srv_name="web") == 1
        assert made.metric(made.server, "pillion_errors_total", error="terminated") == 1
        [line] = made.log("inbound terminated")
        assert "no policy of server shop/web admits" in str(line["reason"]) and CART.uri in str(line["reason"])
        [access] = [one for one in made.log("access") if one["direction"] == "inbound"]
        assert (access["status"], access["error"], access["reason"]) == (101, "terminated", line["reason"])
        with trio.fail_after(PATIENCE_S):
            await made.server.live.wait_none()
        assert not made.server.discovery.ports[chat.port].changed, "nothing of it waits for the next policy"


async def test_each_websocket_is_decided_by_its_own_request(chat: Addr):
    """Path and header values are those it came with; a policy may begin to read what no earlier one read."""
    async with mesh(chat) as made, talking(made, "/chat") as kept, talking(made, "/admin") as moved, talking(made, team="red") as red:
        policy = inbound_policy(routes=(route("all", below("/"), CART), route("admin", below("/admin"), WEB)))
        made.policy(policy)
        assert await moved.is_cut()
        assert (await kept.say("a"), await red.say("b")) == ("a", "b")
        red_only = HttpMatch(PathMatch("PathPrefix", "/"), (ValueMatch("Exact", "x-team", "red"),))
        made.policy(inbound_policy(routes=(route("all", below("/"), WEB), route("red", red_only, CART))))
        assert await kept.is_cut()
        assert await red.say("c") == "c"
        made.policy(inbound_policy(routes=(route("none", below("/nothing"), CART),)))
        assert await red.is_cut(), "a request that no route wants any more"
        assert made.metric(made.server, TERMINATED) == 3


async def test_a_connect_tunnel_is_cut_and_a_request_under_way_is_answered():
    answer = trio.Event()

    async def reply(exchange: Exchange) -> None:
        if exchange.method != b"CONNECT":
            await answer.wait()
            await exchange.answer(b"done")
            return
        await exchange.stream.send_all(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await exchange.stream.receive_some(1)

    app = H11App(reply)
    async with mesh(app) as made, trio.open_nursery() as nursery:
        tunnel, slow = await made.dial(), Http1(await made.dial())
        await tunnel.send_all(b"CONNECT inside.shop:80 HTTP/1.1\r\nhost: inside.shop:80\r\n\r\n")
        await read_until(tunnel, b"hello")
        seen: list[tuple[int, bytes]] = []

        async def ask() -> None:
            seen.append((await slow.ask("/slow"))[:2])

        nursery.start_soon(ask)
        with trio.fail_after(PATIENCE_S):
            while len(app.requests) < 2:
                await trio.lowlevel.checkpoint()
        made.policy(inbound_policy(only(WEB)))
        with pytest.raises(trio.BrokenResourceError):
            await read_all(tunnel)
        answer.set()
        with trio.fail_after(PATIENCE_S):
            while not seen:
                await trio.lowlevel.checkpoint()
        assert seen == [(200, b"done")]
        assert (await slow.ask("/again"))[0] == 403, "but the next one is decided on"


async def test_an_extended_connect_is_reset_and_the_streams_beside_it_live():
    async def echo(end: H2, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            end.h2.send_headers(event.stream_id, [(":status", "200")])
        elif isinstance(event, h2.events.DataReceived):
            end.h2.send_data(event.stream_id, event.data.upper(), end_stream=event.data == b"bye")

    app = H2App(echo, enable_connect_protocol=1)
    async with mesh(app) as made, trio.open_nursery() as nursery:
        client = H2(await made.dial(), client=True)
        await client.start()
        nursery.start_soon(client.pump)
        await client.wait(lambda: client.h2.remote_settings.enable_connect_protocol == 1)

        async def say(number: int, word: bytes) -> None:
            client.h2.send_data(number, word)
            await client.flush()
            await client.wait(lambda: client.data(number).endswith(word.upper()))

        tunnel = await client.request("/chat", "CONNECT", b"", [(":protocol", "websocket")])
        stream = await client.request("/upload", "POST", b"")
        await say(tunnel, b"one")
        await say(stream, b"two")
        made.policy(inbound_policy(only(WEB)))
        await client.wait(lambda: bool(client.got(tunnel, h2.events.StreamReset)))
        assert client.got(tunnel, h2.events.StreamReset)[0].error_code is h2.errors.ErrorCodes.CANCEL
        await say(stream, b"bye")
        await client.wait(lambda: bool(client.got(stream, h2.events.StreamEnded)))
        assert made.metric(made.server, TERMINATED, client_id=CART.uri) == 1
        nursery.cancel_scope.cancel()


async def test_a_grpc_stream_that_was_let_in_may_finish():
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    begun, denied = trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def talk(client: Client) -> grpc.StatusCode:
        chat = client.chat(iter(lines.get, None), timeout=2 * PATIENCE_S)
        assert next(chat) == b"hello"
        token.run_sync_soon(begun.set)
        trio.from_thread.run(denied.wait, trio_token=token)
        lines.put(b"still here")
        assert next(chat) == b"STILL HERE"
        lines.put(None)
        assert list(chat) == []
        return status_of(lambda: client.echo(b"new", timeout=PATIENCE_S))[0]

    with grpc_server(Cart()) as app:
        async with mesh(app) as made, made.entry() as entry, trio.open_nursery() as nursery:

            async def withdraw() -> None:
                await begun.wait()
                made.policy(inbound_policy(only(WEB)))
                denied.set()

            nursery.start_soon(withdraw)
            with trio.fail_after(3 * PATIENCE_S):
                assert await trio.to_thread.run_sync(calling, entry, talk) is grpc.StatusCode.PERMISSION_DENIED
            assert made.metric(made.server, TERMINATED) == 0


async def test_a_policy_that_changed_before_the_app_agreed_to_a_tunnel_counts():
    agreed = trio.Event()

    async def reply(exchange: Exchange) -> None:
        await agreed.wait()
        await exchange.stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\nsecret")
        await exchange.stream.receive_some(1)

    app = H11App(reply)
    async with mesh(app, policy=FOR_CART) as made:
        stream = await made.dial()
        await stream.send_all(b"GET /chat HTTP/1.1\r\nhost: web.shop\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\n")
        with trio.fail_after(PATIENCE_S):
            while not app.requests:
                await trio.lowlevel.checkpoint()
        made.policy(inbound_policy(only(WEB)))
        agreed.set()
        assert (await read_until(stream, b"\r\n\r\n")).startswith(b"HTTP/1.1 403 ")
        assert made.metric(made.server, TERMINATED) == 1
