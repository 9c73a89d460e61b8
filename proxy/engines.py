"""The engine of a connection whose requests are decided on one by one: made for its protocol, put on its link, counted as open.

Called by both paths, with a gate each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from proxy.live import Live
from proxy.protocol.detect import Detected
from proxy.protocol.http1 import Http1Client, Http1Limits
from proxy.protocol.http2 import Http2Client, Http2Limits
from proxy.protocol.requests import Gate
from proxy.transport.join import begin
from proxy.transport.link import Link
from proxy.transport.relay import Relay


class EngineGate(Gate, Protocol):
    """A gate that calls its engine back; `HttpEngines.start` sets it."""

    engine: Http1Client | Http2Client


@dataclass(frozen=True, slots=True)
class HttpEngines:
    """Makes engines with these limits."""

    relay: Relay
    live: Live
    http1: Http1Limits
    http2: Http2Limits

    def start(self, link: Link, gate: EngineGate, protocol: Detected, received: bytes, closed: Callable[[], None]) -> None:
        """Serve the requests of a link. protocol: HTTP1 or HTTP2. received: plaintext that was read already. closed: called at the end."""
        with self.relay.batch():  # what it said already is served even if we are draining
            http1 = protocol is Detected.HTTP1
            gate.engine = engine = Http1Client(link, gate, self.http1) if http1 else Http2Client(link, gate, self.http2)
            begin(self.relay, link, engine, received)
            self.live.add(link, engine, closed)

    def with_idle_timeout(self, seconds: float) -> HttpEngines:
        """The same, but idle connections live only so long."""
        http1, http2 = replace(self.http1, idle_timeout_s=seconds), replace(self.http2, idle_timeout_s=seconds)
        return replace(self, http1=http1, http2=http2)
