"""What two proxies agreed on in their TLS handshake, read off the wire: the cipher suite and the group of the key exchange.

Nobody's word is taken for it: the page says what each contestant negotiated, and a reader can judge whose handshakes are dearer.
Called by `bench.scenarios`; the parsing is pure.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

from bench.stage import Pod

SUITES = {0x1301: "AES-128-GCM", 0x1302: "AES-256-GCM", 0x1303: "ChaCha20-Poly1305"}
GROUPS = {0x0017: "P-256", 0x0018: "P-384", 0x001D: "X25519", 0x11EC: "X25519MLKEM768"}
_ETH_P_ALL, _IPPROTO_TCP = 3, 6
_KEY_SHARE = 51
# RFC 8446 4.1.3: a ServerHello with this random asks the client to try again with another group.
_RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


@contextlib.contextmanager
def listening(pod: Pod) -> Iterator[list[str]]:
    """Yields a list that, once the block ends, says what every handshake seen at the pod's link meanwhile agreed on, in order."""
    agreed: list[str] = []
    with pod.inside():
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    with wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        wire.bind(("eth0", _ETH_P_ALL))
        wire.setblocking(False)
        yield agreed
        with contextlib.suppress(BlockingIOError):
            while packet := wire.recv(65_536):
                if found := server_hello(tcp_payload(packet)):
                    agreed.append(found)


def tcp_payload(packet: bytes) -> bytes:
    """What a TCP segment over IPv4 carries; empty for everything else."""
    if len(packet) < 40 or packet[0] >> 4 != 4 or packet[9] != _IPPROTO_TCP:
        return b""
    head = (packet[0] & 15) * 4
    return packet[head + (packet[head + 12] >> 4) * 4 : int.from_bytes(packet[2:4], "big")]


def server_hello(data: bytes) -> str:
    """Suite and group when a TLS 1.3 ServerHello begins here, else empty; one that only asks for another group is none."""
    # record: type 22, version, length; handshake: type 2, length; version, random, session id, suite, compression, extensions
    if len(data) < 44 or data[0] != 22 or data[5] != 2 or data[11:43] == _RETRY:
        return ""
    with contextlib.suppress(struct.error):  # cut off
        return _suite_and_group(data, 44 + data[43])
    return ""


def _suite_and_group(data: bytes, at: int) -> str:
    suite, _, length = struct.unpack_from("!HBH", data, at)
    at += 5
    end = at + length
    while at < end:
        kind, length = struct.unpack_from("!HH", data, at)
        if kind == _KEY_SHARE:
            (group,) = struct.unpack_from("!H", data, at + 4)
            return f"{SUITES.get(suite, hex(suite))} and {GROUPS.get(group, hex(group))}"
        at += 4 + length
    return ""
