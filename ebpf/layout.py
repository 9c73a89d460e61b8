"""What lies in the programs' maps, byte by byte, and which programs there are: the Python side of ``bpf/mesh.h``. Pure.

Read by the loader (which programs, which maps), by ``attach`` and by the agent (what to write for a pod, what the counters say). Whoever
changes a struct in mesh.h changes it here and raises VERSION: two versions never share maps. A test compares sizes with the kernel's.

Everything is native byte order except addresses and ports inside :func:`pack_pod`'s addresses, which are network order. A "cookie" is a
network namespace's (``bpfsys.netns_cookie``), an unsigned 64-bit number that the running kernel never gives out twice.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple

VERSION = "1"
"""The layout's version, and the name of its folder among the pins."""

OWN_MAX = 4
PODS_MAX = 1024
PAIRS_MAX = 16384
SOCKS_MAX = 65536
QUEUE_LIMIT = 2 << 20
"""Bytes that a reader may leave unread before its writer's next message goes by TCP, whose window then stops the writer."""


class PodFlag(IntFlag):
    """What the programs do for one pod."""

    CAPTURE = 1  # connect() leads to the sidecar
    ACCELERATE = 2  # hops between app and sidecar skip TCP
    TRANSLATED = 4  # nftables captures here: pair what connects anywhere, rewrite nothing
    CALLER = 8  # the sidecar may say who calls
    RESUME = 16  # the app never reads with MSG_WAITALL: bulk to blocking readers returns to the short way sooner; others would hang
    REFUSE = 32  # nothing leaves and nothing comes in, because no way of capture works here
    ONE_WAY = 64  # what the app reads goes by TCP: FIONREAD would not tell it of anything else


class PortKind(IntEnum):
    """Sets of ports of one pod."""

    SKIP_OUTBOUND = 0
    SKIP_INBOUND = 1
    NOT_ACCELERATED = 2


class Counter(IntEnum):
    """Counters of one pod. messages, bytes: redirected past TCP. by_tcp_*: messages of marked connections that took TCP, by cause.

    by_tcp_full counts connections (no room in the map of sockets), the other three count messages.
    """

    CAPTURED = 0
    PAIRED = 1
    ACCELERATED = 2
    MESSAGES = 3
    BYTES = 4
    BY_TCP_ORDER = 5
    BY_TCP_MEMORY = 6
    BY_TCP_UNPAIRED = 7
    BY_TCP_FULL = 8
    STEERED = 9
    REFUSED_INBOUND = 10
    REFUSED_OUTBOUND = 11
    CALLERS = 12
    REFUSED_CALLERS = 13
    REFUSED_SOCKETS = 14
    ORIGINAL_DST = 15


class Program(NamedTuple):
    """name: of the C function and of the pin. prog_type, attach_type: enum bpf_prog_type, enum bpf_attach_type (linux/bpf.h)."""

    name: str
    source: str
    prog_type: int
    attach_type: int
    expected: bool  # whether the attach type is declared at load
    target: str  # cgroup: a link to the pod's cgroup; netns: a link to its namespace, loaded anew for each pod; sockets: the map of sockets


_SOCK, _SOCK_OPS, _SK_MSG, _SOCK_ADDR, _SOCKOPT, _SK_LOOKUP = 9, 13, 16, 18, 25, 30

PROGRAMS: tuple[Program, ...] = (
    Program("connect4", "connect.bpf.c", _SOCK_ADDR, 10, True, "cgroup"),
    Program("connect6", "connect.bpf.c", _SOCK_ADDR, 11, True, "cgroup"),
    Program("sockets", "sockets.bpf.c", _SOCK, 2, True, "cgroup"),
    Program("getpeername4", "peername.bpf.c", _SOCK_ADDR, 29, True, "cgroup"),
    Program("getpeername6", "peername.bpf.c", _SOCK_ADDR, 30, True, "cgroup"),
    Program("getsockname4", "peername.bpf.c", _SOCK_ADDR, 31, True, "cgroup"),
    Program("getsockname6", "peername.bpf.c", _SOCK_ADDR, 32, True, "cgroup"),
    Program("getsockopt", "sockopt.bpf.c", _SOCKOPT, 21, True, "cgroup"),
    Program("setsockopt", "sockopt.bpf.c", _SOCKOPT, 22, True, "cgroup"),
    Program("sockops", "sockops.bpf.c", _SOCK_OPS, 3, False, "cgroup"),
    Program("redirect", "redirect.bpf.c", _SK_MSG, 7, False, "sockets"),
    Program("inbound", "inbound.bpf.c", _SK_LOOKUP, 36, True, "netns"),
)
CGROUP_PROGRAMS: tuple[Program, ...] = tuple(program for program in PROGRAMS if program.target == "cgroup")

INBOUND_CODE = "inbound_code"
"""The map that keeps the bytecode of ``inbound``: one value, its length (u64) and then the instructions."""
INBOUND_CODE_BYTES = 8 + 8 * 1024
COOKIE_PLACEHOLDER = 0x50494C4C494F4E21
"""The constant in ``inbound``'s bytecode that becomes a pod's cookie."""

_POD = struct.Struct("=IIII16s64s")
_PORT_SET_KEY = struct.Struct("=QII")
_LISTENER_KEY = struct.Struct("=QII")
_COUNTERS = struct.Struct(f"={len(Counter)}Q")
PORT_SET_BYTES = 8192
POD_BYTES = _POD.size
COUNTERS_BYTES = _COUNTERS.size

