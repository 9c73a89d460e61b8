"""From an answer of the index to the line that carries it, within what a sidecar reads. Called by policy.server."""

from __future__ import annotations

import msgspec

from core.runtime import logs
from policy import wire

_log = logs.logger("policy")


def encoded_policy(port: int, policy: wire.InboundPolicy) -> bytes:
    """The line for a port. One that no sidecar would read becomes a denial: a policy cannot be shortened without changing it."""
    line = wire.encode(wire.PortPolicy(port, policy))
    if len(line) <= wire.MAX_LINE_BYTES:
        return line
    _log.error("policy too large, everything is denied", server=str(policy.server), size_bytes=len(line), limit=wire.MAX_LINE_BYTES)
    return wire.encode(wire.PortPolicy(port, wire.InboundPolicy(policy.server, policy.protocol, ())))


def encoded_destination(addr: str, destination: wire.Destination) -> bytes:
    """The line for an address, with as many of the endpoints as a sidecar reads: half of a very large Service still serves."""
    line = wire.encode(wire.DestinationState(addr, destination))
    while len(line) > wire.MAX_LINE_BYTES:
        kept = destination.endpoints[: len(destination.endpoints) // 2]
        _log.warning("too many endpoints, some are left out", service=str(destination.ref), kept=len(kept), of=len(destination.endpoints))
        destination = msgspec.structs.replace(destination, endpoints=kept)
        line = wire.encode(wire.DestinationState(addr, destination))
    return line
