"""What becomes of a connection and its requests, told to the metrics, the log and the access log: one record object per connection.

Gates and serve call these at the moments their names say; no other code of the two paths counts or logs. What costs per request is a
dictionary look-up by decision and three increments; labels are put together once for each decision a connection meets. Pure: clock, log
and access log are given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from core.addrs import Addr
from core.refs import Ref
from core.runtime.throttle import Throttle
from policy.authorize import BadTarget, Client, Denied, NoRoute, Permit
from policy.wire import Endpoint
from proxy.rescue import Cause, Failure, effect
from proxy.telemetry.access_log import TRACE_HEADERS, Entry, Mode, fields_of, wanted
from proxy.telemetry.counters import Counter
from proxy.telemetry.metrics import Direction, HttpSeries, Metrics, Tls, inbound_labels, outbound_labels

_OUTCOMES_MAX = 256  # of one connection; a policy has far fewer outcomes

# What served the request broke off: a failure even if its answer began well.
_CUT = frozenset((Cause.UPSTREAM_RESET, Cause.UPSTREAM_PROTOCOL, Cause.UPSTREAM_TIMEOUT, Cause.ROUTE_TIMEOUT, Cause.INTERNAL))

Decision = Permit | Denied | NoRoute | BadTarget


class Log(Protocol):
    """One structured line. level: debug, info, warning or error."""

    def __call__(self, level: str, event: str, **fields: Any) -> None: ...


class RequestHead(Protocol):
    """What the access log shows of a request (proxy.protocol.requests.RequestHead)."""

    method: bytes
    target: bytes
    authority: bytes

    def values(self, names: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        """The value of each named field, see proxy.protocol.requests."""
        ...


class Bodies(Protocol):
    """How long the bodies of an exchange were (proxy.protocol.requests.Bodies)."""

    def body_bytes(self) -> tuple[int, int]:
        """Of the request, of the response."""
        ...


class Outcome:
    """The series of one decision on one connection, bound. decision None: outbound, where nobody is permitted or denied anything.

    It keeps references to parts of the series and adds to them itself, because each attribute of a series, which is not compiled, costs a
    look-up by name.
    """

    __slots__ = ("_bounds", "_by_response", "_counts", "_latency", "authz", "decision", "http", "requests")

    def __init__(self, http: HttpSeries, authz: Counter | None, decision: Decision | None) -> None:
        self.http = http
        self.authz = authz
        self.decision = decision
        self.requests = http.requests
        self._by_response = http.by_response
        self._latency = latency = http.latency_ms
        self._bounds, self._counts = latency.bounds, latency.counts

    def count_end(self, status: int, millis: float, grpc_status: int = -1, cut: bool = False) -> None:
        """Count the end of an exchange. status: what the client saw, 0 if nothing. millis: since the request was received. grpc_status:
        -1 without one. cut: what served it broke off."""
        key = status << 10 | grpc_status + 1 << 1 | cut
        counter = self._by_response.get(key)
        if counter is None:
            counter = self.http.response(key, status, grpc_status, cut)
        counter.value += 1
        self._counts[bisect_left(self._bounds, millis)] += 1
        self._latency.total += millis


class InFlight:
    """A request in flight. started: as the recorder's clock said. head: kept for the access log only."""

    __slots__ = ("head", "outcome", "started")

    def __init__(self, outcome: Outcome, started: float, head: RequestHead | None) -> None:
        self.outcome = outcome
        self.started = started
        self.head = head


