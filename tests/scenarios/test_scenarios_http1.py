"""HTTP/1.1 through both sidecars: allowed, denied, who the app sees, keep-alive, failures."""

from __future__ import annotations

import h11
import pytest
import trio

from policy.wire import Endpoint
from proxy.inbound.gate import forwarded_fields
from tests.scenarios.mesh import ANYONE, CART, WEB, inbound_policy, mesh, only
from tests.scenarios.peers import Exchange, H11App, Http1, next_event


async def http_app(stream: trio.SocketStream) -> None:
    """Answers every request with its method, target, client id and body."""
    connection = h11.Connection(h11.SERVER)
    try:
        while True:
            event = await next_event(connection, stream)
            if isinstance(event, h11.ConnectionClosed):
                return
            if isinstance(event, h11.Request):
                request, body = event, b""
            if isinstance(event, h11.Data):
                body += bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                headers = dict(request.headers)
                text = b"%s %s as %s: %s" % (request.method, request.target, headers.get(b"pillion-client-id", b"nobody"), body)
                await stream.send_all(connection.send(h11.Response(status_code=200, headers=[("content-length", str(len(text)))])))
                await stream.send_all(connection.send(h11.Data(text)))
                await stream.send_all(connection.send(h11.EndOfMessage()))
                if connection.our_state is h11.MUST_CLOSE:
                    return
                connection.start_next_cycle()
    except (trio.BrokenResourceError, h11.RemoteProtocolError):
        pass
    finally:
        await stream.aclose()


async def test_a_permitted_client_reaches_the_app_under_its_own_name():
    async with mesh(http_app) as made:
        client = Http1(await made.dial())
        assert (await client.ask("/cart?id=1"))[:2] == (200, b"GET /cart?id=1 as %s: " % CART.uri.encode())
        assert (await client.ask("/cart", "POST", b"two"))[1].endswith(b": two")
        assert made.metric(made.server, "pillion_response_total", client_id=CART.uri, status_code="200", tls="true") == 2
        assert made.metric(made.client, "pillion_response_total", server_id=WEB.uri, status_code="200") == 2


async def test_a_client_that_no_policy_names_gets_403_and_the_connection_lives():
    async with mesh(http_app) as made:
        made.policy(inbound_policy(only(WEB)))
        client = Http1(await made.dial())
        status, body, headers = await client.ask()
        assert (status, body, headers[b"pillion-proxy-error"]) == (403, b"", b"denied")
        made.policy(inbound_policy(only(CART)))
        assert (await client.ask())[0] == 200
        assert made.metric(made.server, "pillion_inbound_http_authz_deny_total") == 1


async def test_an_unmeshed_client_is_told_nothing_and_cannot_name_itself():
    async with mesh(http_app) as made:
        status, _, headers = await Http1(await made.dial_unmeshed()).ask(pillion_client_id=CART.uri)
        assert status == 403
        assert b"pillion-proxy-error" not in headers
        made.policy(inbound_policy(ANYONE))
        assert (await Http1(await made.dial_unmeshed()).ask(pillion_client_id=CART.uri))[1] == b"GET / as nobody: "


async def test_no_ready_endpoint_is_503_at_once():
    async with mesh(http_app) as made:
        made.nowhere()
        status, _, headers = await Http1(await made.dial()).ask()
        assert (status, headers[b"pillion-proxy-error"]) == (503, b"no-endpoints")


async def test_an_endpoint_that_refuses_is_502_and_another_one_is_tried_first():
    async with mesh(http_app) as made:
        closed = Endpoint("127.0.0.1:1", WEB.uri)
        made.destination(closed)
        status, _, headers = await Http1(await made.dial()).ask()
        assert (status, headers[b"pillion-proxy-error"]) == (502, b"connect-refused")
        made.destination(closed, Endpoint(str(made.peer), WEB.uri))
        client = Http1(await made.dial())
        assert [(await client.ask())[0] for _ in range(20)] == [200] * 20


async def test_an_endpoint_with_another_identity_is_never_spoken_to():
    async with mesh(http_app) as made:
        made.destination(Endpoint(str(made.peer), CART.uri))
        status, _, headers = await Http1(await made.dial()).ask()
        assert (status, headers[b"pillion-proxy-error"]) == (502, b"tls-handshake-failed")  # nobody there answers to that name
        assert made.metric(made.server, "pillion_request_total") == 0


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("off", b"forwarded", None),
        ("off", b"x-forwarded-for", None),
        ("forwarded", b"forwarded", b"for=10.1.0.5;proto=http"),
        ("x-forwarded-for", b"x-forwarded-for", b"10.1.0.5"),
    ],
)
async def test_the_callers_address_is_told_by_setting_only(setting: str, field: bytes, value: bytes | None):
    async def answer(exchange: Exchange) -> None:
        await exchange.answer(exchange.headers.get(field, b"none"))

    async with mesh(H11App(answer), policy=inbound_policy(ANYONE), PILLION_FORWARDED=setting) as made:
        assert (await Http1(await made.dial_unmeshed()).ask())[1] == (value or b"none")


def test_an_ipv6_address_is_told_as_rfc_7239_has_it() -> None:
    assert forwarded_fields("forwarded", "2001:db8::1") == ((b"forwarded", b'for="[2001:db8::1]";proto=http'),)
