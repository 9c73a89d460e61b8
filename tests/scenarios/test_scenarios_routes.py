"""Routes of a Service through both sidecars: backends, header changes, and what a request gets that leads nowhere."""

from __future__ import annotations

import h2.events
import trio

from core.refs import Ref
from policy.wire import Action, Backend, Destination, Endpoint, FieldEdit, HttpMatch, PathMatch, Redirect, Rule, ServiceRoute, Share
from tests.scenarios.h2_peers import H2App
from tests.scenarios.mesh import CART, VIP, WEB, Mesh, mesh
from tests.scenarios.peers import Http1
from tests.scenarios.test_scenarios_http1 import http_app
from tests.scenarios.test_scenarios_http2 import connected, greet

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
