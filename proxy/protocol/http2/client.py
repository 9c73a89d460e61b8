"""The client's connection: we are the server end. Takes requests, asks the gate, and carries answers back.

Theory of operation. A header block becomes a checked `RequestHead`; the gate says where to, or what to answer, or will say so later. The
stream's two ends exist from the start, so that DATA that comes before the verdict is held like any other that cannot leave yet. What
happens to an exchange is decided here, also when the upstream's end reports it: `upstream_answered`, `upstream_failed`.

Only this module calls the gate. For each request it asked about, exactly one of `finished` and (while a verdict is owed) `cancelled` is
called at the end; neither after an answer for which the gate left no note.

Must not: choose upstreams, know time, touch bodies. Called by the relay through `Receiver`, by the gate, and by upstream.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy import rescue
from proxy.protocol.http2 import frames
from proxy.protocol.http2.blocks import ResponseHead, edited_answer, without_names
from proxy.protocol.http2.connection import Connection
from proxy.protocol.http2.flow import StreamEnd, drop_held, rewind
from proxy.protocol.http2.frames import ConnectionFault, StreamFault
from proxy.protocol.http2.hpack_codec import HeaderListTooLarge, encode
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.http2.messages import Malformed
from proxy.protocol.http2.streams import ClientStream, UpstreamStream, part
from proxy.protocol.requests import IDEMPOTENT, Answer, Gate, Verdict
from proxy.protocol.sides import Sink
from proxy.rescue import UNREACHED, Cause

if TYPE_CHECKING:
    from proxy.protocol.http2.upstream import Http2Upstream

_DRAIN_PING: Final = b"pildrain"


class Http2Client(Connection):
    """Receiver of a client's connection."""

    __slots__ = (
        "_closing", "_draining", "_peer_leaving", "_preface_left", "gate",
    )  # fmt: skip

    def __init__(self, sink: Sink, gate: Gate, limits: Http2Limits) -> None:
        super().__init__(sink, limits)
        self.gate = gate
        self._preface_left = frames.PREFACE
        self._draining = self._closing = self._peer_leaving = False
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
        """The time for a request is over: it is answered when no answer has begun, else reset. A tunnel goes on, and so does what the
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
            self.calm += 4
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
        if self.resets < self.limits.reset_budget:
            self.resets += 1
        self._finish(end, None)

    def sent_fin(self, end: StreamEnd) -> None:
        super().sent_fin(end)
        assert isinstance(end, ClientStream)
        if end.reset_after and not end.over:
            self.no_more(end)

    def die(self, detail: str) -> None:
        self.dead = True
        self.sink.expire_after(None)
        for end in list(self.streams_by_id.values()):
            assert isinstance(end, ClientStream)
            self._abandon(end, frames.CANCEL)

    def fail(self, code: int, detail: str) -> None:
        self.gate.refused(Cause.HEAD_TIMEOUT if code == 0x4 else Cause.BAD_REQUEST, detail)
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

    def _act(self, stream: ClientStream, verdict: Verdict) -> None:
        stream.exchange = verdict.exchange
        if isinstance(verdict, Answer):
            if verdict.exchange is None:
                stream.attempts = 0  # the gate has no note to be told about
            return self._answer(stream, verdict.cause, verdict.explain, verdict.redirect)
        stream.edit = verdict.edit
        stream.attempts += 1
        upstream: Http2Upstream = verdict.upstream
        other = stream.other
        assert isinstance(other, UpstreamStream)
        if other.fin:  # trailers that came before the verdict did
            other.fin = without_names(other.fin, verdict.edit.strip + verdict.edit.trailers)
        upstream.open(other, stream.head)
        return None

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

    # ---- what the upstream's end reports

    def upstream_answered(self, end: ClientStream, head: ResponseHead, fin: bool) -> None:
        """A response head, final or 1xx; fin: nothing follows it."""
        block = head.block
        if head.status >= 200:
            end.status = head.status
            rule = end.edit.answer
            if rule is not None and (rule.strip or rule.add):
                block = edited_answer(block, rule)
        elif self.sink.blocked and self._backlog > self.limits.backlog_bytes:
            return  # the one kind of head that may get lost
        self.send_block(end, block, fin)

    def upstream_failed(self, end: ClientStream, cause: Cause, code: int | None, *, unprocessed: bool) -> None:
        """The upstream's end is gone before its response was complete. code: what it was reset with. unprocessed: nobody acted on it.

        Sent again through the gate when that cannot be noticed; else the client sees an answer if there was none yet, or RST_STREAM.
        """
        other = end.other
        assert isinstance(other, UpstreamStream)
        self.forget_held(end)  # while it is still known whose data that was
        other.detach()
        if end.over:
            return drop(other)
        if end.status:
            drop(other)
            self.send_reset(end.id, code or frames.INTERNAL_ERROR)
            return self._finish(end, cause)
        died = code is None and cause is Cause.UPSTREAM_RESET
        again = unprocessed or (died and end.head.bodiless and end.head.method in IDEMPOTENT)
        most = self.limits.max_attempts if unprocessed and cause not in UNREACHED else 2
        if again and end.attempts < most and rewind(other):
            verdict = self.gate.retry(end.exchange, end.head, end.id, cause)
            if verdict is None:
                end.deciding = True
                return None
            return self._act(end, verdict)
        if self._may_send_again(end, cause):
            return self._send_again(end)
        drop(other)
        if code is None:
            return self._answer(end, cause, self.gate.explain)
        self.send_reset(end.id, code or frames.INTERNAL_ERROR)
        return self._finish(end, cause)

    def unwanted(self, end: ClientStream, status: int) -> bool:
        """Whether the request is sent again instead of giving the client an answer of this status; the upstream has to let go of it then,
        and call `dismissed`."""
        rule = end.edit.answer
        return (
            rule is not None
            and rule.again is not None
            and status in rule.again
            and not end.over
            and self._may_send_again(end, Cause.RETRIABLE_STATUS)
        )

    def dismissed(self, end: ClientStream) -> None:
        """The upstream has let go of a request because its answer was `unwanted`."""
        other = end.other
        assert isinstance(other, UpstreamStream)
        self.forget_held(end)
        other.detach()
        self._send_again(end)

    def _may_send_again(self, end: ClientStream, cause: Cause) -> bool:
        """Whether the gate sends the request again, because its rule says so; whoever was asked may have acted on it."""
        rule, other = end.edit.answer, end.other
        if rule is None or rule.again is None or end.head.connect or (other.sent and other.kept is None):
            return False
        return self.gate.send_again(end.exchange, end.id, cause)

    def _send_again(self, end: ClientStream) -> None:
        rewind(end.other)
        end.deciding = True

    def may_tunnel(self, end: ClientStream) -> bool:
        """Whether the stream may be a tunnel, at its beginning or still; when not, it is ended, as a TCP connection inside it would be by
        a reset (RFC 8441 section 5, RFC 9113 section 8.5)."""
        cause = self.gate.tunnel(end.exchange, end.head)
        if cause is None:
            return True
        code = frames.CANCEL if end.head.extended else frames.CONNECT_ERROR
        self._end_upstream(end, code)
        if end.status:
            self.send_reset(end.id, code)
            self._finish(end, cause)
        else:
            self._answer(end, cause, self.gate.explain)
        return False

    def no_more(self, end: ClientStream) -> None:
        """The upstream gave its whole response and reset with NO_ERROR: the rest of the request is not wanted (RFC 9113 section 8.1)."""
        if end.over:
            return
        drop(end.other)
        if end.local_done:
            self.send_reset(end.id, frames.NO_ERROR)
            self._finish(end, None)
        else:
            end.reset_after = True

    # ---- ending an exchange

    def _answer(self, end: ClientStream, cause: Cause, explain: bool, redirect: rescue.Redirect | None = None) -> None:
        """Answer for the upstream, and ask for no more of the request (RFC 9113 section 8.1)."""
        drop(end.other)
        fields = rescue.http2_answer(cause, grpc=end.head.grpc, explain=explain, redirect=redirect)
        end.status = int(fields[0][1])
        if redirect is None:
            if end.head.grpc:
                end.grpc_status = rescue.effect(cause).grpc
            end.cause = cause
        whole = end.remote_done
        end.other.over = True
        self.send_block(end, encode([(name, value, False) for name, value in fields]), True)
        if not whole:
            self.send_reset(end.id, frames.NO_ERROR)
            self._finish(end, end.cause)

    def _abandon(self, end: ClientStream, code: int) -> None:
        """The client does not want the answer any more."""
        self._end_upstream(end, code)
        self._finish(end, None if end.local_done else Cause.CLIENT_GONE)

    def _end_upstream(self, end: ClientStream, code: int) -> None:
        other = end.other
        if isinstance(other, UpstreamStream) and other.waiting_at is not None:
            other.waiting_at.withdraw(other)
        elif other.conn is not None and not other.over:
            other.conn.cancel(other, code)
        drop(other)

    def _finish(self, end: ClientStream, cause: Cause | None) -> None:
        """The stream is closed here: forget it, tell the gate."""
        if end.over:
            return
        end.over = True
        del self.streams_by_id[end.id]
        self.forget_held(end)
        if end.other.over:
            part(end.other)
        if end.deciding:
            end.deciding = False
            self.gate.cancelled(end.id)
        elif end.attempts or end.exchange is not None:
            self.gate.finished(end.exchange, end.status, end.cause or cause, end.grpc_status, end)
        if (self._closing or self._peer_leaving) and not self.streams_by_id and not self.dead:
            self.leave()


def drop(end: StreamEnd) -> None:
    """Nothing more is sent upstream for this exchange."""
    if end.conn is not None:
        end.conn.holding.pop(end, None)
    drop_held(end)
    end.over = True
