"""The gate of outbound requests: choose an endpoint for each, and a connection to it (steps 5 to 7).

One gate for each client connection. With one endpoint the client connection keeps its upstream connection, one to one; with several,
each request goes where the balancer says and connections come from the pools. Where the Service has routes, they choose the balancer
(proxy.routing). A request whose endpoint cannot be reached goes to another one, because nothing of it was sent yet. The same happens, once,
when the endpoint's sidecar answers that it cannot reach its app, as it does while a pod ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import trio

from core import alpn
from core.addrs import parse_addr
from policy.wire import Endpoint
from proxy.balance import Balancer, EndpointLoad
from proxy.discover import DestinationState
from proxy.outbound.attempts import Attempts
from proxy.outbound.deadlines import Deadlines
from proxy.outbound.pool import Http1Pool, Http2Pool
from proxy.protocol.http1 import Http1Client, Http1Upstream
from proxy.protocol.http2 import Http2Client, Http2Upstream
from proxy.protocol.requests import LATER, Answer, Bodies, Forward, RequestHead, Verdict
from proxy.rescue import UNREACHED, Cause, Failure, Redirect
from proxy.routing import UNTOUCHED, Way
from proxy.telemetry.record import InFlight, OutboundRecord
from proxy.transport.connect import Dialer, Dialled
from proxy.transport.relay import Relay

_ATTEMPTS = 3  # endpoints tried for one request before its client is told


class Toolkit(NamedTuple):
    """What every outbound gate works with. http1, http2: the pools of upstream connections. now: the clock of deadlines and latencies."""

    dialer: Dialer
    relay: Relay
    nursery: trio.Nursery
    http1: Http1Pool
    http2: Http2Pool
    deadlines: Deadlines
    now: Callable[[], float]


class Exchange:
    """What a gate remembers of a request in flight.

    way: where it may go, and its header changes. in_flight: what the record keeps of it. attempts: its timeouts and retries, None for none.
    """

    __slots__ = ("attempts", "in_flight", "load", "way")

    def __init__(self, load: EndpointLoad, way: Way, in_flight: InFlight) -> None:
        self.load = load
        self.way = way
        self.in_flight = in_flight
        self.attempts: Attempts | None = None


class _Gate(ABC):
    """What both protocols share. `engine` is set by `HttpEngines.start`."""

    explain = True  # the client is our own app
    inside: bytes
    engine: Http1Client | Http2Client

    def __init__(self, toolkit: Toolkit, destination: DestinationState, record: OutboundRecord) -> None:
        self._toolkit = toolkit
        self._destination = destination
        self._straight = Way(destination.balancer, UNTOUCHED)
        self._record = record
        self._now = toolkit.now
        self._gone = False
        self._owed: dict[int, Exchange] = {}

    # --- Gate ------------------------------------------------------------------------------------------------------------

    def request(self, head: RequestHead, token: int) -> Verdict | None:
        """See requests.Gate."""
        now = self._now()
        way, routing = self._straight, self._destination.routing
        if routing is not None:
            chosen = routing.choose(head)
            if isinstance(chosen, Redirect):
                return Answer(Cause.REDIRECTED, self.explain, self._unsent(now, head), chosen)
            if isinstance(chosen, Cause):
                return self._nowhere(chosen, now, head)
            way = chosen
        load = way.balancer.choose(now)
        if load is None:
            return self._nowhere(Cause.NO_ENDPOINTS, now, head)
        exchange = Exchange(load, way, self._record.begin(load.endpoint, head, now))
        if way.limits is not None:
            exchange.attempts = Attempts(way.limits, self._toolkit.deadlines, partial(self._late, token), now)
        upstream = self._ready(load.endpoint)
        if upstream is None:
            self._open(exchange, token)
            return LATER
        load.active += 1
        if exchange.attempts is not None:
            exchange.attempts.sent(now)
        return Forward(upstream, way.edit, exchange)

    def retry_unprocessed(self, exchange: object, head: RequestHead, token: int, cause: Cause) -> Verdict | None:
        """See requests.Gate: on a fresh connection, to the endpoint the balancer prefers now; not to one that cannot reach its app."""
        assert isinstance(exchange, Exchange)
        load, balancer, now = exchange.load, exchange.way.balancer, self._now()
        tried: frozenset[str] = frozenset((load.endpoint.addr,)) if cause in UNREACHED else frozenset()
        other = balancer.choose(now, avoid=tried)
        if other is None:
            if tried:
                return LATER if self.retry_by_rule(exchange, token, cause) else Answer(cause, self.explain, exchange)
            other = load
        if tried:
            load.failed(now)
        load.active -= 1
        exchange.load = other
        self._record.retried(cause)
        self._open(exchange, token, tried)
        return LATER

    def retry_by_rule(self, exchange: object, token: int, cause: Cause) -> bool:
        """See requests.Gate: after a pause, and to another endpoint if there is one."""
        assert isinstance(exchange, Exchange)
        attempts, now = exchange.attempts, self._now()
        pause_s = attempts.pause_s(now) if attempts is not None else None
        if attempts is None or pause_s is None:
            return False
        if cause in UNREACHED:
            exchange.load.failed(now)
        else:
            exchange.load.observe(now - attempts.sent_at, now)
        self._record.retried(cause)
        self._owed[token] = exchange
        self._toolkit.nursery.start_soon(self._after_pause, exchange, token, pause_s)
        return True

    def tunnel(self, exchange: object, head: RequestHead) -> Cause | None:
        """See requests.Gate: what leads out is decided by the other end."""
        return None

    def finished(self, exchange: object, status: int, cause: Cause | None, grpc_status: int, bodies: Bodies) -> None:
        """See requests.Gate."""
        assert isinstance(exchange, Exchange)
        load, now = exchange.load, self._now()
        load.active -= 1
        began = exchange.in_flight.started
        if exchange.attempts is not None:
            exchange.attempts.end()
            began = exchange.attempts.sent_at
        if cause is None or cause is Cause.ROUTE_TIMEOUT:  # too slow an endpoint must not look like a fast one
            load.observe(now - began, now)
        elif not status or cause in UNREACHED:
            load.failed(now)
        self._record.finish(exchange.in_flight, status, cause, grpc_status, bodies)

    def refused(self, cause: Cause, detail: str) -> None:
        """See requests.Gate."""
        self._record.refused(cause, detail)

    def cancelled(self, token: int) -> None:
        """See requests.Gate: a connection that is being opened for it is kept for others."""
        exchange = self._owed.pop(token, None)
        if exchange is not None:
            exchange.load.active -= 1
            if exchange.attempts is not None:
                exchange.attempts.end()
            self._record.finish(exchange.in_flight, 0, Cause.CLIENT_GONE)

    def closed(self) -> None:
        """The client's connection is over, in whatever way. Called once, after everything else."""
        if self._gone:
            return
        self._gone = True
        for token in list(self._owed):
            self.cancelled(token)
        self._leave()
        self._destination.release(self._now())

    # --- inside ----------------------------------------------------------------------------------------------------------

    def _nowhere(self, cause: Cause, now: float, head: RequestHead) -> Answer:
        """Refuse a request for which nothing is dialled: so nothing else logs why."""
        self._record.log_failure(Failure(cause, _NOWHERE_TO_GO.get(cause, "")))
        return Answer(cause, self.explain, self._unsent(now, head))

    def _unsent(self, now: float, head: RequestHead) -> Exchange:
        nowhere = EndpointLoad(_NOWHERE, now)
        nowhere.active = 1
        return Exchange(nowhere, self._straight, self._record.begin(None, head, now))

    def _open(self, exchange: Exchange, token: int, tried: frozenset[str] = frozenset()) -> None:
        """Begin to dial for a request. tried: addresses that were tried for it in vain."""
        exchange.load.active += 1
        self._owed[token] = exchange
        self._toolkit.nursery.start_soon(self._dial, exchange.load, exchange.way.balancer, token, tried)

    async def _dial(self, load: EndpointLoad, balancer: Balancer, token: int, tried: frozenset[str]) -> None:
        """Open a connection for one request, trying other endpoints while the first ones cannot be reached."""
        while True:
            endpoint = load.endpoint
            try:
                dialled = await self._toolkit.dialer.endpoint(endpoint, parse_addr(endpoint.addr), self.inside)
            except Exception as error:
                # Whatever else it is must cost this request and not the task, which would take the whole sidecar with it.
                failure = error if isinstance(error, Failure) else Failure(Cause.INTERNAL, f"dialling {endpoint.addr}: {error!r}")
                self._record.log_failure(failure)
                load.failed(self._now())
                tried |= {endpoint.addr}
                other = balancer.choose(self._now(), avoid=tried) if len(tried) < _ATTEMPTS else None
                if other is None:
                    self._proceed(token, failure.cause)
                    return
                self._move(token, load, other)
                load = other
                continue
            if self._gone:
                dialled.close()
                return
            with self._toolkit.relay.batch():
                self._proceed(token, self._adopt(endpoint, dialled, token in self._owed))
            return

    def _move(self, token: int, away: EndpointLoad, to: EndpointLoad) -> None:
        """Another endpoint will serve the request, if somebody still waits for it."""
        exchange = self._owed.get(token)
        if exchange is not None:
            away.active -= 1
            to.active += 1
            exchange.load = to

    def _proceed(self, token: int, found: Http1Upstream | Http2Upstream | Cause) -> None:
        """Give the engine the verdict it waits for, unless the client has left meanwhile."""
        exchange = self._owed.pop(token, None)
        if exchange is None:
            return
        if isinstance(found, Cause):
            if found is not Cause.ROUTE_TIMEOUT and self.retry_by_rule(exchange, token, found):
                return
        elif exchange.attempts is not None:
            exchange.attempts.sent(self._now())
        verdict = Answer(found, self.explain, exchange) if isinstance(found, Cause) else Forward(found, exchange.way.edit, exchange)
        with self._toolkit.relay.batch():
            self.engine.proceed(token, verdict)

    async def _after_pause(self, exchange: Exchange, token: int, pause_s: float) -> None:
        """Send a request again after a pause, if somebody still waits for it then."""
        await trio.sleep(pause_s)
        if self._owed.get(token) is not exchange:
            return
        before, balancer, now = exchange.load, exchange.way.balancer, self._now()
        other = balancer.choose(now, avoid=frozenset((before.endpoint.addr,))) or balancer.choose(now)
        if other is None:
            self._proceed(token, Cause.NO_ENDPOINTS)
            return
        before.active -= 1
        exchange.load = other
        upstream = self._ready(other.endpoint)
        if upstream is None:
            self._open(exchange, token)
        else:
            other.active += 1
            self._proceed(token, upstream)

    def _late(self, token: int) -> None:
        """The time that a rule allows a request is over."""
        if token in self._owed:
            self._proceed(token, Cause.ROUTE_TIMEOUT)
        else:
            self.engine.expire(token, Cause.ROUTE_TIMEOUT)

    @abstractmethod
    def _ready(self, endpoint: Endpoint) -> Http1Upstream | Http2Upstream | None:
        """A connection that can take a request now."""

    @abstractmethod
    def _adopt(self, endpoint: Endpoint, dialled: Dialled, wanted: bool) -> Http1Upstream | Http2Upstream:
        """Make a fresh connection ours. wanted: the request that it was opened for is waiting still."""

    @abstractmethod
    def _leave(self) -> None:
        """The client is gone: give back what others can use."""


