"""What becomes of a connection and its requests, told to the metrics, the log and the access log: one record object a connection.

Gates and serve call these at the moments their names say; no other code of the two paths counts or logs. What costs per request is a
dictionary look-up by decision and three increments; labels are put together once for each decision a connection meets. Pure: clock, log
and access log are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from core.addrs import Addr
from core.refs import Ref
from policy.authorize import BadTarget, Client, Denied, NoRoute, Permit
from policy.wire import Endpoint
from proxy.rescue import Cause, Failure, effect
from proxy.telemetry.counters import Counter
from proxy.telemetry.metrics import Direction, HttpSeries, Metrics, Tls, inbound_labels, outbound_labels

_LINES_PER_S = 20  # of one kind of event: a flood of refusals must not become a flood of writes
_DECISIONS_BOUND = 256  # of one connection; a policy has far fewer outcomes

Decision = Permit | Denied | NoRoute | BadTarget


class Log(Protocol):
    """One structured line. level: debug, info, warning or error."""

    def __call__(self, level: str, event: str, **fields: Any) -> None: ...


class Head(Protocol):
    """What the access log shows of a request."""

    method: bytes
    target: bytes
    authority: bytes


class Bound(NamedTuple):
    """The series of one outcome."""

    http: HttpSeries
    authz: Counter | None
    decision: Decision | None


class Note(NamedTuple):
    """A request in flight. head: kept for the access log only."""

    bound: Bound
    started: float
    head: Head | None


class Throttle:
    """Lets at most so many lines of one kind through in a second, and says how many it held back with the next one it lets through."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._windows: dict[str, tuple[int, int, int]] = {}

    def pass_(self, kind: str) -> int | None:
        """None: hold this line back. A number: write it, and mention that so many were held back before."""
        second = int(self._now())
        window, count, held = self._windows.get(kind, (second, 0, 0))
        if window == second and count >= _LINES_PER_S:
            self._windows[kind] = (window, count, held + 1)
            return None
        self._windows[kind] = (second, 1 if window != second else count + 1, 0)
        return held


class Recorder:
    """Makes the records. access_log: ``off``, ``errors`` or ``all``; access: takes one finished request as a mapping."""

    def __init__(
        self, metrics: Metrics, now: Callable[[], float], log: Log, access_log: str, access: Callable[[dict[str, Any]], None]
    ) -> None:
        self.metrics = metrics
        self.now = now
        self.keep_heads = access_log != "off"
        self.access_all = access_log == "all"
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

    def __init__(self, recorder: Recorder, client: Addr, dst: Addr) -> None:
        self._recorder = recorder
        self._client = client
        self._dst = dst
        self._bounds: dict[object, Bound] = {}

    def finish(self, note: object, status: int, cause: Cause | None) -> None:
        """A request ended as gates say: see requests.Gate.finished."""
        assert isinstance(note, Note)
        bound, started, head = note
        recorder = self._recorder
        millis = (recorder.now() - started) * 1000.0
        bound.http.response(status, millis)
        if cause is not None:
            self._failed(cause, bound.decision)
        if head is not None and (recorder.access_all or cause is not None or status >= 500):
            recorder.access(self._line(bound, head, status, cause, millis))

    def refused(self, cause: Cause, detail: str) -> None:
        """Bytes that never became a request."""
        self._recorder.failed(self.direction, self._client, self._dst, cause.value, detail, effect(cause).level)

    def note(self, failure: Failure) -> None:
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
        if cause:
            self._recorder.metrics.error(self.direction, f"opaque-{cause}")

    def _failed(self, cause: Cause, decision: Decision | None) -> None:
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

    def _line(self, bound: Bound, head: Head, status: int, cause: Cause | None, millis: float) -> dict[str, Any]:
        line: dict[str, Any] = {
            "direction": self.direction,
            "client": str(self._client),
            "dst": str(self._dst),
            "method": head.method.decode("latin-1"),
            "target": head.target.decode("latin-1"),
            "authority": head.authority.decode("latin-1"),
            "status": status,
            "total_ms": round(millis, 3),
        }
        if cause is not None:
            line["error"] = cause.value
        decision = bound.decision
        if decision is not None:
            line |= {"server": str(decision.server), "reason": decision.reason}
        return line


class InboundRecord(_Record):
    """One connection to one of our ports."""

    direction = "inbound"

    def __init__(self, recorder: Recorder, client: Addr, dst: Addr, peer: Client) -> None:
        super().__init__(recorder, client, dst)
        self._peer = peer
        self._tls: Tls = "true" if peer.identity else "opaque" if peer.reason == "tls-not-addressed-to-us" else "no_identity"
        self._tcp = recorder.metrics.tcp(inbound_labels(self._tls, peer.identity or "", port=dst.port))
        self._tcp.opened()

    def begin(self, decision: Decision, head: Head) -> Note:
        """A request was decided on."""
        bound = self._bounds.get(decision)
        if bound is None:
            bound = self._bind(decision)
        bound.http.requests.value += 1
        if bound.authz is not None:
            bound.authz.value += 1
        recorder = self._recorder
        return Note(bound, recorder.now(), head if recorder.keep_heads else None)

    def connection(self, decision: Permit | Denied) -> None:
        """The connection was decided on as opaque bytes."""
        permitted = isinstance(decision, Permit)
        self._recorder.metrics.tcp_authz("allow" if permitted else "deny", self._labels(decision)).value += 1

    def terminated(self, decision: Denied) -> None:
        """A later policy took the permit of an open connection back."""
        self._recorder.metrics.tcp_authz("terminate", self._labels(decision)).value += 1
        self._recorder.say("info", "terminated", "inbound terminated", client=str(self._client), dst=str(self._dst), reason=decision.reason)

    def closed(self, read_bytes: int, written_bytes: int) -> None:
        """The connection is over."""
        self._tcp.read(read_bytes)
        self._tcp.wrote(written_bytes)
        self._tcp.closed()

    def _bind(self, decision: Decision) -> Bound:
        labels = self._labels(decision)
        metrics = self._recorder.metrics
        authz: Counter | None = None
        if isinstance(decision, Permit):
            authz = metrics.http_authz("allow", labels)
        elif isinstance(decision, Denied):
            authz = metrics.http_authz("deny", labels)
        elif isinstance(decision, NoRoute):
            authz = metrics.route_not_found(labels)
        bound = Bound(metrics.http(labels), authz, decision)
        if len(self._bounds) >= _DECISIONS_BOUND:
            self._bounds.clear()
        self._bounds[decision] = bound
        return bound

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

    def begin(self, endpoint: Endpoint | None, head: Head) -> Note:
        """A request is about to go to this endpoint; None: there is none."""
        identity = endpoint.identity if endpoint is not None else None
        bound = self._bounds.get(identity)
        if bound is None:
            labels = outbound_labels("true" if identity else "disabled", identity or "", self._destination, self._dst.port)
            bound = self._bounds[identity] = Bound(self._recorder.metrics.http(labels), None, None)
        bound.http.requests.value += 1
        recorder = self._recorder
        return Note(bound, recorder.now(), head if recorder.keep_heads else None)

    def closed(self, read_bytes: int, written_bytes: int) -> None:
        """The connection is over."""
        self._tcp.read(read_bytes)
        self._tcp.wrote(written_bytes)
        self._tcp.closed()
