"""Which address a redirected connection was meant for, asked of the kernel.

One call for every way of capture: nftables REDIRECT answers SO_ORIGINAL_DST from conntrack, the eBPF programs answer the same option,
and a connection that was not translated at all is its own original destination.
"""

from __future__ import annotations

import socket
import struct

from core.addrs import Addr, OriginalDst, from_sockaddr

_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h
_IP6T_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv6/ip6_tables.h
_SOCKADDR_IN = 16
_SOCKADDR_IN6 = 28


def original_dst(sock: socket.socket) -> OriginalDst:
    """The dialled address of an accepted connection, IPv4 (also on a dual-stack listener) or IPv6."""
    local = from_sockaddr(sock.getsockname())
    try:
        if ":" in local.ip:
            raw = sock.getsockopt(socket.IPPROTO_IPV6, _IP6T_SO_ORIGINAL_DST, _SOCKADDR_IN6)
            return OriginalDst(_parse_in6(raw))
        raw = sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, _SOCKADDR_IN)
        return OriginalDst(_parse_in(raw))
    except OSError:
        return OriginalDst(local)  # ENOENT, ENOPROTOOPT: nobody translated this connection


def _parse_in(raw: bytes) -> Addr:
    port, ip = struct.unpack("!2xH4s", raw[:8])
    return Addr(socket.inet_ntop(socket.AF_INET, ip), port)


def _parse_in6(raw: bytes) -> Addr:
    port, ip = struct.unpack("!2xH4x16s", raw[:24])
    return from_sockaddr((socket.inet_ntop(socket.AF_INET6, ip), port))
