"""The addresses that authorizations are for: networks and their exceptions, compiled for a look-up per client.

Pure. Called by policy.authorize. Text that is not a network holds no address, so that a mistake lets nobody in.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_right
from collections.abc import Iterable

from policy.wire import Network


class Networks:
    """Addresses as sorted, disjoint ranges of integers per IP version: one bisection instead of a walk over networks."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._starts: dict[int, list[int]] = {4: [], 6: []}
        self._ends: dict[int, list[int]] = {4: [], 6: []}
        ranges: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        for network in networks:
            for version, start, end in _ranges(network):
                ranges[version].append((start, end))
        for version, some in ranges.items():
            for start, end in sorted(some):
                if self._ends[version] and start <= self._ends[version][-1] + 1:
                    self._ends[version][-1] = max(end, self._ends[version][-1])
                else:
                    self._starts[version].append(start)
                    self._ends[version].append(end)

    def holds(self, version: int, address: int) -> bool:
        """Whether the address, an integer, is in one of the networks. version: 4 or 6."""
        at = bisect_right(self._starts[version], address) - 1
        return at >= 0 and address <= self._ends[version][at]


def _ranges(network: Network) -> list[tuple[int, int, int]]:
    """The parts of ``cidr`` outside ``excluded`` as (version, first, last); none when any of these texts is not a network."""
    try:
        whole = ipaddress.ip_network(network.cidr, strict=False)
        excluded = sorted((int(one[0]), int(one[-1])) for one in _same_version(whole.version, network.excluded))
    except ValueError:
        return []
    parts: list[tuple[int, int, int]] = []
    start, last = int(whole[0]), int(whole[-1])
    for first_out, last_out in excluded:
        if first_out > last:
            break
        if first_out > start:
            parts.append((whole.version, start, first_out - 1))
        start = max(start, last_out + 1)
    if start <= last:
        parts.append((whole.version, start, last))
    return parts


def _same_version(version: int, cidrs: Iterable[str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [one for one in (ipaddress.ip_network(cidr, strict=False) for cidr in cidrs) if one.version == version]
