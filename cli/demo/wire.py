"""From captured packets to TCP streams, and whether those are TLS 1.3 and nothing else. Pure; called by cli.demo.evidence.

Written against RFC 9293 (TCP) and RFC 8446 (TLS 1.3), apart from the code that it checks: a mistake in Pillion's own TLS code must not
excuse itself here.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_TCP = 6
_FIN, _SYN = 0x01, 0x02
_IPV4_MORE_OR_OFFSET = 0x3FFF

_HANDSHAKE, _APPLICATION_DATA, _CHANGE_CIPHER_SPEC, _ALERT = 22, 23, 20, 21
_CLIENT_HELLO, _SERVER_HELLO = 1, 2
_SUPPORTED_VERSIONS = 43
_TLS13 = 0x0304
_RECORD_BYTES_MAX = (1 << 14) + 256  # RFC 8446 section 5.2

PCAP_RAW_HEADER = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 101)
"""Head of a capture file whose packets begin with their IP header (LINKTYPE_RAW)."""
PCAP_PACKET = struct.Struct("=IIII")
"""Seconds, microseconds, captured and original length."""

End = tuple[str, int]
"""IP address and port."""


class NotTls13(ValueError):
    """These bytes are not, or not only, TLS 1.3; the text says from where on."""


@dataclass(frozen=True)
class Segment:
    """A TCP segment. payload is empty for most SYN and FIN."""

    src: End
    dst: End
    seq: int
    syn: bool
    fin: bool
    payload: bytes


def read_packet_untrusted(packet: bytes) -> Segment | None:
    """The TCP segment of an IPv4 or IPv6 packet, None for anything else (fragments and extension headers included)."""
    if len(packet) < 40:
        return None
    if packet[0] >> 4 == 4:
        header = (packet[0] & 15) * 4
        total = int.from_bytes(packet[2:4], "big")
        if packet[9] != _TCP or int.from_bytes(packet[6:8], "big") & _IPV4_MORE_OR_OFFSET:
            return None
        src, dst = str(ipaddress.IPv4Address(packet[12:16])), str(ipaddress.IPv4Address(packet[16:20]))
        tcp = packet[header : total or None]
    elif packet[0] >> 4 == 6 and packet[6] == _TCP:
        src, dst = str(ipaddress.IPv6Address(packet[8:24])), str(ipaddress.IPv6Address(packet[24:40]))
        tcp = packet[40 : 40 + (int.from_bytes(packet[4:6], "big") or len(packet))]
    else:
        return None
    if len(tcp) < 20 or (data := (tcp[12] >> 4) * 4) < 20:
        return None
    sport, dport, seq = struct.unpack_from("!HHI", tcp)
    return Segment((src, sport), (dst, dport), seq, bool(tcp[13] & _SYN), bool(tcp[13] & _FIN), tcp[data:])


def read_pcap_untrusted(data: bytes) -> Iterator[bytes]:
    """Packets of a capture file as `PCAP_RAW_HEADER` begins it; a cut-off last packet is left out."""
    position = len(PCAP_RAW_HEADER)
    while position + PCAP_PACKET.size <= len(data):
        size = PCAP_PACKET.unpack_from(data, position)[2]
        position += PCAP_PACKET.size
        if position + size > len(data):
            return
        yield data[position : position + size]
        position += size


@dataclass
class Flow:
    """One direction of a connection. first: sequence number of its SYN, None when the capture began later."""

    first: int | None = None
    pieces: dict[int, bytes] = field(default_factory=dict)

    def take(self, segment: Segment) -> None:
        """Keep the payload; what was seen before (on another link, or sent again) changes nothing."""
        if self.first is None:
            self.first = segment.seq - 1 if not segment.syn else segment.seq
        offset = (segment.seq + segment.syn - self.first - 1) & 0xFFFFFFFF
        if segment.payload and len(segment.payload) > len(self.pieces.get(offset, b"")):
            self.pieces[offset] = segment.payload

    def data(self) -> tuple[bytes, bool]:
        """(bytes in order from the first on, whether that is everything that was captured)."""
        joined = bytearray()
        for offset in sorted(self.pieces):
            piece = self.pieces[offset]
            if offset > len(joined):
                return bytes(joined), False
            joined += piece[len(joined) - offset :]
        return bytes(joined), True


@dataclass
class Connection:
    """Both directions. whole: the capture has it from its first SYN on."""

    client: End
    server: End
    whole: bool
    sent: Flow = field(default_factory=Flow)
    received: Flow = field(default_factory=Flow)


def connections(packets: Iterable[bytes]) -> list[Connection]:
    """Every TCP connection of a capture, each packet in it any number of times."""
    found: list[Connection] = []
    current: dict[tuple[End, End], Connection] = {}
    for packet in packets:
        segment = read_packet_untrusted(packet)
        if segment is None:
            continue
        forward, backward = (segment.src, segment.dst), (segment.dst, segment.src)
        known = current.get(forward) or current.get(backward)
        opens = segment.syn and (known is None or (known.client == segment.src and known.sent.first != segment.seq))
        if known is None or opens:
            current.pop(backward, None)
            known = current[forward] = Connection(segment.src, segment.dst, segment.syn)
            found.append(known)
        (known.sent if known.client == segment.src else known.received).take(segment)
    return found


def tls_records_untrusted(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(content type, fragment) of every whole record; raises NotTls13 at bytes that are none. The last one may be cut off."""
    position = 0
    while position + 5 <= len(data):
        kind, version, size = struct.unpack_from("!BHH", data, position)
        if kind not in (_HANDSHAKE, _APPLICATION_DATA, _CHANGE_CIPHER_SPEC, _ALERT) or version not in (0x0301, 0x0303):
            raise NotTls13(f"no TLS record at byte {position}: {data[position : position + 16]!r}")
        if size > _RECORD_BYTES_MAX:
            raise NotTls13(f"a record of {size} bytes at byte {position}")
        if position + 5 + size > len(data):
            return
        yield kind, data[position + 5 : position + 5 + size]
        position += 5 + size