_NOWHERE_TO_GO = {
    Cause.NO_ENDPOINTS: "none of the endpoints that the request may go to is ready",
    Cause.NO_ROUTE: "no rule of the Service's routes wants the request",
    Cause.NO_BACKEND: "the request's share by its route leads to nothing that exists",
}
_NOWHERE = Endpoint("")


class Http1Gate(_Gate):
    """Requests of one HTTP/1.1 client connection: one at a time, each with an upstream connection to itself."""

    inside = alpn.HTTP1

    def __init__(self, toolkit: Toolkit, destination: DestinationState, record: OutboundRecord) -> None:
        super().__init__(toolkit, destination, record)
        self._mine: Http1Upstream | None = None
        self._mine_at: Endpoint | None = None

    def _ready(self, endpoint: Endpoint) -> Http1Upstream | None:
        mine = self._mine
        if mine is not None:
            if self._mine_at is endpoint and mine.reusable:
                return mine
            self._leave()
        upstream = self._toolkit.http1.take(endpoint)
        if upstream is not None:
            self._mine, self._mine_at = upstream, endpoint
        return upstream

    def _adopt(self, endpoint: Endpoint, dialled: Dialled, wanted: bool) -> Http1Upstream:
        upstream = self._toolkit.http1.adopt(endpoint, dialled)
        if wanted:
            self._leave()
            self._mine, self._mine_at = upstream, endpoint
        else:  # the next request may be under way already, on a connection of its own
            self._toolkit.http1.put(endpoint, upstream)
        return upstream

    def _leave(self) -> None:
        mine, at = self._mine, self._mine_at
        self._mine = self._mine_at = None
        if mine is not None and at is not None:
            self._toolkit.http1.put(at, mine)


