"""Socket addresses that say whose they are, so that swapping two of them is a type error."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import NamedTuple, NewType


class Addr(NamedTuple):
    """An IP address in canonical text (IPv4-mapped IPv6 is folded to IPv4) and a port, 0 to 65535."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


ClientAddr = NewType("ClientAddr", Addr)  # who connected to us, as the kernel saw it
OriginalDst = NewType("OriginalDst", Addr)  # what the client dialled before the redirect
ListenAddr = NewType("ListenAddr", Addr)  # where we accept


class InvalidAddr(ValueError):
    """Text that is not ``ip:port``; the message repeats it."""


@lru_cache(maxsize=4096)  # a dual-stack listener asks three times for each connection
def canonical_ip(text: str) -> str:
    """``::ffff:10.0.0.1`` and ``10.0.0.1`` are the same host to every rule we have; raises InvalidAddr for anything but an IP."""
    try:
        ip = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        raise InvalidAddr(f"{text!r} is not an IP address") from None
    mapped = getattr(ip, "ipv4_mapped", None)
    return str(mapped or ip)


def parse_addr(text: str) -> Addr:
    """Read ``10.0.0.1:80`` or ``[fd00::1]:80``; raises InvalidAddr."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    a_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    if not colon or not a_port or (":" in host and not bracketed):
        raise InvalidAddr(f"{text!r}: expected IP:PORT, with an IPv6 address in brackets")
    return Addr(canonical_ip(host[1:-1] if bracketed else host), int(port))


def from_sockaddr(sockaddr: tuple[object, ...]) -> Addr:
    """The kernel's answer (``getpeername`` and friends, AF_INET or AF_INET6) as an Addr."""
    ip, port = sockaddr[0], sockaddr[1]
    if not isinstance(ip, str) or not isinstance(port, int):
        raise InvalidAddr(f"{sockaddr!r} is not an AF_INET or AF_INET6 address")
    return Addr(ip if ":" not in ip else canonical_ip(ip), port)
