"""The client's side of HTTP/1.1: reads requests one after the other, asks the gate where each goes, relays what comes back.

Theory of operation. The connection waits for a head, waits for the gate's verdict, relays a request body, waits for the rest of the
response, is a tunnel, throws a body away, lingers until the client has read its last response, or is closed. Bytes that arrive while they
cannot be used (pipelined requests, a body before the verdict) are held up to a bound, then reading stops. The next request is looked at
only when the exchange before it is over, so there is never more than one.

No byte of a request is sent on before it is certain what the request is: its head, and the part of the body that came with it, are checked
first, and a request with two readings is refused here. Responses are read by upstream.py; connection.py says what becomes of the connection
after them. Must not choose upstreams or look at policy. Pure; driven by the relay, or by a test.
"""

from __future__ import annotations

from proxy.protocol.http1.body import BodyError, Chunked, reader_of
from proxy.protocol.http1.connection import (
    BLOCKED,
    BODY,
    CLOSED,
    DECIDING,
    DISCARD,
    FOR_ANSWERS,
    FOR_HELD,
    FOR_UPSTREAM,
    HEAD,
    IDLE_TICKS,
    LINGER,
    TUNNEL,
    WAIT,
    ClientConnection,
)
from proxy.protocol.http1.edits import editor, final
from proxy.protocol.http1.heads import HeadError, RequestHead
from proxy.protocol.http1.parse import incomplete_untrusted, request_untrusted
from proxy.protocol.http1.upstream import REMEMBERED_BYTES, Http1Upstream
from proxy.protocol.requests import CONTENTLESS, Forward, HeadEdit, Verdict
from proxy.rescue import Cause