def check_tls13_untrusted(sent: bytes, received: bytes) -> None:
    """Both directions are TLS 1.3 as far as they go: a ClientHello, a ServerHello that chose 1.3, then only encrypted records.

    Alerts in the clear are accepted before encryption begins (a refused handshake carries nothing of the app). Raises NotTls13.
    """
    _check_direction(sent, _CLIENT_HELLO, "the client")
    hello = _check_direction(received, _SERVER_HELLO, "the server")
    if hello and selected_version_untrusted(hello) != _TLS13:
        raise NotTls13(f"the ServerHello chose version {selected_version_untrusted(hello):#06x}")


def _check_direction(data: bytes, first: int, who: str) -> bytes:
    """The hello message; empty when nothing, or only an alert, was said."""
    hello, encrypted = b"", False
    for kind, fragment in tls_records_untrusted(data):
        if kind == _APPLICATION_DATA:
            if not hello:
                raise NotTls13(f"{who} sent encrypted data before its hello")
            encrypted = True
        elif kind == _HANDSHAKE:
            if encrypted or not fragment or fragment[0] != first:
                raise NotTls13(
                    f"{who} sent handshake message {fragment[:1].hex() or 'none'} in the clear, which only an older version does"
                )
            hello = hello or fragment
        elif kind == _ALERT and encrypted:
            raise NotTls13(f"{who} sent an alert in the clear after encryption began")
    return hello


def selected_version_untrusted(server_hello: bytes) -> int:
    """What the ServerHello's ``supported_versions`` says (RFC 8446 section 4.2.1), else its legacy version; 0 when it cannot be read."""
    try:
        legacy = int.from_bytes(server_hello[4:6], "big")
        position = 4 + 2 + 32
        position += 1 + server_hello[position] + 2 + 1  # session id, cipher suite, compression
        end = position + 2 + int.from_bytes(server_hello[position : position + 2], "big")
        position += 2
        while position + 4 <= min(end, len(server_hello)):
            kind, size = struct.unpack_from("!HH", server_hello, position)
            if kind == _SUPPORTED_VERSIONS and size == 2:
                return int.from_bytes(server_hello[position + 4 : position + 6], "big")
            position += 4 + size
    except IndexError:
        return 0
    return legacy
