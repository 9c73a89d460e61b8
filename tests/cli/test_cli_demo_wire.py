"""The demo's proof from packets: streams put together again, TLS 1.3 recognised, everything else refused."""

from __future__ import annotations

import random
import ssl
import struct

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from cli.demo import wire
from cli.demo.evidence import read_paths
from core.names import parse_workload_id
from tests.certs import Authority

CLIENT, SERVER = ("10.142.0.10", 40000), ("10.142.0.11", 8080)
PODS = {"10.142.0.10": "web", "10.142.0.11": "cart"}
SYN, FIN = 2, 1
WEB = parse_workload_id("spiffe://cluster.local/ns/shop/sa/web")


def tcp(src: wire.End, dst: wire.End, seq: int, payload: bytes = b"", flags: int = 16) -> bytes:
    """An IPv4 packet (IPv6 when the addresses are)."""
    import ipaddress

    segment = struct.pack("!HHIIBBHHH", src[1], dst[1], seq & 0xFFFFFFFF, 0, 5 << 4, flags, 1000, 0, 0) + payload
    ends = ipaddress.ip_address(src[0]).packed + ipaddress.ip_address(dst[0]).packed
    if ":" in src[0]:
        return struct.pack("!IHBB", 6 << 28, len(segment), 6, 64) + ends + segment
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, 6, 0) + ends + segment


def conversation(sent: bytes, received: bytes, first: int = 7, size: int = 100) -> list[bytes]:
    """The packets of a connection that carries these bytes."""
    packets = [tcp(CLIENT, SERVER, first, flags=SYN), tcp(SERVER, CLIENT, first + 9, flags=SYN | 16)]
    packets += [tcp(CLIENT, SERVER, first + 1 + at, sent[at : at + size]) for at in range(0, len(sent), size)]
    packets += [tcp(SERVER, CLIENT, first + 10 + at, received[at : at + size]) for at in range(0, len(received), size)]
    return packets


def pcap(packets: list[bytes]) -> bytes:
    return wire.PCAP_RAW_HEADER + b"".join(wire.PCAP_PACKET.pack(0, 0, len(packet), len(packet)) + packet for packet in packets)


def tls(tmp_path, version: ssl.TLSVersion, message: bytes) -> tuple[bytes, bytes]:
    """What both sides of a real handshake and one message sent."""
    credentials = Authority("root").credentials(WEB, names=[x509.DNSName("cart")])
    (tmp_path / "cert").write_bytes(credentials.chain_pem)
    (tmp_path / "key").write_bytes(credentials.key_pem)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    client_context.maximum_version = version
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    sent, received = b"", b""
    incoming_client, incoming_server = to_client, to_server
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            for pipe, is_sent in ((incoming_server, True), (incoming_client, False)):
                data = pipe.read()
                pipe.write(data)
                if is_sent and side is client:
                    sent += data
                elif not is_sent and side is server:
                    received += data
    client.write(message)
    sent += incoming_server.read()
    return sent, received


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_is_put_together_from_packets_in_any_order_and_number(shuffle: bool) -> None:
    sent, received = bytes(range(256)) * 5, b"answer" * 100
    *opening, first = conversation(sent, received, first=0xFFFFFFF0)[:3]  # the numbers wrap
    rest = [first, *conversation(sent, received, first=0xFFFFFFF0)[3:]]
    rest = [*rest, *rest]
    if shuffle:
        random.Random(1).shuffle(rest)
    (found,) = wire.connections([*opening, *opening, *rest])
    assert (found.client, found.server, found.whole) == (CLIENT, SERVER, True)
    assert found.sent.data() == (sent, True)
    assert found.received.data() == (received, True)


def test_a_lost_packet_is_noticed() -> None:
    packets = conversation(b"x" * 500, b"")
    del packets[4]
    (found,) = wire.connections(packets)
    assert found.sent.data() == (b"x" * 200, False)