class Recorder:
    """Makes the records. access: takes the fields of one finished request."""

    def __init__(
        self, metrics: Metrics, now: Callable[[], float], log: Log, access_log: Mode, access: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.metrics = metrics
        self.now = now
        self.access_log = access_log
        self.access = access
        self._log = log
        self._throttle = Throttle(now)

    def inbound(self, client: Addr, dst: Addr, peer: Client) -> InboundRecord:
        """For a connection to one of our ports, once it is known who made it."""
        return InboundRecord(self, client, dst, peer)

    def outbound(self, client: Addr, dst: Addr, destination: Ref | None) -> OutboundRecord:
        """For a connection the app made, once it is known what it dialled."""
        return OutboundRecord(self, client, dst, destination)

    def failed(self, direction: Direction, client: Addr, dst: Addr, cause: str, detail: str, level: str = "info") -> None:
        """A connection that did not get as far as having a record, or a failure on one that did."""
        self.metrics.error(direction, cause)
        self.say(level, cause, f"{direction} {cause}", client=str(client), dst=str(dst), detail=detail)

    def say(self, level: str, kind: str, event: str, **fields: Any) -> None:
        """Log, within the bounds of the throttle."""
        held = self._throttle.pass_(kind)
        if held is not None:
            self._log(level, event, **fields, **({"held_back": held} if held else {}))


class _Record:
    """What both directions share."""

    direction: Direction

    def __init__(self, recorder: Recorder, client: Addr, dst: Addr, client_id: str = "") -> None:
        self._recorder = recorder
        self._client = client
        self._dst = dst
        self._client_id = client_id
        self._outcomes: dict[object, Outcome] = {}
        self._keep_heads = recorder.access_log is not Mode.OFF
        self._opened = recorder.now()
        self._connection: Permit | Denied | None = None
        self._cause = ""
        self.protocol = "TCP"  # until somebody knows better

    def finish(self, in_flight: InFlight, status: int, cause: Cause | None, grpc_status: int = -1, bodies: Bodies | None = None) -> None:
        """A request ended as gates say: see requests.Gate.finished."""
        outcome = in_flight.outcome
        recorder = self._recorder
        millis = (recorder.now() - in_flight.started) * 1000.0
        if cause is None:
            outcome.count_end(status, millis, grpc_status)
        else:
            outcome.count_end(status, millis, grpc_status, cause in _CUT)
            self._count_failure(cause, outcome.decision)
        if in_flight.head is not None and wanted(recorder.access_log, status, cause.value if cause else None, grpc_status):
            recorder.access(fields_of(self._entry(outcome.decision, in_flight.head, status, cause, millis, grpc_status, bodies)))

    def refused(self, cause: Cause, detail: str) -> None:
        """Bytes that never became a request."""
        self._recorder.failed(self.direction, self._client, self._dst, cause.value, detail, effect(cause).level)

    def retried(self, cause: Cause) -> None:
        """A request is sent again, because nobody acted on it or its route says so. cause: what kept it from being answered."""
        self._recorder.metrics.retry(self.direction, cause.value)
        self._recorder.say("info", "retried", f"{self.direction} retried", client=str(self._client), dst=str(self._dst), cause=cause.value)

    def log_failure(self, failure: Failure) -> None:
        """Something on the way failed; the request it was for is finished separately."""
        self._recorder.say(
            effect(failure.cause).level,
            failure.cause.value,
            f"{self.direction} {failure.cause.value}",
            client=str(self._client),
            dst=str(self._dst),
            detail=failure.detail,
        )

    def ended(self, cause: str) -> None:
        """An opaque connection ended. cause: empty when in order."""
        if not cause:
            return
        self._cause = f"opaque-{cause}"
        if cause == "http":
            detail = "a request among opaque bytes: the port must be opaque for both sides, or for none"
            self._recorder.failed(self.direction, self._client, self._dst, self._cause, detail)
        else:
            self._recorder.metrics.error(self.direction, self._cause)

    def failed(self, cause: Cause) -> None:
        """The connection did not get as far as carrying bytes; whoever raised the failure reports it."""
        self._cause = cause.value

    def _log_opaque(self, read_bytes: int, written_bytes: int) -> None:
        """The access log's line of an opaque connection, once it is over."""
        recorder = self._recorder
        if self.protocol != "TCP" or not (recorder.access_log is Mode.ALL or (recorder.access_log is Mode.ERRORS and self._cause)):
            return
        decision = self._connection
        entry = Entry(
            direction=self.direction,
            protocol=self.protocol,
            client_addr=str(self._client),
            client_id=self._client_id,
            server_addr=str(self._dst),
            duration_ms=(recorder.now() - self._opened) * 1000.0,
            request_bytes=read_bytes,
            response_bytes=written_bytes,
            server=decision.server if decision else None,
            authorization=decision.authorization if decision else None,
            audit=decision.audit if decision else False,
            reason=decision.reason if isinstance(decision, Denied) else "",
            cause=self._cause or None,
        )
        recorder.access(fields_of(entry))

    def _count_failure(self, cause: Cause, decision: Decision | None) -> None:
        self._recorder.metrics.error(self.direction, cause.value)
        if decision is not None and not isinstance(decision, Permit):
            self._recorder.say(
                "info",
                cause.value,
                f"{self.direction} {cause.value}",
                client=str(self._client),
                dst=str(self._dst),
                reason=decision.reason,
            )

    def _entry(
        self,
        decision: Decision | None,
        head: RequestHead,
        status: int,
        cause: Cause | None,
        millis: float,
        grpc_status: int,
        bodies: Bodies | None,
    ) -> Entry:
        agent, *traces = head.values((b"user-agent", *TRACE_HEADERS))
        request_bytes, response_bytes = (None, None) if bodies is None else bodies.body_bytes()
        return Entry(
            direction=self.direction,
            protocol=self.protocol,
            client_addr=str(self._client),
            client_id=self._client_id,
            server_addr=str(self._dst),
            duration_ms=millis,
            method=head.method,
            target=head.target,
            authority=head.authority,
            status=status,
            grpc_status=grpc_status if grpc_status >= 0 else None,
            request_bytes=request_bytes,
            response_bytes=response_bytes,
            server=decision.server if decision else None,
            route=decision.route if decision else None,
            authorization=decision.authorization if decision else None,
            audit=decision.audit if decision else False,
            reason=decision.reason if decision and not isinstance(decision, Permit) else "",
            cause=cause.value if cause else None,
            user_agent=agent,
            trace_id=next((trace for trace in traces if trace), None),
        )


class InboundRecord(_Record):
    """One connection to one of our ports."""

    direction = "inbound"

    def __init__(self, recorder: Recorder, client: Addr, dst: Addr, peer: Client) -> None:
        super().__init__(recorder, client, dst, peer.identity or "")
        self._peer = peer
        self._tls: Tls = "true" if peer.identity else "opaque" if peer.reason == "tls-not-addressed-to-us" else "no_identity"
        self._tcp = recorder.metrics.tcp(inbound_labels(self._tls, peer.identity or "", port=dst.port))
        self._tcp.opened()

    def begin(self, decision: Decision, head: RequestHead) -> InFlight:
        """A request was decided on."""
        outcome = self._outcomes.get(decision)
        if outcome is None:
            outcome = self._bind(decision)
        outcome.requests.value += 1
        if outcome.authz is not None:
            outcome.authz.value += 1
        return InFlight(outcome, self._recorder.now(), head if self._keep_heads else None)

    def connection(self, decision: Permit | Denied) -> None:
        """The connection was decided on as opaque bytes."""
        self._connection = decision
        permitted = isinstance(decision, Permit)
        self._recorder.metrics.tcp_authz("allow" if permitted else "deny", self._labels(decision)).value += 1

    def terminated(self, decision: Denied) -> None:
        """A later policy took the permit of an open connection back."""
        self._connection = decision
        self._recorder.metrics.tcp_authz("terminate", self._labels(decision)).value += 1
        self._recorder.say("info", "terminated", "inbound terminated", client=str(self._client), dst=str(self._dst), reason=decision.reason)

    def withdrawn(self, in_flight: InFlight, decision: Denied | NoRoute | BadTarget) -> None:
        """A later policy took the permit of a tunnel back, which ends now: `finish` reports it with the reason."""
        self._recorder.metrics.http_authz("terminate", self._labels(decision)).value += 1
        in_flight.outcome = Outcome(in_flight.outcome.http, None, decision)

    def closed(self, read_bytes: int, written_bytes: int) -> None:
        """The connection is over."""
        self._tcp.closed(read_bytes, written_bytes)
        self._log_opaque(read_bytes, written_bytes)

    def _bind(self, decision: Decision) -> Outcome:
        labels = self._labels(decision)
        metrics = self._recorder.metrics
        authz: Counter | None = None
        if isinstance(decision, Permit):
            authz = metrics.http_authz("allow", labels)
        elif isinstance(decision, Denied):
            authz = metrics.http_authz("deny", labels)
        elif isinstance(decision, NoRoute):
            authz = metrics.route_not_found(labels)
        outcome = Outcome(metrics.http(labels), authz, decision)
        if len(self._outcomes) >= _OUTCOMES_MAX:
            self._outcomes.clear()
        self._outcomes[decision] = outcome
        return outcome

    def _labels(self, decision: Decision) -> tuple[tuple[str, str], ...]:
        return inbound_labels(
            self._tls, self._peer.identity or "", decision.server, decision.route, decision.authorization, port=self._dst.port
        )


class OutboundRecord(_Record):
    """One connection that the app made."""

    direction = "outbound"

    def __init__(self, recorder: Recorder, client: Addr, dst: Addr, destination: Ref | None) -> None:
        super().__init__(recorder, client, dst)
        self._destination = destination
        self._tcp = recorder.metrics.tcp(outbound_labels("disabled", destination=destination, port=dst.port))
        self._tcp.opened()

    def begin(self, endpoint: Endpoint | None, head: RequestHead, now: float) -> InFlight:
        """A request is about to go to this endpoint; None: there is none. now: as the recorder's clock says."""
        identity = endpoint.identity if endpoint is not None else None
        outcome = self._outcomes.get(identity)
        if outcome is None:
            labels = outbound_labels("true" if identity else "disabled", identity or "", self._destination, self._dst.port)
            outcome = self._outcomes[identity] = Outcome(self._recorder.metrics.http(labels), None, None)
        outcome.requests.value += 1
        return InFlight(outcome, now, head if self._keep_heads else None)

    def closed(self, read_bytes: int, written_bytes: int) -> None:
        """The connection is over."""
        self._tcp.closed(read_bytes, written_bytes)
        self._log_opaque(read_bytes, written_bytes)
