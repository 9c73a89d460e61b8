"""Mutual TLS between sidecars under attack: whoever cannot prove the right name gets nothing, is counted and is logged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from cryptography import x509
from OpenSSL import SSL

from core import alpn
from core.credentials import Credentials
from core.runtime.sockets import RawStream
from core.runtime.tls import HandshakeFailed, TlsStream, client_context
from tests.certs import Authority
from tests.scenarios.mesh import ANYONE, CART, WEB, Mesh, inbound_policy, mesh
from tests.scenarios.peers import PATIENCE_S, Exchange, H11App, read_until

_OURS = Authority()
_THEIRS = Authority("another mesh")
_STRANGER = "spiffe://elsewhere.example/ns/shop/sa/cart"


async def _answer(exchange: Exchange) -> None:
    await exchange.answer(exchange.headers.get(b"pillion-client-id", b"nobody"))


async def _ask(made: Mesh, credentials: Credentials | None, name: str = WEB.server_name, inside: bytes = alpn.HTTP1) -> bytes:
    """Dial the server's pod directly, as an attacker would, and ask for /; what the answer says, empty when there is none."""
    context = client_context(credentials, _OURS.bundle_pem, [inside])
    tls = TlsStream.client(RawStream(made.dial_server()), context, name, WEB)
    try:
        with trio.fail_after(PATIENCE_S):
            await tls.do_handshake()
            await tls.send_all(b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")
            answer = b""
            while data := await tls.receive_some():
                answer += data
            return answer
    except (HandshakeFailed, trio.BrokenResourceError):
        return b""
    finally:
        await tls.transport.aclose()


def _dns(name: str) -> x509.GeneralName:
    return x509.DNSName(name)


_URI = x509.UniformResourceIdentifier(CART.uri)
_ATTACKS: dict[str, tuple[Callable[[], Credentials | None], str]] = {  # made when they are used: their times count from then
    "expired": (lambda: _OURS.credentials(CART, starts_in=-700, ends_in=-10), "expired"),
    "not valid yet": (lambda: _OURS.credentials(CART, starts_in=600), "not-yet-valid"),
    "signed by another authority": (lambda: _THEIRS.credentials(CART), "unknown-issuer"),
    "of another trust domain": (lambda: _OURS.credentials(_STRANGER), "foreign-trust-domain"),
    "without a name": (lambda: _OURS.credentials(CART, names=[]), "invalid-identity"),
    "with a DNS name": (lambda: _OURS.credentials(CART, names=[_dns("cart.shop")]), "invalid-identity"),
    "with two names": (lambda: _OURS.credentials(CART, names=[_URI, x509.UniformResourceIdentifier(WEB.uri)]), "invalid-identity"),
    "none at all": (lambda: None, "no-certificate"),
}


async def test_a_proven_name_is_what_the_app_is_told():
    async with mesh(H11App(_answer), authority=_OURS) as made:
        assert (await _ask(made, _OURS.credentials(CART))).endswith(CART.uri.encode())


@pytest.mark.parametrize(("made_up", "reason"), _ATTACKS.values(), ids=_ATTACKS.keys())
async def test_a_client_with_a_certificate_that_proves_nothing_is_refused(made_up: Callable[[], Credentials | None], reason: str):
    app = H11App(_answer)
    async with mesh(app, authority=_OURS, policy=inbound_policy(ANYONE)) as made:
        assert await _ask(made, made_up()) == b""
        assert made.metric(made.server, "pillion_errors_total", direction="inbound", error=f"tls-{reason}") == 1
        assert [line["level"] for line in made.log(f"tls-{reason}")] == ["warning"]
        assert app.connections == 0


@pytest.mark.parametrize(
    ("server", "cause"),
    {
        "expired": (_OURS.credentials(WEB, starts_in=-700, ends_in=-10), "tls-handshake-failed"),
        "signed by another authority": (_THEIRS.credentials(WEB, bundle_pem=_OURS.bundle_pem), "tls-handshake-failed"),
        "another identity": (_OURS.credentials(CART), "peer-identity-mismatch"),
        "of another trust domain": (_OURS.credentials("spiffe://elsewhere.example/ns/shop/sa/web"), "peer-identity-mismatch"),
    }.values(),
    ids=("expired", "signed by another authority", "another identity", "of another trust domain"),
)
async def test_an_endpoint_that_cannot_prove_its_name_is_not_spoken_to(server: Credentials, cause: str):
    app = H11App(_answer)
    async with mesh(app, authority=_OURS) as made:
        made.server.credentials.set(replace(server, not_after=time.time() + 60))  # it serves what it has, whatever the certificate says
        stream = await made.dial()
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
        answer = await read_until(stream, b"\r\n\r\n")
        assert (answer[:12], f"pillion-proxy-error: {cause}".encode() in answer) == (b"HTTP/1.1 502", True)
        assert made.metric(made.client, "pillion_errors_total", direction="outbound", error=cause) >= 1
        assert app.connections == 0


async def test_without_a_certificate_nothing_goes_out_and_nothing_comes_in():
    app = H11App(_answer)
    async with mesh(app, authority=_OURS, policy=inbound_policy(ANYONE)) as made:
        mine = made.client.credentials.value
        made.client.credentials.set(None)
        stream = await made.dial()
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
        answer = await read_until(stream, b"\r\n\r\n")
        assert (answer[:12], b"identity-unknown" in answer) == (b"HTTP/1.1 503", True)
        made.client.credentials.set(mine)
        made.server.credentials.set(None)
        assert await _ask(made, _OURS.credentials(CART)) == b""
        assert made.metric(made.server, "pillion_errors_total", error="identity-unknown") == 1
        assert app.connections == 0


async def test_an_expired_certificate_of_our_own_is_as_good_as_none():
    async with mesh(H11App(_answer), authority=_OURS) as made:
        made.client.credentials.set(_OURS.credentials(CART, starts_in=-700, ends_in=-10))
        stream = await made.dial()
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
        assert b"identity-unknown" in await read_until(stream, b"\r\n\r\n")


async def test_a_renewed_certificate_and_a_new_authority_are_used_from_the_next_connection_on():
    app = H11App(_answer)
    async with mesh(app, authority=_OURS) as made:
        old = await made.dial()
        await old.send_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
        assert (await read_until(old, b"cart"))[:12] == b"HTTP/1.1 200"
        both = _OURS.bundle_pem + _THEIRS.bundle_pem
        for side, who in ((made.client, CART), (made.server, WEB)):  # first everybody trusts both, then one after the other moves
            side.credentials.set(_OURS.credentials(who, bundle_pem=both))
        for side, who in ((made.server, WEB), (made.client, CART)):
            side.credentials.set(_THEIRS.credentials(who, bundle_pem=both))
            for stream in (old, await made.dial()):
                await stream.send_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
                assert (await read_until(stream, b"cart"))[:12] == b"HTTP/1.1 200"


async def test_tls_that_names_somebody_else_or_no_protocol_of_ours_belongs_to_the_app():
    seen: list[bytes] = []

    async def app(stream: trio.SocketStream) -> None:
        async with stream:
            seen.append(await stream.receive_some(5))

    async with mesh(app, authority=_OURS, policy=inbound_policy(ANYONE)) as made:
        assert await _ask(made, _OURS.credentials(CART), name="other.shop") == b""
        assert await _ask(made, _OURS.credentials(CART), inside=b"h2") == b""
        assert [data[:1] for data in seen] == [b"\x16"] * 2  # the ClientHello itself; the app ended it
        assert made.metric(made.server, "pillion_tcp_open_total", tls="opaque") == 2


async def test_such_tls_proves_nothing_to_the_policy():
    async with mesh(H11App(_answer), authority=_OURS) as made:
        assert await _ask(made, _OURS.credentials(CART), name="other.shop") == b""
        assert made.metric(made.server, "pillion_inbound_tcp_authz_deny_total") == 1


async def test_an_older_tls_version_is_refused_when_it_is_addressed_to_us():
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.set_alpn_protos([alpn.HTTP1])
    async with mesh(H11App(_answer), authority=_OURS) as made:
        tls = TlsStream.client(RawStream(made.dial_server()), context, WEB.server_name, WEB)
        with pytest.raises(HandshakeFailed):
            await tls.do_handshake()
        await tls.transport.aclose()
        assert made.metric(made.server, "pillion_errors_total", error="tls-protocol") == 1
