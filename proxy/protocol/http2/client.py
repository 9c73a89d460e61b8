"""The client's connection: we are the server end. Reads requests, asks the gate about them, and hears what the client does to its streams.

Theory of operation. A header block becomes a checked `RequestHead`; the gate says where to, or what to answer, or will say so later. The
stream's two ends exist from the start, so that DATA that comes before the verdict is held like any other that cannot leave yet. What
becomes of an exchange then is decided in exchanges.py.

Must not: choose upstreams, know time, touch bodies. Called by the relay through `Receiver`, and by the gate.
"""

from __future__ import annotations

from typing import Final

from proxy import rescue
from proxy.protocol.http2 import frames
from proxy.protocol.http2.exchanges import Exchanges
from proxy.protocol.http2.flow import StreamEnd
from proxy.protocol.http2.frames import ConnectionFault, StreamFault
from proxy.protocol.http2.hpack_codec import HeaderListTooLarge, encode
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.http2.messages import Malformed
from proxy.protocol.http2.streams import ClientStream, UpstreamStream
from proxy.protocol.requests import Gate, Verdict
from proxy.protocol.sides import Sink
from proxy.rescue import Cause

_DRAIN_PING: Final = b"pildrain"


class Http2Client(Exchanges):
    """Receiver of a client's connection."""

    __slots__ = ("_draining", "_preface_left")

    def __init__(self, sink: Sink, gate: Gate, limits: Http2Limits) -> None:
        super().__init__(sink, gate, limits)
        self._preface_left = frames.PREFACE
        self._draining = False
        self.queue(
            frames.settings(
                (
                    (frames.HEADER_TABLE_SIZE, 0),
                    (frames.MAX_CONCURRENT_STREAMS, limits.max_streams),
                    (frames.INITIAL_WINDOW_SIZE, limits.stream_window),
                    (frames.MAX_FRAME_SIZE, limits.max_frame),
                    (frames.MAX_HEADER_LIST_SIZE, limits.header_list_bytes),
                    (frames.ENABLE_CONNECT_PROTOCOL, 1),
                )
            )
        )
        if limits.connection_window > 65535:
            self.queue(frames.window_update(0, limits.connection_window - 65535))

    # ---- for the gate and the owner

    def proceed(self, token: int, verdict: Verdict) -> None:
        """The verdict the gate owed for stream `token`; ignored when the client has cancelled it meanwhile."""
        stream = self.streams_by_id.get(token)
        if isinstance(stream, ClientStream) and stream.deciding:
            stream.deciding = False
            self._act(stream, verdict)

    def expire(self, token: int, cause: Cause) -> None:
        """The time for a request is over: it is answered when no response has begun, else reset. A tunnel goes on, and so does what the
        upstream gave whole. A gate that still owes its verdict gives it as an Answer instead."""
        end = self.streams_by_id.get(token)
        if not isinstance(end, ClientStream) or end.deciding:
            return
        other = end.other
        if other.over or other.remote_done or (end.head.connect and end.status):
            return
        assert isinstance(other, UpstreamStream)
        if other.waiting_at is not None:
            other.waiting_at.withdraw(other)
        elif other.conn is not None:
            other.conn.cancel(other, frames.CANCEL)
        self.upstream_failed(end, cause, None, unprocessed=False)

    def review(self) -> None:
        """Ask the gate again about streams that are tunnels; requests under way were decided on and are let finish."""
        for end in list(self.streams_by_id.values()):
            assert isinstance(end, ClientStream)
            if end.head.connect and 200 <= end.status < 300 and not end.over:
                self.may_tunnel(end)

    def drain(self) -> None:
        """Tell the client to open no more streams; the connection closes when the last one is done (RFC 9113 section 6.8).

        What the client sent before it read that is still served: the final GOAWAY leaves when a PING came back.
        """
        if self.dead or self._draining:
            return None
        self._draining = True
        if not self._settled:
            return self.leave()
        self.control(frames.goaway(frames.MAX_STREAM_ID, frames.NO_ERROR) + frames.ping(_DRAIN_PING, ack=False))
        return None

    # ---- Receiver

    def received(self, data: bytes) -> None:
        """Bytes arrived."""
        if self._preface_left:
            wanted = self._preface_left
            if not (data.startswith(wanted) or wanted.startswith(data)):
                return self.fail(frames.PROTOCOL_ERROR, "no HTTP/2 connection preface") if not self.dead else None
            self._preface_left = wanted[len(data) :]
            data = data[len(wanted) :]
            if not data:
                return None
        return super().received(data)

    # ---- Connection

    def answered_id(self) -> int:
        return self.last_id

    def on_block(self, stream_id: int, block: bytes, fin: bool) -> None:
        stream = self.streams_by_id.get(stream_id)
        if stream is not None:
            return self._on_trailers(stream, block, fin)
        if not stream_id & 1:
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        if stream_id > self.last_id:
            self.last_id = stream_id
            self.control_tokens += 4
            if not self._closing:
                return self._on_request(stream_id, block, fin)
        elif stream_id not in self._reset_ids:
            raise ConnectionFault(frames.STREAM_CLOSED, f"HEADERS on stream {stream_id}, which is closed")
        self.spend()
        return self.blocks.discard_untrusted(block)

    def on_reset(self, end: StreamEnd, code: int) -> None:
        assert isinstance(end, ClientStream)
        if not end.status:  # one that was answered cost its upstream no more than any other
            self.spend_reset()
        self._abandon(end, code)

    def on_goaway(self, last_id: int, code: int, debug: bytes) -> None:
        self._peer_leaving = True
        if not self.streams_by_id:
            self.leave()

    def on_ping_ack(self, opaque: bytes) -> None:
        if opaque == _DRAIN_PING and self._draining and not self._closing:
            self._closing = True
            if self.streams_by_id:
                self.control(frames.goaway(self.last_id, frames.NO_ERROR))
            else:
                self.leave()

    def stream_fault(self, end: StreamEnd, fault: StreamFault) -> None:
        assert isinstance(end, ClientStream)
        self.spend_reset()
        self.send_reset(end.id, fault.code)
        self._end_upstream(end, frames.CANCEL)
        self._finish(end, Cause.BAD_REQUEST)

    def stalled(self, end: StreamEnd) -> None:
        assert isinstance(end, ClientStream)
        self.send_reset(end.id, frames.CANCEL)
        self._end_upstream(end, frames.CANCEL)
        self._finish(end, Cause.CLIENT_GONE)

    def stream_over(self, end: StreamEnd) -> None:
        assert isinstance(end, ClientStream)
        if self.reset_tokens < self.limits.reset_budget:
            self.reset_tokens += 1
        self._finish(end, None)

    def sent_fin(self, end: StreamEnd) -> None:
        super().sent_fin(end)
        assert isinstance(end, ClientStream)
        if end.reset_after and not end.over:
            self.no_more(end)

    def die(self) -> None:
        self.dead = True
        self.sink.expire_after(None)
        for end in list(self.streams_by_id.values()):
            assert isinstance(end, ClientStream)
            self._abandon(end, frames.CANCEL)

    def fail(self, code: int, detail: str) -> None:
        self.gate.refused(Cause.HEAD_TIMEOUT if code == frames.SETTINGS_TIMEOUT else Cause.BAD_REQUEST, detail)
        super().fail(code, detail)

    # ---- requests

    def _on_request(self, stream_id: int, block: bytes, fin: bool) -> None:
        try:
            head = self.blocks.request_untrusted(block, fin)
        except Malformed as error:
            return self._refuse(stream_id, frames.PROTOCOL_ERROR, str(error))
        except HeaderListTooLarge:
            return self._answer_unasked(stream_id, fin, Cause.HEAD_TOO_LARGE, False)
        if len(head.target) > self.limits.max_target:
            return self._answer_unasked(stream_id, fin, Cause.TARGET_TOO_LONG, head.grpc)
        if fin and head.content_length > 0:
            return self._refuse(stream_id, frames.PROTOCOL_ERROR, "content-length without data")
        if len(self.streams_by_id) >= self.limits.max_streams:
            return self._refuse(stream_id, frames.REFUSED_STREAM, "more streams than allowed")
        stream = ClientStream(self, stream_id, self.initial_window, self.limits.stream_window, head)
        stream.remote_done = fin
        self.streams_by_id[stream_id] = stream
        verdict = self.gate.request(head, stream_id)
        if verdict is None:
            stream.deciding = True
        else:
            self._act(stream, verdict)
        return None

    def _refuse(self, stream_id: int, code: int, detail: str) -> None:
        self.spend_reset()
        self.send_reset(stream_id, code)
        self.gate.refused(Cause.OVERLOADED if code == frames.REFUSED_STREAM else Cause.BAD_REQUEST, detail)

    def _answer_unasked(self, stream_id: int, fin: bool, cause: Cause, grpc: bool) -> None:
        self.spend_reset()
        fields = rescue.http2_answer(cause, grpc=grpc, explain=self.gate.explain)
        self.send_head(stream_id, encode([(name, value, False) for name, value in fields]), True)
        if not fin:
            self.send_reset(stream_id, frames.NO_ERROR)
        self.gate.refused(cause, "")

    def _on_trailers(self, end: StreamEnd, block: bytes, fin: bool) -> None:
        assert isinstance(end, ClientStream)
        try:
            if end.remote_done:
                self.blocks.discard_untrusted(block)
                raise StreamFault(frames.STREAM_CLOSED, "HEADERS after the end of the stream")
            trailers = self.blocks.trailers_untrusted(block, end.edit.strip + end.edit.trailers)
            if not fin:
                raise StreamFault(frames.PROTOCOL_ERROR, "trailers without END_STREAM")
            self.take_trailers(end, trailers.block)
        except (Malformed, HeaderListTooLarge) as error:
            self.stream_fault(end, StreamFault(frames.PROTOCOL_ERROR, str(error) or "trailers too large"))
        except StreamFault as fault:
            self.stream_fault(end, fault)
