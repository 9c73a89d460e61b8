"""Routes of a Service through both sidecars: backends, header changes, and what a request gets that leads nowhere."""

from __future__ import annotations

import grpc
import h2.events
import h11
import trio
from msgspec.structs import replace

from core.refs import Ref
from policy import wire
from policy.wire import (
    Action,
    Backend,
    Destination,
    Endpoint,
    FieldEdit,
    HttpMatch,
    PathMatch,
    Redirect,
    Rewrite,
    Rule,
    ServiceRoute,
    Share,
)
from tests.scenarios.grpc_peers import Cart, Client, calling, grpc_server, status_of
from tests.scenarios.h2_peers import H2, H2App
from tests.scenarios.mesh import CART, VIP, WEB, Mesh, inbound_policy, mesh, only
from tests.scenarios.peers import PATIENCE_S, Exchange, H11App, Http1, read_until
from tests.scenarios.test_scenarios_http1 import http_app
from tests.scenarios.test_scenarios_http2 import connected, greet

GONE = Backend(Ref("", "Service", "shop", "nobody"), problem="there is no Service nobody")
SHOP = Ref("", "Service", "shop", "web")
EDIT = FieldEdit(("x-old",), (("pillion-client-id", "spiffe://cluster.local/ns/shop/sa/forged"), ("x-new", "1")))


def rule(path: str) -> Rule:
    return Rule((HttpMatch(PathMatch("PathPrefix", path)),))


def tell(made: Mesh, *rules: tuple[str, Action], backends: tuple[Backend, ...]) -> None:
    """What the controller says about the VIP: its own endpoints refuse, so that whatever arrives came through a route."""
    route = ServiceRoute(
        Ref("gateway.networking.k8s.io", "HTTPRoute", "shop", "web"),
        "http",
        (),
        tuple(rule(path) for path, _ in rules),
        tuple(action for _, action in rules),
    )
    destination = Destination("service", SHOP, "detect", (Endpoint("127.0.0.1:1", WEB.uri),), (route,), backends)
    made.client_controller.watch_destination(str(VIP)).set(destination)


def live(made: Mesh, name: str = "v1") -> Backend:
    return Backend(Ref("", "Service", "shop", name), (Endpoint(str(made.peer), WEB.uri),))


async def test_http1_requests_go_where_their_rule_says() -> None:
    async with mesh(http_app) as made:
        nobody = Backend(Ref("", "Service", "shop", "nobody"), problem="there is no Service nobody")
        idle = Backend(Ref("", "Service", "shop", "idle"))
        shares = [("/v1", Action((Share(0),))), ("/gone", Action((Share(1),))), ("/idle", Action((Share(2),))), ("/none", Action())]
        tell(made, *shares, backends=(live(made), nobody, idle))
        client = Http1(await made.dial())
        assert (await client.ask("/v1/cart"))[0] == 200
        answers = [await client.ask(path) for path in ("/v2", "/gone", "/idle", "/none")]
        assert [(status, headers[b"pillion-proxy-error"]) for status, _, headers in answers] == [
            (404, b"no-route"),
            (500, b"backend-invalid"),
            (503, b"no-endpoints"),
            (500, b"backend-invalid"),
        ]
        assert (await client.ask("/v1"))[0] == 200


async def test_header_changes_reach_the_app_and_forge_nobody() -> None:
    seen: list[bytes] = []

    async def app(stream: trio.SocketStream) -> None:
        seen.append(bytes(await stream.receive_some(65536)))
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await stream.aclose()

    async with mesh(app) as made:
        tell(made, ("/", Action((Share(0),), EDIT)), backends=(live(made),))
        assert (await Http1(await made.dial()).ask(x_old="2", x_kept="3"))[0] == 200
        (head,) = seen
        assert b"\r\nx-new: 1\r\n" in head and b"x-old" not in head and b"x-kept: 3" in head
        assert b"forged" not in head


async def test_http2_requests_of_one_connection_go_different_ways() -> None:
    app = H2App(greet)
    async with mesh(app) as made:
        nobody = Backend(Ref("", "Service", "shop", "nobody"), problem="there is no Service nobody")
        tell(made, ("/v1", Action((Share(0),), EDIT)), ("/gone", Action((Share(1),))), backends=(live(made), nobody))
        async with connected(made) as client:
            answers = [await client.answer(await client.request(path)) for path in ("/v1", "/gone", "/v2", "/v1/x")]
            assert [status for status, _ in answers] == ["200", "500", "404", "200"]
            assert answers[0][1] == f"{CART.uri}|".encode()
            (head, _) = [dict(event.headers) for event in app.connections[0].events if isinstance(event, h2.events.RequestReceived)]
            assert head["x-new"] == "1"


