"""The exchanges on a client's connection: from the gate's verdict to the end, whatever the upstream's end reports.

Theory of operation. The gate's verdict opens a stream at an upstream or is an answer of ours. From then on upstream.py reports:
`upstream_responded`, `upstream_failed`, `unwanted`. A request that failed goes back to the gate when nobody has acted on it, or when its
rule has retries; else the client sees an answer of ours if no response has begun, or a reset.

For each request that the gate was asked about, exactly one of `Gate.finished` and (while a verdict is owed) `Gate.cancelled` is called at
the end; neither after an answer for which the gate left no note. Must not read requests, that is client.py. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy import rescue
from proxy.protocol.http2 import frames
from proxy.protocol.http2.blocks import ResponseHead, edited_response, without_names
from proxy.protocol.http2.connection import Connection
from proxy.protocol.http2.flow import StreamEnd, drop_held, rewind
from proxy.protocol.http2.hpack_codec import encode
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.http2.streams import ClientStream, UpstreamStream, unlink
from proxy.protocol.requests import IDEMPOTENT, Answer, Gate, Verdict
from proxy.protocol.sides import Sink
from proxy.rescue import UNREACHED, Cause

if TYPE_CHECKING:
    from proxy.protocol.http2.upstream import Http2Upstream


class Exchanges(Connection):
    """The part of Http2Client that upstream.py talks to."""

    __slots__ = ("_closing", "_peer_leaving", "gate")

    def __init__(self, sink: Sink, gate: Gate, limits: Http2Limits) -> None:
        super().__init__(sink, limits)
        self.gate = gate
        self._closing = False  # the final GOAWAY was sent: the connection ends with its last stream
        self._peer_leaving = False  # the client said GOAWAY: the same

    def _act(self, stream: ClientStream, verdict: Verdict) -> None:
        stream.exchange = verdict.exchange
        if isinstance(verdict, Answer):
            if verdict.exchange is None:
                stream.attempts = 0  # the gate has no note of it, and wants no `finished`
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

    # ---- what the upstream's end reports

    def upstream_responded(self, end: ClientStream, head: ResponseHead, fin: bool) -> None:
        """A response head, final or 1xx; fin: nothing follows it."""
        block = head.block
        if head.status >= 200:
            end.status = head.status
            rule = end.edit.response
            if rule is not None and (rule.strip or rule.add):
                block = edited_response(block, rule)
        elif self.sink.blocked and self._backlog > self.limits.backlog_bytes:
            return  # a 1xx may be dropped, other heads may not
        self.send_block(end, block, fin)

    def upstream_failed(self, end: ClientStream, cause: Cause, code: int | None, *, unprocessed: bool) -> None:
        """The upstream's end is gone before its response was complete. code: what it was reset with. unprocessed: nobody acted on it.

        The request is sent again through the gate where that is safe or its rule says so; else the client sees an answer, or RST_STREAM
        if it has seen the beginning of one.
        """
        other = end.other
        assert isinstance(other, UpstreamStream)
        self.forget_held(end)  # before `detach`, which forgets whose data this was
        other.detach()
        if end.over:
            return drop(other)
        if end.status:
            drop(other)
            self.send_reset(end.id, code or frames.INTERNAL_ERROR)
            return self._finish(end, cause)
        died = code is None and cause is Cause.UPSTREAM_RESET
        safe = unprocessed or (died and end.head.bodiless and end.head.method in IDEMPOTENT)
        most = self.limits.max_attempts if unprocessed and cause not in UNREACHED else 2
        if safe and end.attempts < most and rewind(other):
            verdict = self.gate.retry_unprocessed(end.exchange, end.head, end.id, cause)
            if verdict is None:
                end.deciding = True
                return None
            return self._act(end, verdict)
        if self._may_retry_by_rule(end, cause):
            return self._await_retry(end)
        drop(other)
        if code is None:
            return self._answer(end, cause, self.gate.explain)
        self.send_reset(end.id, code or frames.INTERNAL_ERROR)
        return self._finish(end, cause)

    def unwanted(self, end: ClientStream, status: int) -> bool:
        """Whether the rule wants a retry after a response of this status. If so, the client never sees it: the upstream drops the stream
        and calls `dismissed`."""
        rule = end.edit.response
        return (
            rule is not None
            and rule.retry_on is not None
            and status in rule.retry_on
            and not end.over
            and self._may_retry_by_rule(end, Cause.RETRIABLE_STATUS)
        )

    def dismissed(self, end: ClientStream) -> None:
        """The upstream has let go of a request because its response was `unwanted`."""
        other = end.other
        assert isinstance(other, UpstreamStream)
        self.forget_held(end)
        other.detach()
        self._await_retry(end)

    def _may_retry_by_rule(self, end: ClientStream, cause: Cause) -> bool:
        """Whether the gate sends the request again by its rule, although the app may have acted on it."""
        rule, other = end.edit.response, end.other
        if rule is None or rule.retry_on is None or end.head.connect or (other.sent and other.kept is None):
            return False
        return self.gate.retry_by_rule(end.exchange, end.id, cause)

    def _await_retry(self, end: ClientStream) -> None:
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
        """The client does not want the response any more."""
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
            unlink(end.other)
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
