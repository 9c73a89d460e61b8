"""Which suite and group two peers agreed on, as the wire shows it."""

from __future__ import annotations

import ssl
import struct

import pytest

from bench import certs
from bench.handshake import server_hello, tcp_payload

RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


def hello(suite: int, *extensions: tuple[int, bytes], random: bytes = bytes(32), session: bytes = bytes(32)) -> bytes:
    """A ServerHello in its record."""
    listed = b"".join(struct.pack("!HH", kind, len(data)) + data for kind, data in extensions)
    body = b"\x03\x03" + random + bytes([len(session)]) + session + struct.pack("!HBH", suite, 0, len(listed)) + listed
    message = b"\x02" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x03" + struct.pack("!H", len(message)) + message


def key_share(group: int, length: int = 32) -> tuple[int, bytes]:
    return 51, struct.pack("!HH", group, length) + bytes(length)


VERSION = (43, b"\x03\x04")


@pytest.mark.parametrize(
    ("data", "agreed"),
    [
        (hello(0x1301, VERSION, key_share(0x11EC, 1120)), "AES-128-GCM and X25519MLKEM768"),
        (hello(0x1302, key_share(0x001D), VERSION), "AES-256-GCM and X25519"),
        (hello(0x1301, key_share(0x0017, 65), session=b""), "AES-128-GCM and P-256"),
        (hello(0x13AA, key_share(0x9999)), "0x13aa and 0x9999"),
    ],
)
def test_suite_and_group_are_read_from_a_server_hello(data: bytes, agreed: str) -> None:
    assert server_hello(data) == agreed


def test_a_hello_cut_off_behind_the_group_is_enough() -> None:
    whole = hello(0x1301, VERSION, key_share(0x11EC, 1120))
    assert server_hello(whole[:200]) == "AES-128-GCM and X25519MLKEM768"


@pytest.mark.parametrize("length", range(93))
def test_a_hello_cut_off_before_the_group_says_nothing(length: int) -> None:
    assert server_hello(hello(0x1301, VERSION, key_share(0x001D))[:length]) == ""


def test_a_request_for_another_group_is_no_agreement() -> None:
    assert server_hello(hello(0x1301, VERSION, (51, b"\x00\x1d"), random=RETRY)) == ""


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n" * 10, b"\x17\x03\x03\x00\x40" + bytes(64), b"\x16" * 200])
def test_what_is_no_server_hello_says_nothing(data: bytes) -> None:
    assert server_hello(data) == ""


def segment(payload: bytes, *, options: bytes = b"") -> bytes:
    """An IPv4 packet with a TCP segment."""
    tcp = struct.pack("!HHIIBBHHH", 4143, 40000, 1, 1, (5 + len(options) // 4) << 4, 0x18, 64, 0, 0) + options + payload
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, bytes(4), bytes(4)) + tcp


def test_the_payload_of_a_segment_stands_behind_its_options_and_before_padding() -> None:
    assert tcp_payload(segment(b"hello", options=bytes(12)) + bytes(6)) == b"hello"
    assert tcp_payload(segment(b"")) == b""


def test_other_packets_carry_nothing() -> None:
    udp = bytearray(segment(b"hello"))
    udp[9] = 17
    assert tcp_payload(bytes(udp)) == b""
    assert tcp_payload(b"\x60" + bytes(60)) == b""


def test_a_real_handshake_is_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = certs.make(tmp_path_factory.mktemp("certs"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.chain("server"), made.key("server"))
    server.set_ecdh_curve("prime256v1")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(made.ca)
    client.set_ecdh_curve("prime256v1")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking, answering = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    with pytest.raises(ssl.SSLWantReadError):
        asking.do_handshake()
    with pytest.raises(ssl.SSLWantReadError):
        answering.do_handshake()
    assert server_hello(down.read()).endswith(" and P-256")
