"""One client connection of HTTP/1.1 apart from reading requests: its state, what the upstream reports, retries, and its end.

Theory of operation. A connection is in one of the states below. While an exchange is open, upstream.py reports how the response goes. A
request that failed is sent again through the gate when nobody has acted on it, or when its rule has retries; else the client sees an
answer, or a cut if one had begun. When the exchange is over, `_settle` decides what becomes of the connection: it reads the next request,
throws away what is left of a body whose response came early, or closes so that the client can still read its last response.

Must not read requests, that is client.py. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.protocol.http1.body import BodyError, BodyReader, Length
from proxy.protocol.http1.edits import editor, response_editor
from proxy.protocol.http1.heads import UNTIL_CLOSE, RequestHead, ResponseHead
from proxy.protocol.http1.limits import Http1Limits
from proxy.protocol.http1.responses import switching, translated
from proxy.protocol.http1.upstream import Http1Upstream
from proxy.protocol.requests import Gate, HeadEdit, Verdict
from proxy.protocol.sides import Sink
from proxy.rescue import Cause, Redirect, effect, http1_answer

HEAD: Final = 0  # idle, or a head is arriving
DECIDING: Final = 1  # the gate owes a verdict
BODY: Final = 2  # the request body is on its way
WAIT: Final = 3  # the request was sent, the response is not complete
TUNNEL: Final = 4
BLOCKED: Final = 5  # idle, but the client does not read the responses it has
DISCARD: Final = 6  # the response came early: the rest of the request body is thrown away
LINGER: Final = 7  # the last response was sent: whatever comes is thrown away
CLOSED: Final = 8

# Why the client's connection is paused: bits of `_paused_for`.
FOR_UPSTREAM: Final = 1
FOR_HELD: Final = 2
FOR_ANSWERS: Final = 4

IDLE_TICKS: Final = 4
NO_HEAD: Final = RequestHead(0, b"", b"", b"", b"")


class ClientConnection:
    """The part of Http1Client that upstream.py talks to.

    head: the present request. sent: all of it was sent. plain: a plain response to it may be sent on as it is. response_bytes: of the
    body of its response, or of what came through the tunnel.
    """

    __slots__ = (
        "_apply", "_body", "_checked", "_closing", "_continued", "_discardable", "_draining", "_edit", "_edited", "_ended", "_exchange",
        "_gate", "_head_due", "_held", "_limits", "_memo", "_memo_bytes", "_out", "_paused_for", "_pumping", "_quiet_ticks", "_replay",
        "_retried", "_state", "_status", "_tick", "_token", "_tunnelled", "_unread_ticks", "_up", "_up_ended", "head", "plain",
        "response_bytes", "sent", "sink",
    )  # fmt: skip

    def __init__(self, sink: Sink, gate: Gate, limits: Http1Limits | None = None) -> None:
        self.sink = sink
        self._gate = gate
        self._limits = limits or Http1Limits()
        self._state = HEAD
        self._held = b""  # bytes of the client that cannot be used yet
        # The last head and the bytes it came as, and what the last edit made of it: nearly every request repeats both.
        self._memo: RequestHead | None = None
        self._memo_bytes = b"\0"  # no head begins like this
        self._edit: HeadEdit | None = None
        self._apply = editor(HeadEdit())
        self._edited: RequestHead | None = None
        self._out = b""
        # The present exchange.
        self.head = NO_HEAD
        self._token = 0  # its number, for the gate
        self._exchange: object = None  # the gate's own note about it
        self._up: Http1Upstream | None = None
        self._body: BodyReader | None = None  # of the request
        self._checked = 0  # how much of `_held` is checked body
        self._replay: bytes | None = None  # the body as far as it was sent, while it may be sent again; None when it is too long
        self.sent = self.plain = True
        self._status = 0  # of the response that has begun
        self.response_bytes = 0
        self._tunnelled = 0  # bytes from the client through the tunnel
        self._discardable = 0  # bytes from the client that may still be thrown away
        self._continued = False  # the client was sent a 100
        self._retried = False  # once already, as unprocessed
        self._up_ended = False  # the upstream's direction of the tunnel
        # The connection.
        self._closing = False  # with the present response
        self._draining = False
        self._ended = False  # by the client
        self._pumping = False  # `_next` is running
        self._head_due = False  # the timer runs for a head that has begun, not for ticks
        self._paused_for = 0
        self._quiet_ticks = 0  # ticks without progress
        self._unread_ticks = 0  # ticks in which the client took nothing of what waits for it
        self._tick = self._limits.idle_timeout_s / IDLE_TICKS
        sink.expire_after(self._tick)

    def _follow(self, verdict: Verdict) -> None:
        """Do what the gate says about the present request."""
        raise NotImplementedError

    def _next(self) -> None:
        """Look at the requests that are held."""
        raise NotImplementedError

    def body_bytes(self) -> tuple[int, int]:
        """See requests.Bodies."""
        body = None if self.head.bodiless else self._body
        return self._tunnelled + (body.seen() if body is not None else 0), self.response_bytes

    # What upstream.py reports.

    def interim(self, head: ResponseHead) -> None:
        """A 1xx response. HTTP/1.0 clients do not know them (RFC 9110 section 15.2)."""
        if not self.head.old:
            self._continued = self._continued or head.status == 100
            self.sink.write(translated(head, self.head, close=False))

    def respond(self, head: ResponseHead, length: int, body: bytes) -> None:
        """The final response has begun: its head, the length of its body as in ResponseHead, and what is there of it."""
        request = self.head
        # Bytes behind a CONNECT that was turned down were meant for the tunnel: they must not be read as a request.
        close = self._draining or not request.keep or length == UNTIL_CLOSE or request.connects
        if not self.sent:
            # An early response. A client that waits for 100 Continue, or reads "close", may leave out the body that it announced.
            close = close or not head.keep or (request.expects and not self._continued)
        self._status = head.status
        self._closing = close
        self.sink.write(self._edited_response(translated(head, request, close)) + body)

    def responded(self, status: int, body_bytes: int, up: Http1Upstream, on_idle: Callable[[Http1Upstream], None] | None) -> None:
        """The response is complete. on_idle: to be told that the upstream is free, None when it is not."""
        exchange, self._exchange, self._up = self._exchange, None, None
        self.response_bytes = body_bytes
        self._gate.finished(exchange, status, None, -1, self)
        if on_idle is not None:
            on_idle(up)
        self._settle()

    def tunnel(self, status: int, head: ResponseHead, rest: bytes) -> None:
        """The connection is a tunnel from here on; rest: what the upstream sent after its head."""
        up = self._up
        assert up is not None
        refused = self._gate.tunnel(self._exchange, self.head)
        if refused is not None:
            return self.fail(refused)  # the policy has changed since the request
        self._status, self._state = status, TUNNEL
        self.response_bytes = len(rest)
        self.sink.write(self._edited_response(switching(head)) + rest)
        up.pace(self)
        self._resume_for(FOR_HELD)
        if self._held:
            held, self._held = self._held, b""
            self._tunnelled = len(held)
            self._to_upstream(up, held)
        if self._ended:
            up.sink.end()
        return None

    def _edited_response(self, wire: bytes) -> bytes:
        edit = self._edit
        rule = edit.response if edit is not None else None
        return response_editor(rule)(wire) if rule is not None and (rule.strip or rule.add) else wire

    def upstream_half_closed(self) -> None:
        """The upstream ended its direction of the tunnel."""
        self._up_ended = True
        self.sink.end()
        self._close_tunnel()

    def upstream_drained(self) -> None:
        """The upstream takes more."""
        self._resume_for(FOR_UPSTREAM)

    def upstream_broken(self, cause: Cause, stale: bool) -> None:
        """The exchange cannot be completed. stale: the connection had served before and closed before any byte of this response, as a
        pooled connection does whose server had just closed it."""
        self._up = None
        if stale and self.head.replayable and not self._retried:
            self._retry_unprocessed(cause)
        elif not self._retry_by_rule(cause):
            self._fail(cause)

    def upstream_unreached(self, cause: Cause) -> None:
        """Nothing of the request reached an app. cause: one of rescue.UNREACHED."""
        self._up = None
        if not self._retried and self._rewind():
            self._retry_unprocessed(cause)
        elif not self._retry_by_rule(cause):
            self._fail(cause)

    def unwanted(self, status: int) -> bool:
        """Whether the rule wants a retry after a response of this status. If so, the client never sees it, and the upstream drops it."""
        edit = self._edit
        rule = edit.response if edit is not None else None
        return rule is not None and rule.retry_on is not None and status in rule.retry_on and self._retry_by_rule(Cause.RETRIABLE_STATUS)

    # Retries.

    def _retry_by_rule(self, cause: Cause) -> bool:
        """Let the gate send the request again by its rule, although the app may have acted on it. False: there is no such retry."""
        edit, head = self._edit, self.head
        if edit is None or edit.response is None or edit.response.retry_on is None or self._status or head.upgrades or head.connects:
            return False
        if (self._replay is None and not head.bodiless) or not self._gate.retry_by_rule(self._exchange, self._token, cause):
            return False
        self._up = None
        self._rewind()
        self._resume_for(FOR_UPSTREAM)
        self._state = DECIDING
        return True

    def _rewind(self) -> bool:
        """Put what was sent of the body back into `_held`, as if it had just arrived. False: not all of it was kept."""
        if self.head.bodiless:
            return True
        kept, self._replay = self._replay, None
        if kept is None:
            return False
        self._held = kept + self._held
        self._checked = len(kept)
        return True

    def _retry_unprocessed(self, cause: Cause) -> None:
        """Nobody has acted on the request: let the gate send it elsewhere, but only once."""
        if self._retried:
            return self._fail(cause)
        self._retried = True
        self._resume_for(FOR_UPSTREAM)
        verdict = self._gate.retry_unprocessed(self._exchange, self.head, self._token, cause)
        if verdict is not None:
            return self._follow(verdict)
        self._state = DECIDING
        return None

    # Ending an exchange.

    def fail(self, cause: Cause) -> None:
        """End the exchange that is under way: an answer when none has begun, else a cut. For deadlines and withdrawn permits.

        A gate that still owes its verdict gives it as an Answer instead.
        """
        if self._up is not None:
            self._up.cancel()
            self._up = None
            self._fail(cause)

    def _fail(self, cause: Cause) -> None:
        """Tell the client by an answer; or cut the response that has begun, so that it does not look complete."""
        if not self._status:
            return self._answer(cause, self._gate.explain)
        exchange, self._exchange = self._exchange, None
        self._state = CLOSED
        self._held = b""
        self.sink.abort()
        return self._gate.finished(exchange, self._status, cause, -1, self)

    def _answer(self, cause: Cause, explain: bool, redirect: Redirect | None = None) -> None:
        head, row = self.head, effect(cause)
        keep = row.keep and head.keep and not (head.old or head.connects or self._closing or self._draining)
        keep = keep and (self.sent or (self._can_discard() and (self._continued or not head.expects)))
        self._closing = not keep
        self._state = WAIT
        self.sink.write(http1_answer(cause, close=not keep, explain=explain, redirect=redirect))
        exchange, self._exchange = self._exchange, None
        if exchange is not None and redirect is not None:
            self._gate.finished(exchange, redirect.status, None, -1, self)
        elif exchange is not None:
            self._gate.finished(exchange, row.status, cause, -1, self)
        self._settle()

    def _settle(self) -> None:
        """The exchange is over: on to the next request, or to the end of the connection."""
        self._status = self.response_bytes = 0
        self._retried = False
        self._replay = None
        if self.head is not self._memo:
            self.head = NO_HEAD  # an idle connection must not hold a large one
        if self._paused_for:
            self._resume_for(FOR_UPSTREAM | FOR_HELD)
        if self._closing or self._draining:
            self._close_after_answer()
        elif not self.sent:
            self._state = DISCARD
            self._discardable = self._limits.discard_bytes
            if self._can_discard():
                rest, self._held = self._held[self._checked :], b""
                self._checked = 0
                self._discard(rest)
            else:
                self._close_after_answer()
        else:
            if self._checked:
                self._held, self._checked = self._held[self._checked :], 0
            self._state = HEAD
            if self.sink.blocked:
                self._state = BLOCKED
                self._pause_for(FOR_ANSWERS)
            elif self._held or self._ended:
                self._next()

    def _can_discard(self) -> bool:
        """The rest of the request body may be short enough to be thrown away."""
        return not (isinstance(self._body, Length) and self._body.left > self._limits.discard_bytes)

    def _discard(self, data: bytes) -> None:
        body = self._body
        assert body is not None
        self._quiet_ticks = 0
        self._discardable -= len(data)
        if self._held:
            data = self._held + data
            self._held = b""
        try:
            end = body.take_untrusted(data, 0)
        except BodyError:
            return self._close_after_answer()
        self._held = data[end:]
        if body.done:
            self.sent = True
            self._settle()
        elif self._discardable < 0:
            self._close_after_answer()
        return None

    def _refuse(self, cause: Cause, detail: str) -> None:
        """Answer what never became a request, and close."""
        self._gate.refused(cause, detail)
        self.sink.write(http1_answer(cause, close=True, explain=self._gate.explain))
        self._close_after_answer()

    def _close_after_answer(self) -> None:
        """Close so that the client can read its response: closing over unread bytes would reset the connection and destroy it."""
        if self._ended or (self.sent and self._state != HEAD and not self._held):
            return self._close()
        self._held = b""
        self._state = LINGER
        self._head_due = False
        self._discardable = self._limits.discard_bytes
        self.sink.end()
        self._resume_for(FOR_UPSTREAM | FOR_HELD | FOR_ANSWERS)
        return self.sink.expire_after(self._limits.linger_s)

    def _close(self) -> None:
        self._state = CLOSED
        self._held = b""
        self.sink.close()

    def _close_tunnel(self) -> None:
        """Both directions have ended."""
        up = self._up
        if up is not None and self._ended and self._up_ended:
            self._up = None
            up.tunnel_closed()
            self._close()
            self._gate.finished(self._exchange, self._status, None, -1, self)

    def _leave(self) -> None:
        """The client is gone: give up what was under way for it."""
        up, self._up = self._up, None
        if self._state == DECIDING:
            self._gate.cancelled(self._token)
        elif up is not None:
            up.cancel()
            self._gate.finished(self._exchange, self._status, Cause.CLIENT_GONE, -1, self)
        self._state = CLOSED
        self._held = b""

    def _pause_for(self, reason: int) -> None:
        if not self._paused_for:
            self.sink.pause()
        self._paused_for |= reason

    def _resume_for(self, reasons: int) -> None:
        if self._paused_for & reasons:
            self._paused_for &= ~reasons
            if not self._paused_for:
                self.sink.resume()

    def _to_upstream(self, up: Http1Upstream, data: bytes) -> None:
        up.sink.write(data)
        if up.sink.blocked:
            self._pause_for(FOR_UPSTREAM)