REWRITE = Action((Share(0),), rewrite=Rewrite("inner.example", "/new", "/old"))
ANSWERS = Action((Share(0, response=FieldEdit(("x-app",), ())),), response=FieldEdit(("server",), (("server", "shop"), ("x-new", "1"))))


async def told(exchange: Exchange) -> None:
    """Answers with what the app was asked for; chunked for ``/chunked``."""
    said = exchange.path + b" at " + exchange.headers[b"host"] + b": " + await exchange.body()
    fields = [("Server", "app"), ("X-App", "secret"), ("x-app", "too"), ("x-kept", "1")]
    length = ("transfer-encoding", "chunked") if exchange.path == b"/chunked" else ("content-length", str(len(said)))
    await exchange.send(h11.Response(status_code=200, headers=[*fields, length]), h11.Data(said), h11.EndOfMessage())


async def test_http1_requests_are_rewritten() -> None:
    async with mesh(H11App(told)) as made:
        full = Action((Share(0),), rewrite=Rewrite("", "/full"))
        tell(made, ("/old", REWRITE), ("/all", full), ("/", Action((Share(0),))), backends=(live(made),))
        client = Http1(await made.dial())
        for _ in range(2):
            assert (await client.ask("/old/x?y=/old"))[1] == b"/new/x?y=/old at inner.example: "
            assert (await client.ask("/old", "POST", b"body"))[1] == b"/new at inner.example: body"
            assert (await client.ask("/all/of?it", "PUT", b"body"))[1] == b"/full?it at web.shop: body"
            assert (await client.ask("/other"))[1] == b"/other at web.shop: "


async def test_http2_requests_are_rewritten() -> None:
    async def reply(end: H2, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.StreamEnded):
            head = dict(end.got(event.stream_id, h2.events.RequestReceived)[0].headers)
            end.h2.send_headers(event.stream_id, [(":status", "200")])
            end.h2.send_data(event.stream_id, f"{head[':path']} at {head[':authority']}".encode(), end_stream=True)

    async with mesh(H2App(reply)) as made:
        tell(made, ("/old", REWRITE), ("/", Action((Share(0),))), backends=(live(made),))
        async with connected(made) as client:
            for _ in range(3):  # from the second time on the head is a remembered one
                assert (await client.answer(await client.request("/old/x?y")))[1] == b"/new/x?y at inner.example"
                assert (await client.answer(await client.request("/old")))[1] == b"/new at inner.example"
                assert (await client.answer(await client.request("/other")))[1] == b"/other at web.shop"


async def test_the_other_sidecar_decides_about_the_rewritten_request() -> None:
    async with mesh(H11App(told)) as made:
        ref = Ref("gateway.networking.k8s.io", "HTTPRoute", "shop", "in")
        made.policy(inbound_policy(routes=(wire.Route(ref, "http", ("inner.example",), (rule("/new"),), (only(CART),)),)))
        tell(made, ("/old", REWRITE), ("/", Action((Share(0),))), backends=(live(made),))
        client = Http1(await made.dial())
        assert (await client.ask("/old/x"))[0] == 200
        assert (await client.ask("/new/x"))[0] == 404


async def test_http1_answers_are_changed_in_their_head_only() -> None:
    async with mesh(H11App(told)) as made:
        tell(made, ("/plain", Action((Share(0),))), ("/", ANSWERS), backends=(live(made),))
        client = Http1(await made.dial())
        for path in ("/x", "/chunked", "/x"):
            status, body, headers = await client.ask(path, "POST", b"body")
            assert (status, body) == (200, path.encode() + b" at web.shop: body")
            assert (headers[b"server"], headers[b"x-new"], headers[b"x-kept"]) == (b"shop", b"1", b"1")
            assert b"x-app" not in headers
        headers = (await client.ask("/plain"))[2]
        assert (headers[b"server"], headers[b"x-app"]) == (b"app", b"too")