class Http1Client(ClientConnection):
    """Receiver of one client connection.

    sink: the connection. gate: decides about its requests. limits: what it may cost.
    """

    __slots__ = ()

    # What the gate and the owner call.

    def proceed(self, token: int, verdict: Verdict) -> None:
        """The verdict that the gate owed; ignored when it is about a request that is over."""
        if self._state == DECIDING and token == self._token:
            self._follow(verdict)

    def review(self) -> None:
        """Ask the gate again about the tunnel, if this is one; a request under way was decided on and is let finish."""
        if self._state == TUNNEL:
            cause = self._gate.tunnel(self._exchange, self.head)
            if cause is not None:
                self.fail(cause)

    def expire(self, token: int, cause: Cause) -> None:
        """The time for a request, or for one attempt at it, is over. Ignored when it is a tunnel by now, or not the present request."""
        up = self._up
        if token == self._token and up is not None and self._state != TUNNEL:
            up.cancel()
            self.upstream_broken(cause, False)

    def drain(self) -> None:
        """Finish the exchange under way with ``connection: close`` and take no other; close at once when there is none."""
        self._draining = True
        self.plain = False
        if self._state in (HEAD, BLOCKED) and not self._held:
            self._close()

    # What the relay calls.

    def received(self, data: bytes) -> None:
        """See sides.Receiver."""
        state = self._state
        if state == HEAD:
            if self._held:
                self._read_on(data)
            else:
                self._read(data)
        elif state == BODY:
            self._relay_body(data)
        elif state == TUNNEL:
            assert self._up is not None
            self._tunnelled += len(data)
            self._to_upstream(self._up, data)
        elif state == DISCARD:
            self._discard(data)
        elif state == LINGER:
            self._discardable -= len(data)
            if self._discardable < 0:
                self._close()
        elif state != CLOSED:
            self._hold(self._held + data)

    def ended(self) -> None:
        """See sides.Receiver."""
        self._ended = True
        state = self._state
        if state == TUNNEL:
            assert self._up is not None
            self._up.sink.end()
            self._close_tunnel()
        elif state == HEAD:
            self._next()
        elif state in (DISCARD, LINGER):
            self._close()
        elif state in (BODY, DECIDING) and not self.sent:
            begun = self._status
            self._leave()
            if begun:
                self.sink.abort()  # half a response must not end in order
            else:
                self._close()

    def lost(self, reset: bool) -> None:
        """See sides.Receiver."""
        self._leave()
        self._state = CLOSED

    def drained(self) -> None:
        """See sides.Receiver."""
        self._unread_ticks = 0
        if self._up is not None:
            self._up.client_drained()
        elif self._state == BLOCKED:
            self._state = HEAD
            self._resume_for(FOR_ANSWERS)
            self._next()

    def expired(self) -> None:
        """See sides.Receiver. A head has one deadline; idle time is counted in ticks, so that a request costs no call to the timer."""
        state = self._state
        if state == LINGER:
            return self._close()
        if self._head_due:
            return self._refuse(Cause.HEAD_TIMEOUT, "the request head did not arrive in time")
        self._quiet_ticks += 1
        if state in (HEAD, BLOCKED) and self._quiet_ticks >= IDLE_TICKS:
            return self._close()
        if state in (BODY, DISCARD) and not self._paused_for and self._quiet_ticks * self._tick >= self._limits.body_stall_s:
            if self._up is None:
                return self._close()
            self._closing = True
            return self.fail(Cause.BODY_TIMEOUT)
        self._unread_ticks = self._unread_ticks + 1 if self.sink.blocked else 0
        if state in (BODY, WAIT) and self._unread_ticks * self._tick >= self._limits.unread_s:
            self._leave()  # the app's connection must not wait for ever for who reads nothing
            return self.sink.abort()
        return self.sink.expire_after(self._tick)

    # Reading requests.

    def _read_on(self, data: bytes) -> None:
        """More of a head that was not complete."""
        known = len(self._held)
        self._held += data
        limits = self._limits
        try:
            if incomplete_untrusted(self._held, known, limits.head_bytes, limits.target_bytes):
                return None
        except HeadError as error:
            return self._refuse(error.cause, error.detail)
        data, self._held = self._held, b""
        return self._read(data)

    def _read(self, data: bytes) -> None:
        """Look at the bytes at the beginning of a request."""
        memo = self._memo
        if memo is not None and data.startswith(self._memo_bytes):
            head = memo
        else:
            if data.startswith(b"\r\n"):
                # RFC 9112 section 2.2: some clients end a body with one empty line too many.
                data = data[2:]
                if not data:
                    return
            fresh = self._parse(data)
            if fresh is None:
                return
            head = fresh
        self._quiet_ticks = 0
        if self._head_due:
            self._head_due = False
            self.sink.expire_after(self._tick)
        self.head = head
        self._token += 1
        if head.bodiless:
            self.plain = head.plain and not self._draining
            if len(data) != head.size:
                self._hold(data[head.size :])
        elif not self._begin_body(head, data[head.size :]):
            return
        verdict = self._gate.request(head, self._token)
        if verdict is None:
            self._state = DECIDING
            self._hold(self._held)
        else:
            self._follow(verdict)

    def _parse(self, data: bytes) -> RequestHead | None:
        """The head at the beginning of ``data``; None when it is not complete (then it is held) or was refused."""
        try:
            head = request_untrusted(data, self._limits)
        except HeadError as error:
            self._refuse(error.cause, error.detail)
            return None
        if head is None:
            self._held = data
            if not self._head_due:
                self._head_due = True
                self.sink.expire_after(self._limits.header_timeout_s)
        elif head.size <= REMEMBERED_BYTES:
            self._memo, self._memo_bytes = head, data[: head.size]
        return head

    def _begin_body(self, head: RequestHead, rest: bytes) -> bool:
        """Check the part of the body that came with its head. False: it was refused."""
        body = self._body = reader_of(head.length)
        try:
            self._checked = body.take_untrusted(rest, 0)
        except BodyError as error:
            self._refuse(Cause.BAD_REQUEST, str(error))
            return False
        self.sent = body.done
        self._continued = False
        self.plain = head.plain and body.done and not self._draining
        if self._ended and not body.done:
            self._refuse(Cause.BAD_REQUEST, "the connection ended in the middle of a request")
            return False
        self._held = rest
        return True

    def _hold(self, data: bytes) -> None:
        self._held = data
        if len(data) >= self._limits.held_bytes:
            self._pause_for(FOR_HELD)

    # Following the verdict.

    def _follow(self, verdict: Verdict) -> None:
        if verdict.__class__ is not Forward:
            self._exchange = verdict.exchange
            assert not isinstance(verdict, Forward)
            return self._answer(verdict.cause, verdict.explain, verdict.redirect)
        assert isinstance(verdict, Forward)
        up: Http1Upstream = verdict.upstream
        edit = verdict.edit
        self._exchange = verdict.exchange
        head = self.head
        if edit.response is not None:
            self.plain = False
        if head is self._edited and edit is self._edit:
            out = self._out
        else:
            if edit is not self._edit:
                self._edit = edit
                self._apply = editor(edit)
            out = self._apply(head)
            if head is self._memo:
                self._edited, self._out = head, out
        if not up.reusable:
            return self._retry_unprocessed(Cause.UPSTREAM_RESET)  # it died between the verdict and now
        self._up = up
        self._state = WAIT
        if head.bodiless:
            up.start(self, out)
            if up.sink.blocked:
                self._pause_for(FOR_UPSTREAM)
            return None
        return self._send_body(up, out, edit)

    def _send_body(self, up: Http1Upstream, out: bytes, edit: HeadEdit) -> None:
        """Send a head together with the part of its body that is there."""
        body, held, span = self._body, self._held, self._checked
        assert body is not None
        try:
            if isinstance(body, Chunked):
                body.forbid(edit.strip + edit.trailers)
        except BodyError:
            self._up = None
            up.unused()
            self._closing = True
            return self._answer(Cause.BAD_REQUEST, self._gate.explain)
        self._checked = 0
        self._resume_for(FOR_HELD)
        self._held = held[span:]
        if self.sent:
            self._hold(self._held)
        begun = held[:span]
        self._replay = begun if span <= self._limits.replay_bytes else None
        # A server that leaves this body unread would take it for a request that nobody decided on. A sidecar reads it.
        last = not up.meshed and self.head.method.upper() in CONTENTLESS
        up.start(self, (final(out) if last else out) + begun, last=last)
        if not self.sent:
            self._state = BODY
            if self._held:
                rest, self._held = self._held, b""
                return self._relay_body(rest)
        if up.sink.blocked:
            self._pause_for(FOR_UPSTREAM)
        return None

    def _relay_body(self, data: bytes) -> None:
        body, up = self._body, self._up
        assert body is not None
        assert up is not None
        self._quiet_ticks = 0
        if self._held:
            data = self._held + data
            self._held = b""
        try:
            end = body.take_untrusted(data, 0)
        except BodyError:
            up.cancel()
            self._up = None
            self._closing = True
            return self._fail(Cause.BAD_REQUEST)
        if body.done:
            self.sent = True
            self._state = WAIT
        if end:
            part = data if end == len(data) else data[:end]
            if self._replay is not None:
                self._replay = self._replay + part if len(self._replay) + end <= self._limits.replay_bytes else None
            self._to_upstream(up, part)
        if body.done:
            self._hold(data[end:])
        else:
            self._held = data[end:]  # an unfinished line of framing, bounded by the reader; it needs more bytes, so reading goes on
        return None

    def _next(self) -> None:
        """Look at the requests that are held, as long as each is over at once."""
        if self._pumping:
            return
        self._pumping = True
        while self._state == HEAD and self._held:
            held, self._held = self._held, b""
            self._read(held)
            if self._held and len(self._held) == len(held):
                break  # a head that is not complete
        self._pumping = False
        if self._ended and self._state == HEAD:
            if self._held:
                self._refuse(Cause.BAD_REQUEST, "the connection ended in the middle of a request")
            else:
                self._close()
