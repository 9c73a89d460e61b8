"""Idle upstream connections: HTTP/1.1 ones wait here for the next request to their endpoint, HTTP/2 ones are shared while they live.

Only bookkeeping: dialling is transport.connect, choosing an endpoint is balance. A connection that dies while it waits removes itself.
"""

from __future__ import annotations

from functools import partial

from policy.wire import Endpoint
from proxy.protocol.http1 import Http1Upstream
from proxy.protocol.http2 import Http2Limits, Http2Upstream
from proxy.protocol.sides import Sink
from proxy.transport.connect import Dialled
from proxy.transport.relay import Relay

_IDLE_PER_ENDPOINT = 256  # beyond it, a connection that becomes idle is closed


def _keep(_: Http1Upstream) -> None:
    """After an exchange the connection stays with the client connection that used it; `Http1Pool.put` takes it back later."""


class Http1Pool:
    """Idle HTTP/1.1 connections by endpoint, the most recently used first: the rest may time out."""

    def __init__(self, relay: Relay, idle_s: float) -> None:
        self._relay = relay
        self._idle_s = idle_s
        self._idle: dict[Endpoint, list[Http1Upstream]] = {}

    def adopt(self, endpoint: Endpoint, dialled: Dialled) -> Http1Upstream:
        """Make an upstream of a fresh connection; it belongs to the caller until `put`."""
        gone, meshed = partial(self._gone, endpoint), dialled.records is not None
        return self._relay.attach(dialled.sock, lambda sink: Http1Upstream(sink, _keep, gone, meshed=meshed), dialled.records)

    def take(self, endpoint: Endpoint) -> Http1Upstream | None:
        """An idle connection to this endpoint, None when there is none."""
        idle = self._idle.get(endpoint)
        return idle.pop() if idle else None

    def put(self, endpoint: Endpoint, upstream: Http1Upstream) -> None:
        """The owner does not need it at the moment."""
        if not upstream.reusable:
            return
        idle = self._idle.setdefault(endpoint, [])
        if len(idle) >= _IDLE_PER_ENDPOINT:
            upstream.close()
            return
        idle.append(upstream)
        upstream.sink.expire_after(self._idle_s)

    def close_idle(self) -> None:
        """Drain: nothing will be asked any more."""
        for idle in list(self._idle.values()):
            for upstream in list(idle):
                upstream.close()

    def _gone(self, endpoint: Endpoint, upstream: Http1Upstream) -> None:
        idle = self._idle.get(endpoint)
        if idle is not None:
            if upstream in idle:
                idle.remove(upstream)
            if not idle:
                del self._idle[endpoint]


class Http2Pool:
    """Living HTTP/2 connections by endpoint, for client connections whose requests are spread over several endpoints.

    A connection without a stream closes itself after ``limits.idle_timeout_s``.
    """

    def __init__(self, relay: Relay, limits: Http2Limits) -> None:
        self._relay = relay
        self._limits = limits
        self.shared: dict[Endpoint, Http2Upstream] = {}

    def adopt(self, dialled: Dialled, alive: dict[Endpoint, Http2Upstream], endpoint: Endpoint) -> Http2Upstream:
        """Make an upstream of a fresh connection and file it in ``alive``, which it leaves when it takes no more requests."""

        def gone(upstream: Http2Upstream) -> None:
            if alive.get(endpoint) is upstream:
                del alive[endpoint]

        def make(sink: Sink) -> Http2Upstream:
            alive[endpoint] = upstream = Http2Upstream(sink, self._limits, on_gone=gone, meshed=dialled.records is not None)
            return upstream

        return self._relay.attach(dialled.sock, make, dialled.records)

    def drain(self) -> None:
        """Nothing will be asked any more: connections close with their last stream."""
        for upstream in list(self.shared.values()):
            upstream.drain()
