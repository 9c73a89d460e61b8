"""Ports for programs that must be told theirs before they listen, or after they stopped.

Port 0 is no answer there: between the kernel's choice and the second bind the port is free again, and it lies in the range from which
the kernel takes the source ports of outgoing connections. Sooner or later one of those has it. These ports lie outside of that range.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_FIRST, _LAST = 10_000, 65_535
_APART = 97  # how far processes that run beside each other begin from one another


def _candidates() -> Iterator[int]:
    """Round and round through the ports that the kernel gives to nobody by itself."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [*range(_FIRST, low), *range(max(_FIRST, high + 1), _LAST + 1)]
    assert ports, "net.ipv4.ip_local_port_range leaves no port to listen on: narrow it, e.g. to 32768 60999"
    begin = os.getpid() * _APART % len(ports)
    return itertools.cycle(ports[begin:] + ports[:begin])


_next = _candidates()


def unused_port() -> int:
    """A TCP port, unused on every address of this machine, that this process has not given out before."""
    while True:
        port = next(_next)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            if not socket.has_dualstack_ipv6():
                return port
            with socket.create_server(("::", port), family=socket.AF_INET6):
                return port
