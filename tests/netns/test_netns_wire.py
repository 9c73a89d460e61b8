"""What a captor on the network between pods sees: TLS 1.3 and nothing of what was said. The same capture finds an unmeshed caller's."""

from __future__ import annotations

import secrets

import h2.connection
import pytest
from arena import HTTP, HTTP2, OPAQUE, PLAIN, Arena, Wire

pytestmark = [pytest.mark.netns, pytest.mark.slow]

# RFC 8446 4.1.3 and 4.2.1: handshake record, ServerHello, then its extension supported_versions with the one chosen, 1.3
SERVER_HELLO = b"\x16\x03\x03"
APPLICATION_DATA = b"\x17\x03\x03"
CHOSEN_1_3 = b"\x00\x2b\x00\x02\x03\x04"
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])


def test_an_unmeshed_callers_words_are_on_the_wire(arena: Arena) -> None:
    """Or the capture would prove nothing."""
    marker = secrets.token_hex(16)
    with Wire(arena) as wire:
        assert arena.ask("stranger", arena.ip("web"), PLAIN, f"/{marker}").status == 200
    assert marker.encode() in wire.bytes


@FAMILIES
@pytest.mark.parametrize("via", ["ip", "vip"])
def test_http1_between_meshed_pods_is_tls_1_3(arena: Arena, family: int, via: str) -> None:
    marker = secrets.token_hex(16)
    address = getattr(arena, via)("web", family)
    with Wire(arena) as wire:
        for port in (HTTP, PLAIN):
            reply = arena.ask("client", address, port, f"/{marker}", f"x-{marker}: {marker}", method="POST", body=marker.encode() * 100)
            assert reply.status == 200 and marker in str(reply.told)
    assert_secret(wire.bytes, marker.encode(), pooled=via == "vip")


def test_http2_between_meshed_pods_is_tls_1_3(arena: Arena) -> None:
    marker = secrets.token_hex(16)
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    fields = [(":method", "POST"), (":scheme", "http"), (":authority", "web"), (":path", "/x")]
    connection.send_headers(1, fields)
    connection.send_data(1, marker.encode() * 10, end_stream=True)
    with Wire(arena) as wire, arena.dial("client", arena.ip("web"), HTTP2) as sock:
        sock.sendall(connection.data_to_send())
        received = b""
        while b'"fields"' not in received:
            received += sock.recv(1 << 16)
    assert_secret(wire.bytes, marker.encode())


@FAMILIES
def test_opaque_bytes_between_meshed_pods_are_tls_1_3(arena: Arena, family: int) -> None:
    marker = secrets.token_hex(16).encode()
    with Wire(arena) as wire, arena.dial("client", arena.vip("web", family), OPAQUE) as sock:
        for _ in range(5):
            sock.sendall(marker)
            assert sock.recv(100) == marker
    assert_secret(wire.bytes, marker)


def test_a_stateful_pod_of_a_headless_service_is_reached_by_tls(arena: Arena) -> None:
    marker = secrets.token_hex(16)
    with Wire(arena) as wire:
        found = arena.run("exec", "-n", "arena", "client", "--", "curl", "-sS", "-m", "30", f"http://db-0.db:8083/{marker}")
        assert marker in found.stdout
    assert_secret(wire.bytes, marker.encode())


def test_identities_and_tokens_are_not_in_clear_either(arena: Arena) -> None:
    """TLS 1.3 hides certificates; the name of the service account shows in SNI only."""
    with Wire(arena) as wire:
        assert arena.ask("client", arena.ip("db-1"), PLAIN).status == 200
    assert b"spiffe://" not in wire.bytes and b"pillion-client-id" not in wire.bytes
    assert b"db.arena.sa.pillion.cluster.local" in wire.bytes


def assert_secret(captured: bytes, marker: bytes, *, pooled: bool = False) -> None:
    """pooled: the connection between the sidecars may have been there before."""
    assert marker not in captured, "plaintext on the wire"
    assert APPLICATION_DATA in captured, "nothing was captured"
    assert pooled or (SERVER_HELLO in captured and CHOSEN_1_3 in captured), "no TLS 1.3 was spoken"
