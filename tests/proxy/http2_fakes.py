"""Fakes for the HTTP/2 engine: connections that remember what was done to them, a gate, and the h2 package as peer on either side."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events

from proxy.protocol.http2 import Http2Client, Http2Limits, Http2Upstream
from proxy.protocol.requests import Bodies, Forward, HeadEdit, RequestHead, Verdict
from proxy.protocol.sides import Receiver
from proxy.rescue import Cause

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/a.B/C"), (":authority", "a.test:80")]
GRPC = [*REQUEST, ("content-type", "application/grpc"), ("te", "trailers")]
OK = [(":status", "200"), ("content-type", "application/grpc")]
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)


class FakeSink:
    """A connection: what was written, and what else was done, in order."""

    def __init__(self) -> None:
        self.blocked = False
        self.parts: list[bytes] = []
        self.paused = False
        self.fate = ""  # "", end, close, abort
        self.timer: float | None = None

    def write(self, data: bytes) -> None:
        assert data, "an empty write"
        if not self.fate:
            self.parts.append(data)

    queue = write

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def end(self) -> None:
        self.fate = "end"

    def close(self) -> None:
        assert self.fate == ""
        self.fate = "close"

    def abort(self) -> None:
        assert self.fate == ""
        self.fate = "abort"

    def expire_after(self, seconds: float | None) -> None:
        self.timer = seconds

    def take(self) -> bytes:
        out = b"".join(self.parts)
        self.parts.clear()
        return out


class FakeGate:
    """Forwards every request to the first upstream, or does what `decide` says; `log` is what it was told."""

    def __init__(self) -> None:
        self.explain = True
        self.edit = HeadEdit()
        self.upstreams: list[Http2Upstream] = []
        self.decide: Callable[[RequestHead, int], Verdict | None] = lambda _head, token: Forward(self.upstreams[0], self.edit, token)
        self.again: Callable[[RequestHead, int], Verdict | None] = lambda _head, token: Forward(self.upstreams[-1], self.edit, token)
        self.seen: list[RequestHead] = []
        self.log: list[tuple[Any, ...]] = []
        self.retried_for: Cause | None = None
        self.no_tunnel: Cause | None = None
        self.rule_retries = 0  # so many times
        self.tunnels: list[tuple[object, bytes]] = []

    def request(self, head: RequestHead, token: int) -> Verdict | None:
        self.seen.append(head)
        return self.decide(head, token)

    def retry_unprocessed(self, exchange: object, head: RequestHead, token: int, cause: Cause) -> Verdict | None:
        self.log.append(("retry_unprocessed", exchange))
        self.retried_for = cause
        return self.again(head, token)

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
        self.log.append(("refused", cause, detail))

    def cancelled(self, token: int) -> None:
        self.log.append(("cancelled", token))

    def told(self, kind: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.log if entry[0] == kind]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A raw frame."""
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def split(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, stream, payload) of the whole frames in data, which may begin with a preface."""
    if data.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        data = data[24:]
    found = []
    while data:
        word, flags, stream = struct.unpack_from(">IBI", data)
        end = 9 + (word >> 8)
        assert len(data) >= end, "the engine wrote part of a frame"
        found.append((word & 0xFF, flags, stream, data[9:end]))
        data = data[end:]
    return found


class Peer:
    """A connection of the h2 package: `events` is all that it was told."""

    def __init__(self, *, client: bool, **checks: bool) -> None:
        config = h2.config.H2Configuration(client_side=client, header_encoding="utf-8", **checks)
        self.h2 = h2.connection.H2Connection(config)
        self.events: list[h2.events.Event] = []
        self.error: Exception | None = None
        self.manual = False

    def receive(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            self.events.append(event)
            if isinstance(event, h2.events.DataReceived) and not self.manual and event.flow_controlled_length:
                try:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                except h2.exceptions.ProtocolError:
                    pass

    def of(self, kind: type[Any], stream: int | None = None) -> list[Any]:
        return [e for e in self.events if isinstance(e, kind) and (stream is None or e.stream_id == stream)]

    def headers(self, stream: int, kind: type[Any]) -> dict[str, str]:
        [event] = self.of(kind, stream)
        return dict(event.headers)

    def body(self, stream: int) -> bytes:
        return b"".join(e.data for e in self.of(h2.events.DataReceived, stream))


class Chain:
    """h2 client <-> Http2Client, gate, Http2Upstream <-> h2 server, in memory."""

    def __init__(self, limits: Http2Limits | None = None, *, chunk: int = 0, start: bool = True) -> None:
        self.limits = limits or Http2Limits()
        self.chunk = chunk
        self.gate = FakeGate()
        self.client_sink = FakeSink()
        self.client = Peer(client=True)
        self.near = Http2Client(self.client_sink, self.gate, self.limits)
        self.idle: list[Http2Upstream] = []
        self.gone: list[Http2Upstream] = []
        self.servers: list[tuple[Peer, FakeSink, Http2Upstream]] = []
        self.add_server()
        if start:
            self.client.h2.initiate_connection()
            self.run()

    def add_server(self, *, meshed: bool = False) -> tuple[Peer, FakeSink, Http2Upstream]:
        sink = FakeSink()
        upstream = Http2Upstream(sink, self.limits, self.idle.append, self.gone.append, meshed=meshed)
        peer = Peer(client=False)
        peer.h2.initiate_connection()
        self.servers.append((peer, sink, upstream))
        self.gate.upstreams.append(upstream)
        return self.servers[-1]

    @property
    def server(self) -> Peer:
        return self.servers[0][0]

    @property
    def far(self) -> Http2Upstream:
        return self.servers[0][2]

    @property
    def server_sink(self) -> FakeSink:
        return self.servers[0][1]

    def deliver(self, receiver: Receiver, data: bytes, sink: FakeSink) -> None:
        step = self.chunk or len(data)
        for at in range(0, len(data), step):
            if not sink.fate:
                receiver.received(data[at : at + step])

    def run(self) -> None:
        """Move bytes until nobody has any."""
        moved = True
        while moved:
            moved = False
            pairs = [(self.client, self.client_sink, self.near), *self.servers]
            for peer, sink, receiver in pairs:
                data = peer.h2.data_to_send()
                if data and not sink.fate and not sink.paused:
                    self.deliver(receiver, data, sink)
                    moved = True
                if not sink.blocked and (data := sink.take()):
                    peer.receive(data)
                    moved = True

    def ask(self, headers: list[tuple[str, str]] | None = None, body: bytes = b"", *, end: bool = True) -> int:
        """Send a request; returns its stream id at the client."""
        stream: int = self.client.h2.get_next_available_stream_id()
        self.client.h2.send_headers(stream, headers or GRPC, end_stream=end and not body)
        if body:
            self.client.h2.send_data(stream, body, end_stream=end)
        self.run()
        return stream

    def answer(self, stream: int, headers: list[tuple[str, str]] | None = None, body: bytes = b"", *, end: bool = True) -> None:
        """Answer on a stream of the server."""
        self.server.h2.send_headers(stream, headers or OK, end_stream=end and not body)
        if body:
            self.server.h2.send_data(stream, body, end_stream=end)
        self.run()