def test_a_port_that_is_used_again_is_another_connection() -> None:
    first, second = wire.connections([*conversation(b"one", b"1"), *conversation(b"two", b"2", first=5000)])
    assert (first.sent.data()[0], second.sent.data()[0], second.received.data()[0]) == (b"one", b"two", b"2")


def test_ipv6_is_read_and_udp_is_not() -> None:
    six = wire.read_packet_untrusted(tcp(("fd42::a", 1), ("fd42::b", 2), 3, b"hi"))
    assert six == wire.Segment(("fd42::a", 1), ("fd42::b", 2), 3, False, False, b"hi")
    udp = bytearray(tcp(CLIENT, SERVER, 1))
    udp[9] = 17
    assert wire.read_packet_untrusted(bytes(udp)) is None


def test_tls_13_is_recognised_by_the_servers_choice(tmp_path) -> None:
    sent, received = tls(tmp_path, ssl.TLSVersion.TLSv1_3, b"note")
    wire.check_tls13_untrusted(sent, received)
    (path,) = read_paths(pcap(conversation(sent, received)), PODS, b"note")
    assert (path.client, path.server, path.port, path.count, path.encrypted, path.marked) == ("web", "cart", 8080, 1, 1, 0)


def test_tls_12_is_refused(tmp_path) -> None:
    sent, received = tls(tmp_path, ssl.TLSVersion.TLSv1_2, b"note")
    with pytest.raises(wire.NotTls13):
        wire.check_tls13_untrusted(sent, received)


@pytest.mark.parametrize("where", ["sent", "received"])
def test_one_plaintext_byte_after_the_handshake_is_found(tmp_path, where: str) -> None:
    sent, received = tls(tmp_path, ssl.TLSVersion.TLSv1_3, b"note")
    sent, received = (sent + b"GET / note", received) if where == "sent" else (sent, received + b"HTTP/1.1 note")
    with pytest.raises(wire.NotTls13):
        wire.check_tls13_untrusted(sent, received)
    (path,) = read_paths(pcap(conversation(sent, received)), PODS, b"note")
    assert (path.encrypted, path.marked, len(path.problems)) == (0, 1, 1)


def test_plaintext_is_refused_and_shown() -> None:
    (path,) = read_paths(pcap(conversation(b"GET / HTTP/1.1\r\nx-note: 17", b"HTTP/1.1 200 OK")), PODS, b"17")
    assert (path.encrypted, path.marked, path.excerpt) == (0, 1, "GET / HTTP/1.1\r\nx-note: 17")


def test_a_connection_whose_beginning_is_missing_proves_nothing(tmp_path) -> None:
    sent, received = tls(tmp_path, ssl.TLSVersion.TLSv1_3, b"note")
    (path,) = read_paths(pcap(conversation(sent, received)[2:]), PODS, b"note")
    assert path.encrypted == 0 and "beginning" in path.problems[0]


def test_connections_of_the_node_are_not_between_pods() -> None:
    assert read_paths(pcap(conversation(b"GET", b"")), {"10.142.0.11": "cart"}, b"note") == []


@given(st.binary(max_size=400))
def test_any_packet_is_a_segment_or_nothing(data: bytes) -> None:
    found = wire.read_packet_untrusted(data)
    assert found is None or found.payload in data


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_bytes_pass_as_tls_13_or_are_refused(sent: bytes, received: bytes) -> None:
    try:
        wire.check_tls13_untrusted(sent, received)
    except wire.NotTls13:
        return
    assert all(not data or len(data) < 5 or data[0] in (20, 21, 22, 23) for data in (sent, received))


@given(st.binary(max_size=200))
def test_any_server_hello_has_a_version_or_none(data: bytes) -> None:
    assert 0 <= wire.selected_version_untrusted(data) <= 0xFFFF


@given(st.binary(max_size=300))
def test_any_capture_file_is_read_without_an_error(data: bytes) -> None:
    wire.connections(wire.read_pcap_untrusted(data))
