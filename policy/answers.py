"""From answers of the index to the lines that carry them: encoded once for all subscribers, and never longer than a sidecar reads.

Called by policy.subscriptions.
"""

from __future__ import annotations

import msgspec

from core.addrs import parse_addr
from core.runtime import logs
from policy import wire
from policy.index import Index
from policy.match import excess

_log = logs.logger("policy")


def encoded_policy(port: int, policy: wire.InboundPolicy) -> bytes:
    """The line for a port. A policy too long for any sidecar becomes a denial, because it cannot be shortened without changing it."""
    line = wire.encode(wire.PortPolicy(port, policy))
    if len(line) <= wire.MAX_LINE_BYTES:
        return line
    _log.error("policy too large, everything is denied", server=str(policy.server), size_bytes=len(line), limit=wire.MAX_LINE_BYTES)
    return wire.encode(wire.PortPolicy(port, wire.InboundPolicy(policy.server, policy.protocol, ())))


def encoded_destination(addr: str, destination: wire.Destination) -> bytes:
    """The line for an address, with as many of the endpoints as a sidecar reads: half of a very large Service still serves.

    Routes cannot be shortened without changing them. If they are too long by themselves, or cost each request too much, nothing is sent to
    the address.
    """
    if much := excess(rule for route in destination.routes for rule in route.rules):
        _log.error("too costly routes, nothing is sent there", service=str(destination.ref), reason=much)
        return _refusal(addr, destination)
    line = wire.encode(wire.AddressDestination(addr, destination))
    while len(line) > wire.MAX_LINE_BYTES:
        shorter = _with_half_of_the_endpoints(destination)
        service, before, kept = str(destination.ref), _count(destination), _count(shorter)
        if kept == before:
            _log.error("routes too large, nothing is sent there", service=service, size_bytes=len(line), limit=wire.MAX_LINE_BYTES)
            return _refusal(addr, destination)
        _log.warning("too many endpoints, some are left out", service=service, kept=kept, of=before)
        destination = shorter
        line = wire.encode(wire.AddressDestination(addr, destination))
    return line


def _refusal(addr: str, destination: wire.Destination) -> bytes:
    return wire.encode(wire.AddressDestination(addr, wire.Destination(destination.kind, destination.ref, destination.protocol)))


def _with_half_of_the_endpoints(destination: wire.Destination) -> wire.Destination:
    """Of the Service and of each backend that has several."""
    backends = tuple(msgspec.structs.replace(backend, endpoints=_half(backend.endpoints)) for backend in destination.backends)
    return msgspec.structs.replace(destination, endpoints=_half(destination.endpoints), backends=backends)


def _half(endpoints: tuple[wire.Endpoint, ...]) -> tuple[wire.Endpoint, ...]:
    return endpoints[: (len(endpoints) + 1) // 2]


def _count(destination: wire.Destination) -> int:
    return len(destination.endpoints) + sum(len(backend.endpoints) for backend in destination.backends)


Answer = tuple[wire.Destination, bytes]


class Answers:
    """What is said about addresses. While a state does not change its object stays the same, so that states compare by identity."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._known: dict[str, _Known] = {}

    def about(self, addr: str, namespace: str) -> Answer:
        """For a client in ``namespace``."""
        known = self._known.get(addr)
        if known is None:
            known = self._known[addr] = _Known(parse_addr(addr).ip)
        scope = self._index.scope(known.ip, namespace)
        answer = known.fresh.get(scope)
        if answer is None:
            destination = self._index.destination(addr, scope)
            earlier = known.earlier.pop(scope, None)
            answer = earlier if earlier and earlier[0] == destination else (destination, encoded_destination(addr, destination))
            known.fresh[scope] = answer
        return answer

    def change(self, addr: str) -> None:
        """No answer about the address is certain any more."""
        known = self._known.get(addr)
        if known is not None:
            known.earlier, known.fresh = known.earlier | known.fresh, {}

    def forget(self, addr: str) -> None:
        """Nobody asks about it any more."""
        self._known.pop(addr, None)


class _Known:
    """By scope (`Index.scope`). earlier: what was said before the last change, which may still hold."""

    __slots__ = ("earlier", "fresh", "ip")

    def __init__(self, ip: str) -> None:
        self.ip = ip
        self.fresh: dict[str, Answer] = {}
        self.earlier: dict[str, Answer] = {}
