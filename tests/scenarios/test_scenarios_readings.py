"""What rules look at reaches the app in one reading: no spelling of a header, method or parameter leads around the rule about it."""

from __future__ import annotations

import h2.events
import h11
import pytest
import trio

from core.refs import Ref
from policy.wire import HttpMatch, PathMatch, Route, Rule, ValueMatch
from tests.scenarios.h2_peers import H2, H2App
from tests.scenarios.mesh import ANYONE, CART, VIP, WEB, inbound_policy, mesh, only
from tests.scenarios.peers import Exchange, H11App, Http1, read_until

LONG = "x-a-b-c-d-e-f-g"
"""More separators than could be tried one by one for each request."""


def route(name: str, match: HttpMatch, *grants: object) -> Route:
    return Route(Ref("gateway.networking.k8s.io", "HTTPRoute", "shop", name), "http", (), (Rule((match,)),), grants)  # type: ignore[arg-type]


GUARDED = inbound_policy(
    routes=(
        route("all", HttpMatch(PathMatch("PathPrefix", "/")), ANYONE),
        route("role", HttpMatch(headers=(ValueMatch("Exact", "x-role", "admin"),)), only(WEB)),
        route("long", HttpMatch(headers=(ValueMatch("Exact", LONG, "1"),)), only(WEB)),
        route("delete", HttpMatch(method="DELETE"), only(WEB)),
        route("host", HttpMatch(headers=(ValueMatch("Exact", "host", "inner.shop"),)), only(WEB)),
        route("query", HttpMatch(query=(ValueMatch("Exact", "role", "admin"),)), only(WEB)),
    )
)
"""The client of these tests, CART, may do everything but what each of the narrower rules is about."""

REQUESTS = {
    "the rule's header": ("GET", "/", "x-role", "admin", "403"),
    "its other spelling": ("GET", "/", "x_role", "admin", "400"),
    "a spelling of PHP": ("GET", "/", "x.role", "admin", "400"),
    "the long name": ("GET", "/", LONG, "1", "403"),
    "one of its first separators": ("GET", "/", "x_a-b-c-d-e-f-g", "1", "400"),
    "the last of its separators": ("GET", "/", "x-a-b-c-d-e-f_g", "1", "400"),
    "all of its separators": ("GET", "/", LONG.replace("-", "_"), "1", "400"),
    "another name": ("GET", "/", "x-roles", "admin", "200"),
    "the rule's method": ("DELETE", "/", "x-other", "1", "403"),
    "its method in small letters": ("delete", "/", "x-other", "1", "400"),
    "the rule's parameter": ("GET", "/?role=admin", "x-other", "1", "403"),
    "a list of the parameter": ("GET", "/?role[]=admin", "x-other", "1", "400"),
}


@pytest.mark.parametrize("case", REQUESTS.values(), ids=REQUESTS.keys())
async def test_no_spelling_leads_around_a_rule_in_http1(case: tuple[str, ...]):
    method, target, name, value, expected = case
    app = H11App(Exchange.answer)
    async with mesh(app, policy=GUARDED) as made:
        stream = await made.dial()
        await stream.send_all(f"{method} {target} HTTP/1.1\r\nhost: web\r\n{name}: {value}\r\n\r\n".encode())
        assert (await read_until(stream, b"\r\n\r\n")).startswith(f"HTTP/1.1 {expected} ".encode())
        assert len(app.requests) == (expected == "200")


async def answer_http2(end: H2, event: h2.events.Event) -> None:
    if isinstance(event, h2.events.StreamEnded):
        end.h2.send_headers(event.stream_id, [(":status", "200")], end_stream=True)


@pytest.mark.parametrize("case", REQUESTS.values(), ids=REQUESTS.keys())
async def test_no_spelling_leads_around_a_rule_in_http2(case: tuple[str, ...]):
    method, target, name, value, expected = case
    app = H2App(answer_http2)
    async with mesh(app, policy=GUARDED) as made, trio.open_nursery() as nursery:
        client = H2(await made.dial(VIP), client=True)
        await client.start()
        nursery.start_soon(client.pump)
        for _ in range(3):  # blocks that repeat are remembered
            number = await client.request(target, method, more=[(name, value)])
            assert (await client.answer(number))[0] == expected
        asked = [event for end in app.connections for event in end.events if isinstance(event, h2.events.RequestReceived)]
        assert len(asked) == (3 if expected == "200" else 0)
        nursery.cancel_scope.cancel()


async def test_a_rule_about_the_host_field_holds_in_http2_which_says_it_otherwise():
    app = H2App(answer_http2)
    async with mesh(app, policy=GUARDED) as made, trio.open_nursery() as nursery:
        client = H2(await made.dial(VIP), client=True)
        await client.start()
        nursery.start_soon(client.pump)
        for fields, expected in (
            ([(":authority", "inner.shop")], "403"),
            ([("host", "inner.shop")], "403"),
            ([(":authority", "web")], "200"),
        ):
            number = client.h2.get_next_available_stream_id()
            pseudo = [(":method", "GET"), (":scheme", "http"), (":path", "/")]
            client.h2.send_headers(number, [*pseudo, *fields], end_stream=True)
            await client.flush()
            assert (await client.answer(number))[0] == expected
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["x-role", "x_role", LONG.replace("-", "_")])
async def test_no_trailer_of_http1_has_a_name_that_rules_look_at(name: str):
    got: list[dict[bytes, bytes]] = []

    async def reply(exchange: Exchange) -> None:
        await exchange.body()
        got.append(exchange.trailers)
        await exchange.answer()

    async with mesh(H11App(reply), policy=GUARDED) as made:
        for trailer, expected in ((name, 400), ("x-other", 200)):
            client = Http1(await made.dial())
            fields = [("host", "web"), ("transfer-encoding", "chunked")]
            sent = client.connection.send(h11.Request(method="POST", target="/", headers=fields)) or b""
            sent += client.connection.send(h11.EndOfMessage(headers=[(trailer, "admin")])) or b""
            await client.stream.send_all(sent)
            assert (await read_until(client.stream, b"\r\n\r\n")).startswith(b"HTTP/1.1 %d " % expected)
    assert got == [{b"x-other": b"admin"}]


async def test_no_trailer_of_http2_has_a_name_that_rules_look_at_and_the_policy_of_the_request_says_which():
    app = H2App(answer_http2)
    async with mesh(app, policy=GUARDED) as made, trio.open_nursery() as nursery:
        client = H2(await made.dial(VIP), client=True)
        await client.start()
        nursery.start_soon(client.pump)
        trailers = [("x_role", "admin"), ("x-other", "1"), (LONG, "1")]
        for policy, expected in ((GUARDED, ["x-other"]), (inbound_policy(only(CART)), ["x_role", "x-other", LONG])):
            made.policy(policy)
            number = await client.request("/", "POST", b"body")
            client.h2.send_headers(number, trailers, end_stream=True)
            await client.flush()
            assert (await client.answer(number))[0] == "200"
            [end] = app.connections
            assert [name for name, _ in end.got(number, h2.events.TrailersReceived)[0].headers] == expected
        nursery.cancel_scope.cancel()