async def test_answers_of_a_tunnel_are_changed_too_and_those_of_the_sidecar_are_not() -> None:
    async def upgrade(stream: trio.SocketStream) -> None:
        await read_until(stream, b"\r\n\r\n")
        await stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\nx-app: 1\r\n\r\n")
        async with stream:
            await stream.send_all(await stream.receive_some(65536))

    async with mesh(upgrade) as made:
        tell(made, ("/gone", replace(ANSWERS, shares=(Share(1),))), ("/", ANSWERS), backends=(live(made), GONE))
        stream = await made.dial()
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: web.shop\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
        head = await read_until(stream, b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ") and b"server: shop\r\n" in head and b"x-app" not in head
        await stream.send_all(b"still a tunnel")
        assert await read_until(stream, b"tunnel") == b"still a tunnel"
        status, _, headers = await Http1(await made.dial()).ask("/gone")
        assert (status, b"server" in headers) == (500, False)


async def test_http2_answers_are_changed_in_their_head_only() -> None:
    async def reply(end: H2, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.StreamEnded):
            number = event.stream_id
            end.h2.send_headers(number, [(":status", "103"), ("server", "early")])
            end.h2.send_headers(number, [(":status", "200"), ("server", "app"), ("x-app", "secret"), ("x-kept", "1")])
            end.h2.send_data(number, b"body")
            end.h2.send_headers(number, [("x-app", "in a trailer"), ("grpc-status", "0")], end_stream=True)

    async with mesh(H2App(reply)) as made:
        tell(made, ("/plain", Action((Share(0),))), ("/", ANSWERS), backends=(live(made),))
        async with connected(made) as client:
            for path, expected in (("/x", "shop"), ("/plain", "app"), ("/x", "shop")):
                number = await client.request(path)
                assert await client.answer(number) == ("200", b"body")
                head = dict(client.got(number, h2.events.ResponseReceived)[0].headers)
                assert (head["server"], head.get("x-app"), head["x-kept"]) == (expected, None if expected == "shop" else "secret", "1")
                assert ("server", "early") in client.got(number, h2.events.InformationalResponseReceived)[0].headers
                assert ("x-app", "in a trailer") in client.got(number, h2.events.TrailersReceived)[0].headers


async def test_grpc_calls_are_changed_and_keep_their_status() -> None:
    def talk(client: Client) -> None:
        _, call = client.echo.with_call(b"", metadata=(("x-one", "1"),), timeout=PATIENCE_S)
        initial = dict(call.initial_metadata())
        assert initial["x-new"] == "1" and "x-saw-x-one" not in initial
        assert dict(call.trailing_metadata())["x-end"] == "here"
        assert status_of(lambda: client.fail(b"lost"))[:2] == (grpc.StatusCode.DATA_LOSS, "lost")
        assert status_of(lambda: client.missing(b""))[0] is grpc.StatusCode.UNIMPLEMENTED  # trailers only

    with grpc_server(Cart()) as app:
        async with mesh(app) as made:
            response = FieldEdit(("x-saw-x-one", "x-end"), (("x-new", "1"),))
            tell(made, ("/", Action((Share(0),), response=response)), backends=(live(made),))
            async with made.entry() as entry:
                await trio.to_thread.run_sync(calling, entry, talk)


async def test_a_redirect_is_answered_and_no_failure() -> None:
    moved = Action(redirect=Redirect(301, "https", "example.org", None, "/new", "/old"))
    async with mesh(H2App(greet)) as made:
        tell(made, ("/old", moved), backends=())
        client = Http1(await made.dial())
        for body in (b"", b"some body"):
            status, _, headers = await client.ask("/old/x?y", "POST", body)
            assert (status, headers[b"location"]) == (301, b"https://example.org/new/x?y")
            assert b"pillion-proxy-error" not in headers
        async with connected(made) as second:
            number = await second.request("/old")
            assert (await second.answer(number))[0] == "301"
            head = dict(second.got(number, h2.events.ResponseReceived)[0].headers)
            assert head["location"] == "https://example.org/new"
        assert made.metric(made.client, "pillion_response_total", status_code="301", classification="success") == 3


async def test_a_change_of_routes_counts_for_the_next_request_of_a_connection() -> None:
    async with mesh(http_app) as made:
        client = Http1(await made.dial())
        assert (await client.ask())[0] == 200
        tell(made, ("/v1", Action((Share(0),))), backends=(live(made),))
        assert (await client.ask())[0] == 404
        assert (await client.ask("/v1"))[0] == 200
        made.destination()
        assert (await client.ask())[0] == 200