MAPS: dict[str, tuple[int, int]] = {
    "pods": (8, POD_BYTES),
    "counters": (8, COUNTERS_BYTES),
    "port_sets": (_PORT_SET_KEY.size, PORT_SET_BYTES),
    "listeners": (_LISTENER_KEY.size, 8),
    "pairs": (16, 64),
    "flows": (4, 80),
    "socks": (24, 4),
}
"""Size of key and value of every map that the programs share, as the kernel reports them."""


class Pod(NamedTuple):
    """One pod as the programs see it. uid: the sidecar's, as the initial user namespace counts. ips: its own, at most OWN_MAX a family."""

    uid: int
    flags: PodFlag
    out_port: int
    in_port: int
    ips: tuple[str, ...] = ()


def pack_cookie(cookie: int) -> bytes:
    """The key in ``pods`` and ``counters``."""
    return struct.pack("=Q", cookie)


def unpack_cookie(key: bytes) -> int:
    """The opposite of :func:`pack_cookie`, also for longer keys that begin with a cookie."""
    cookie: int = struct.unpack_from("=Q", key)[0]
    return cookie


def pack_pod(pod: Pod) -> bytes:
    """The value in ``pods``; raises ValueError for more addresses than there is room for."""
    ips = [ipaddress.ip_address(ip) for ip in pod.ips]
    own4 = [ip.packed for ip in ips if ip.version == 4]
    own6 = [ip.packed for ip in ips if ip.version == 6]
    if len(own4) > OWN_MAX or len(own6) > OWN_MAX:
        raise ValueError(f"a pod has at most {OWN_MAX} addresses of a family, got {', '.join(pod.ips)}")
    own4 += [bytes((127, 0, 0, 1))] * (OWN_MAX - len(own4))
    own6 += [bytes(15) + b"\1"] * (OWN_MAX - len(own6))
    return _POD.pack(pod.uid, pod.flags, pod.out_port, pod.in_port, b"".join(own4), b"".join(own6))


def unpack_pod(value: bytes) -> Pod:
    """The opposite of :func:`pack_pod`."""
    uid, flags, out_port, in_port, own4, own6 = _POD.unpack(value)
    ips = [ipaddress.ip_address(own4[at : at + 4]) for at in range(0, 4 * OWN_MAX, 4)]
    more = [ipaddress.ip_address(own6[at : at + 16]) for at in range(0, 16 * OWN_MAX, 16)]
    return Pod(uid, PodFlag(flags), out_port, in_port, tuple(str(ip) for ip in (*ips, *more) if not ip.is_loopback))


def pack_port_set_key(cookie: int, kind: PortKind) -> bytes:
    """The key in ``port_sets``."""
    return _PORT_SET_KEY.pack(cookie, kind, 0)


def pack_port_set(ranges: Iterable[tuple[int, int]]) -> bytes:
    """The value in ``port_sets``: one bit a port, from inclusive ranges; raises ValueError for what is no port."""
    bits = bytearray(PORT_SET_BYTES)
    for low, high in ranges:
        if not 0 < low <= high < 65536:
            raise ValueError(f"{low}-{high} is no range of ports")
        for port in range(low, high + 1):
            bits[port >> 3] |= 1 << (port & 7)
    return bytes(bits)


def pack_listener_key(cookie: int, *, only_v6: bool = False) -> bytes:
    """The key in ``listeners``; the value is the socket's descriptor as an u64 (the kernel keeps the socket, not the number)."""
    return _LISTENER_KEY.pack(cookie, 10 if only_v6 else 2, 0)


def unpack_counters(per_cpu: Sequence[bytes]) -> dict[Counter, int]:
    """The value in ``counters``, one for every possible processor, added up."""
    sums = [sum(column) for column in zip(*(_COUNTERS.unpack(value) for value in per_cpu), strict=True)]
    return dict(zip(Counter, sums, strict=True))


def zero_counters() -> bytes:
    """What a new pod starts with, for one processor."""
    return bytes(COUNTERS_BYTES)


def relocate_maps(code: bytes, numbers: Mapping[int, int]) -> bytes:
    """Bytecode with other numbers for its maps: 64-bit loads of a map (src_reg 1) whose immediate is a key of ``numbers``.

    The loader turns bcc's descriptors into indices into MAPS, and whoever loads the code turns these into descriptors of its own process.
    Raises KeyError for a map that is not listed.
    """
    patched = bytearray(code)
    for at in range(0, len(code), 8):
        if code[at] == 0x18 and code[at + 1] >> 4 == 1:
            patched[at + 4 : at + 8] = struct.pack("=i", numbers[struct.unpack_from("=i", code, at + 4)[0]])
    return bytes(patched)


def relocate_cookie(code: bytes, cookie: int) -> bytes:
    """``inbound``'s bytecode for one pod: the placeholder (a 64-bit load, immediate in two halves) becomes the cookie.

    Raises ValueError unless it is there exactly once.
    """
    low, high = struct.pack("=I", COOKIE_PLACEHOLDER & 0xFFFFFFFF), struct.pack("=I", COOKIE_PLACEHOLDER >> 32)
    found = [
        at for at in range(0, len(code) - 8, 8) if code[at] == 0x18 and code[at + 4 : at + 8] == low and code[at + 12 : at + 16] == high
    ]
    if len(found) != 1:
        raise ValueError(f"inbound's bytecode has {len(found)} placeholders for the namespace cookie, expected one")
    at = found[0]
    patched = bytearray(code)
    patched[at + 4 : at + 8] = struct.pack("=I", cookie & 0xFFFFFFFF)
    patched[at + 12 : at + 16] = struct.pack("=I", cookie >> 32)
    return bytes(patched)