class Http2Gate(_Gate):
    """Requests of one HTTP/2 client connection, many at a time.

    With one endpoint the upstream connection is this client's own; with several, connections are shared by all clients.
    """

    inside = alpn.HTTP2

    def __init__(self, toolkit: Toolkit, destination: DestinationState, record: OutboundRecord) -> None:
        super().__init__(toolkit, destination, record)
        self._own: dict[Endpoint, Http2Upstream] = {}
        self._waiting: dict[Endpoint, list[int]] = {}

    def _alive(self) -> dict[Endpoint, Http2Upstream]:
        alone = self._destination.routing is None and len(self._straight.balancer) == 1
        return self._own if alone else self._toolkit.http2.shared

    def _ready(self, endpoint: Endpoint) -> Http2Upstream | None:
        upstream = self._alive().get(endpoint)
        return upstream if upstream is not None and upstream.capacity > 0 else None

    def _open(self, exchange: Exchange, token: int, tried: frozenset[str] = frozenset()) -> None:
        waiting = self._waiting.get(exchange.load.endpoint)
        if waiting is None:
            self._waiting[exchange.load.endpoint] = []
            super()._open(exchange, token, tried)
        else:  # a connection to it is on its way
            exchange.load.active += 1
            self._owed[token] = exchange
            waiting.append(token)

    async def _dial(self, load: EndpointLoad, balancer: Balancer, token: int, tried: frozenset[str]) -> None:
        endpoint = load.endpoint
        try:
            await super()._dial(load, balancer, token, tried)
        finally:
            waiting = self._waiting.pop(endpoint, [])
        with self._toolkit.relay.batch():
            for other in waiting:
                upstream = self._ready(endpoint)
                exchange = self._owed.get(other)
                if upstream is not None:
                    self._proceed(other, upstream)
                elif exchange is not None:  # not reached, or full already: each on its own, so that each may try other endpoints
                    exchange.load.active -= 1
                    self._open(exchange, other)

    def _adopt(self, endpoint: Endpoint, dialled: Dialled, wanted: bool) -> Http2Upstream:
        return self._toolkit.http2.adopt(dialled, self._alive(), endpoint)

    def _leave(self) -> None:
        for upstream in list(self._own.values()):
            upstream.drain()
        self._own.clear()
