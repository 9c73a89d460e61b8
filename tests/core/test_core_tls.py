"""TLS between Pillion's processes: who is let in, who is refused and why, and the stream contract."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from cryptography import x509
from OpenSSL import SSL
from OpenSSL._util import lib

from core.credentials import Credentials
from core.names import parse_workload_id
from core.runtime.tls import HandshakeFailed, TlsStream, client_context, server_context
from tests.certs import Authority

WEB = parse_workload_id("spiffe://cluster.local/ns/shop/sa/web")
CART = parse_workload_id("spiffe://cluster.local/ns/shop/sa/cart")
AUTHORITY = Authority()
ALPN = (b"pillion-h2", b"pillion-tcp")


def pair(
    server: Credentials,
    client: Credentials | None,
    *,
    required: bool = True,
    expect=WEB,
    bundle: bytes | None = None,
    offers=ALPN,
    transports=trio.testing.memory_stream_pair,
) -> tuple[TlsStream, TlsStream]:
    left, right = transports()
    accept = server_context(server, client="required" if required else "optional", alpn=ALPN)
    dial = client_context(client, bundle or AUTHORITY.bundle_pem, offers)
    return TlsStream.client(left, dial, WEB.server_name, expect), TlsStream.server(right, accept, "cluster.local")


async def outcome(handshake: Callable[[], Awaitable[None]], stream: TlsStream) -> str:
    try:
        await handshake()
    except HandshakeFailed as error:
        await stream.transport.aclose()
        return error.reason
    return "ok"


async def shake(client: TlsStream, server: TlsStream) -> tuple[str, str]:
    """The outcome at the client and at the server; the client reads once, because TLS 1.3 tells it late that it was refused."""
    results: dict[str, str] = {}

    async def run(name: str, stream: TlsStream) -> None:
        results[name] = await outcome(stream.do_handshake, stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "client", client)
        nursery.start_soon(run, "server", server)
    return results["client"], results["server"]


async def test_both_ends_learn_who_the_other_is_and_what_is_inside():
    client, server = pair(AUTHORITY.credentials(WEB), AUTHORITY.credentials(CART))
    assert await shake(client, server) == ("ok", "ok")
    assert (client.peer, server.peer) == (WEB, CART)
    assert client.alpn == server.alpn == b"pillion-h2"
    assert client.connection.get_protocol_version_name() == "TLSv1.3"
    assert client.connection.get_cipher_name() == "TLS_AES_128_GCM_SHA256"


async def test_the_server_decides_on_the_cipher():
    accept = server_context(AUTHORITY.credentials(WEB), client="required", alpn=ALPN)
    dial = client_context(AUTHORITY.credentials(CART), AUTHORITY.bundle_pem, ALPN)
    dial.set_tls13_ciphersuites(b"TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256")
    left, right = trio.testing.memory_stream_pair()
    client = TlsStream.client(left, dial, WEB.server_name, WEB)
    assert await shake(client, TlsStream.server(right, accept, "cluster.local")) == ("ok", "ok")
    assert client.connection.get_cipher_name() == "TLS_AES_128_GCM_SHA256"


async def test_the_server_has_the_identity_it_was_dialled_for():
    client, server = pair(AUTHORITY.credentials(CART), AUTHORITY.credentials(CART))
    assert (await shake(client, server))[0] == "identity-mismatch"


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ({"ends_in": -1.0}, "expired"),
        ({"starts_in": 300.0}, "not-yet-valid"),
        ({"names": [x509.DNSName("web.shop")]}, "invalid-identity"),
        ({"names": []}, "invalid-identity"),
        ({"names": [x509.UniformResourceIdentifier(WEB.uri), x509.UniformResourceIdentifier(CART.uri)]}, "invalid-identity"),
        ({"names": [x509.UniformResourceIdentifier(WEB.uri), x509.DNSName("web")]}, "invalid-identity"),
        ({"names": [x509.UniformResourceIdentifier("spiffe://cluster.local/ns/shop")]}, "invalid-identity"),
        ({"signs": True}, "invalid-identity"),
        ({"names": [x509.UniformResourceIdentifier("spiffe://other.example/ns/shop/sa/cart")]}, "foreign-trust-domain"),
    ],
)
async def test_a_client_with_a_flawed_certificate_is_refused(flaw, reason):
    client, server = pair(AUTHORITY.credentials(WEB), AUTHORITY.credentials(CART, **flaw))
    assert (await shake(client, server))[1] == reason


async def test_a_certificate_of_a_stranger_is_refused_at_both_ends():
    stranger = Authority("stranger")
    client, server = pair(AUTHORITY.credentials(WEB), stranger.credentials(CART))
    assert (await shake(client, server))[1] == "unknown-issuer"
    client, server = pair(stranger.credentials(WEB), AUTHORITY.credentials(CART))
    assert (await shake(client, server))[0] == "unknown-issuer"


async def test_no_client_certificate_is_refused_where_one_is_required_and_anonymous_where_not():
    client, server = pair(AUTHORITY.credentials(WEB), None)
    assert (await shake(client, server))[1] == "no-certificate"
    client, server = pair(AUTHORITY.credentials(WEB), None, required=False)
    assert await shake(client, server) == ("ok", "ok")
    assert server.peer is None


async def test_a_client_that_offers_nothing_we_speak_is_refused():
    client, server = pair(AUTHORITY.credentials(WEB), AUTHORITY.credentials(CART), offers=(b"h2",))
    assert (await shake(client, server))[1] == "protocol"


async def test_no_session_can_be_resumed():
    accept = server_context(AUTHORITY.credentials(WEB), client="required", alpn=ALPN)
    dial = client_context(AUTHORITY.credentials(CART), AUTHORITY.bundle_pem, ALPN)

    async def connect(session: SSL.Session | None) -> tuple[TlsStream, TlsStream]:
        left, right = trio.testing.memory_stream_pair()
        client = TlsStream.client(left, dial, WEB.server_name, WEB)
        server = TlsStream.server(right, accept, "cluster.local")
        if session is not None:
            client.connection.set_session(session)
        assert await shake(client, server) == ("ok", "ok")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, b"x")
            assert await client.receive_some() == b"x"
        return client, server

    client, _ = await connect(None)
    again, _ = await connect(client.connection.get_session())
    assert not lib.SSL_session_reused(again.connection._ssl)


async def test_a_server_sends_one_flight_and_no_session_tickets():
    client, server = pair(AUTHORITY.credentials(WEB), AUTHORITY.credentials(CART))
    flights: list[int] = []
    send_all = server.transport.send_all

    async def counting(data: bytes | bytearray | memoryview) -> None:
        flights.append(len(data))
        await send_all(data)

    server.transport.send_all = counting  # type: ignore[method-assign]
    assert await shake(client, server) == ("ok", "ok")
    assert len(flights) == 1


async def test_each_end_sends_its_chain_as_it_was_given_without_the_anchor():
    client, server = pair(AUTHORITY.credentials(WEB), AUTHORITY.credentials(CART))
    assert await shake(client, server) == ("ok", "ok")
    seen_by_client = client.connection.get_peer_cert_chain(as_cryptography=True)
    seen_by_server = server.connection.get_peer_cert_chain(as_cryptography=True)
    assert (seen_by_client, seen_by_server) == ([server.connection.get_certificate(as_cryptography=True)], [])  # OpenSSL: without the leaf


async def test_a_stream_cut_off_without_close_notify_is_broken_not_ended():
    client, server = pair(AUTHORITY.credentials(WEB), AUTHORITY.credentials(CART))
    await shake(client, server)
    await server.transport.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await client.receive_some()


async def _connected() -> tuple[TlsStream, TlsStream]:
    client, server = pair(AUTHORITY.credentials(WEB), AUTHORITY.credentials(CART))
    assert await shake(client, server) == ("ok", "ok")
    return client, server


async def test_both_ends_may_send_more_than_the_network_holds_before_either_has_read():
    """As a sidecar that comes back with thousands of subscriptions, while it is told about the first of them."""

    async def take(stream: TlsStream, left: int) -> None:
        while left:
            left -= len(await stream.receive_some())

    for _ in range(20):  # in whatever order the scheduler has them begin
        client, server = pair(AUTHORITY.credentials(WEB), AUTHORITY.credentials(CART), transports=trio.testing.lockstep_stream_pair)
        assert await shake(client, server) == ("ok", "ok")
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for stream in (client, server):
                    nursery.start_soon(take, stream, 1 << 18)
                    nursery.start_soon(stream.send_all, bytes(1 << 18))


async def test_the_stream_keeps_half_close_and_order():
    client, server = await _connected()
    payload = bytes(range(256)) * 2000

    async def echo() -> None:
        got = bytearray()
        while chunk := await server.receive_some():
            got += chunk
        await server.send_all(got)
        await server.send_eof()

    back = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        await client.send_all(payload)
        await client.send_eof()
        while chunk := await client.receive_some():
            back += chunk
    assert bytes(back) == payload
