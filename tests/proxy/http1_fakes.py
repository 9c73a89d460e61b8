"""Fakes for the HTTP/1.1 engine: connections that remember what was done to them, and a gate with one upstream."""

from __future__ import annotations

from proxy.protocol.http1 import Http1Client, Http1Limits, Http1Upstream
from proxy.protocol.requests import Answer, Bodies, Forward, HeadEdit, RequestHead, Verdict
from proxy.rescue import Cause

HEAD = b"GET /a HTTP/1.1\r\nHost: a.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class FakeSink:
    """A connection: what was written, and what else was done, in order."""

    def __init__(self) -> None:
        self.blocked = False
        self.out = b""
        self.writes = 0
        self.paused = False
        self.fate = ""  # "", end, close, abort
        self.timer: float | None = None

    def write(self, data: bytes) -> None:
        assert data, "an empty write"
        assert not self.fate, f"write after {self.fate}"
        self.out += data
        self.writes += 1

    def queue(self, data: bytes) -> None:
        self.write(data)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def end(self) -> None:
        assert self.fate == ""
        self.fate = "end"

    def close(self) -> None:
        assert self.fate in ("", "end")
        self.fate = "close"

    def abort(self) -> None:
        assert self.fate in ("", "end")
        self.fate = "abort"

    def expire_after(self, seconds: float | None) -> None:
        self.timer = seconds

    def take(self) -> bytes:
        out, self.out = self.out, b""
        return out


class FakeGate:
    """Forwards every request to one upstream, or does what `verdict` says."""

    explain = False

    def __init__(self) -> None:
        self.edit = HeadEdit()
        self.verdict: Verdict | str | None = "forward"
        self.upstreams: list[Http1Upstream] = []
        self.seen: list[RequestHead] = []
        self.log: list[tuple[object, ...]] = []
        self.token = 0
        self.retried_for: Cause | None = None
        self.no_tunnel: Cause | None = None
        self.rule_retries = 0  # so many times
        self.tunnels: list[tuple[object, bytes]] = []

    def request(self, head: RequestHead, token: int) -> Verdict | None:
        self.seen.append(head)
        self.token = token
        if self.verdict == "forward":
            return Forward(self.upstreams[-1], self.edit, len(self.seen))
        assert not isinstance(self.verdict, str)
        return self.verdict

    def retry_unprocessed(self, exchange: object, head: RequestHead, token: int, cause: Cause) -> Verdict | None:
        self.log.append(("retry_unprocessed", exchange))
        self.retried_for = cause
        return self.request(head, token)

    def retry_by_rule(self, exchange: object, token: int, cause: Cause) -> bool:
        self.log.append(("retry_by_rule", exchange, cause))
        self.rule_retries -= 1
        return self.rule_retries >= 0

    def tunnel(self, exchange: object, head: RequestHead) -> Cause | None:
        self.tunnels.append((exchange, head.target))
        return self.no_tunnel

    def finished(self, exchange: object, status: int, cause: Cause | None, grpc_status: int, bodies: Bodies) -> None:
        self.log.append(("finished", exchange, status, cause))
        self.grpc_status, self.body_bytes = grpc_status, bodies.body_bytes()

    def refused(self, cause: Cause, detail: str) -> None:
        self.log.append(("refused", cause))

    def cancelled(self, token: int) -> None:
        self.log.append(("cancelled", token))


class Pair:
    """One client connection and the upstream its requests go to."""

    def __init__(self, limits: Http1Limits | None = None, gate: FakeGate | None = None) -> None:
        self.gate = gate or FakeGate()
        self.down = FakeSink()
        self.client = Http1Client(self.down, self.gate, limits)
        self.idle: list[Http1Upstream] = []
        self.gone: list[Http1Upstream] = []
        self.connect()

    def connect(self, *, meshed: bool = False) -> Http1Upstream:
        self.up = FakeSink()
        self.upstream = Http1Upstream(self.up, self.idle.append, self.gone.append, meshed=meshed)
        self.gate.upstreams.append(self.upstream)
        return self.upstream

    def answer_with(self, cause: Cause, explain: bool = False) -> None:
        self.gate.verdict = Answer(cause, explain, "answered")

    def exchange(self, request: bytes = HEAD, response: bytes = OK) -> None:
        """One whole exchange, of which nothing is kept."""
        self.client.received(request)
        self.upstream.received(response)
        self.up.take()
        self.down.take()
        self.idle.clear()
        self.gate.log.clear()
