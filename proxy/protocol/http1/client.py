"""The client's side of HTTP/1.1: reads requests one after the other, asks the gate where each goes, relays what comes back.

Theory of operation. The connection waits for a head, waits for the gate's verdict, relays a request body, waits for the rest of the
response, is a tunnel, throws a body away, lingers until the client has read its last answer, or is closed. Bytes that arrive while they
cannot be used (pipelined requests, a body before the verdict) are held up to a bound, then reading stops. The next request is looked at
when the exchange before it is over, so there is never more than one.

What a request is must be certain before a byte of it is sent on: head and the part of the body that came with it are checked first, and a
request with two readings is answered here. What a response is, upstream.py finds out; this module says what becomes of the connection after
it. Must not choose upstreams or look at policy. Pure; driven by the relay, or by a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.protocol.http1.body import BodyError, BodyReader, Chunked, Length, reader_of
from proxy.protocol.http1.heads import UNTIL_CLOSE, HeadError, Http1Limits, RequestHead, ResponseHead, editor, incomplete_untrusted, request_untrusted
from proxy.protocol.http1.responses import switching, translated
from proxy.protocol.http1.upstream import REMEMBERED_BYTES, Http1Upstream
from proxy.protocol.requests import Forward, Gate, HeadEdit, Verdict
from proxy.protocol.sides import Sink
from proxy.rescue import Cause, effect, http1_answer

_HEAD: Final = 0  # idle, or a head is arriving
_DECIDING: Final = 1  # the gate owes a verdict
_BODY: Final = 2  # the request body is on its way
_WAIT: Final = 3  # the request was sent, the response is not complete
_TUNNEL: Final = 4
_BLOCKED: Final = 5  # idle, but the client does not read the answers it has
_DISCARD: Final = 6  # answered early: the rest of the request body is thrown away
_LINGER: Final = 7  # answered for the last time: whatever comes is thrown away
_CLOSED: Final = 8

# Why the client's connection is paused.
_FOR_UPSTREAM: Final = 1
_FOR_HELD: Final = 2
_FOR_ANSWERS: Final = 4

_IDLE_TICKS: Final = 4


class Http1Client:
    """Receiver of one client connection.

    gate: decides about its requests. `head`, `sent`, `plain`, `sink` are for upstream.py: the present request, whether all of it was sent,
    and whether a plain response to it may be sent on as it is.
    """

    __slots__ = (
        "_apply",
        "_body",
        "_closing",
        "_continued",
        "_draining",
        "_edit",
        "_edited",
        "_ended",
        "_exchange",
        "_gate",
        "_held",
        "_limits",
        "_memo",
        "_out",
        "_pumping",
        "_quiet",
        "_raw",
        "_retried",
        "_span",
        "_spare",
        "_state",
        "_status",
        "_stopped",
        "_tick",
        "_timing",
        "_token",
        "_up",
        "_up_ended",
        "head",
        "plain",
        "sent",
        "sink",
    )  # fmt: skip

    def __init__(self, sink: Sink, gate: Gate, limits: Http1Limits | None = None) -> None:
        self.sink = sink
        self._gate = gate
        self._limits = limits or Http1Limits()
        self._state = _HEAD
        self._held = b""
        self._raw = b"\0"  # no head begins like this
        self._memo: RequestHead | None = None  # the head that came as `_raw`
        self._edit: HeadEdit | None = None
        self._apply = editor(HeadEdit())
        self._edited: RequestHead | None = None  # the head that `_edit` turned into `_out`
        self._out = b""
        self.head = RequestHead(0, b"", b"", b"", b"", b"")
        self._token = 0
        self._exchange: object = None
        self._up: Http1Upstream | None = None
        self._body: BodyReader | None = None
        self._span = 0  # how much of `_held` is checked body
        self.sent = self.plain = True
        self._status = 0  # of the response that has begun
        self._spare = 0  # bytes that may still be thrown away
        self._closing = self._draining = self._ended = self._up_ended = False
        self._continued = self._retried = self._pumping = self._timing = False
        self._stopped = 0
        self._quiet = 0  # ticks without progress
        self._tick = self._limits.idle_timeout_s / _IDLE_TICKS
        sink.expire_after(self._tick)

    # What the gate and the owner call.

    def proceed(self, token: int, verdict: Verdict) -> None:
        """The gate's late verdict; ignored when it is not about the present request."""
        if self._state == _DECIDING and token == self._token:
            self._follow(verdict)

    def fail(self, cause: Cause) -> None:
        """End the exchange that is under way: an answer when none has begun, else a cut. For deadlines and withdrawn permits."""
        if self._up is not None:
            self._up.cancel()
            self._up = None
            self._fail(cause)

    def drain(self) -> None:
        """Finish the exchange under way with ``connection: close`` and take no other; close at once when there is none."""
        self._draining = True
        self.plain = False
        if self._state in (_HEAD, _BLOCKED) and not self._held:
            self._close()

    # What the relay calls.

    def received(self, data: bytes) -> None:
        """See sides.Receiver."""
        state = self._state
        if state == _HEAD:
            if self._held:
                self._read_on(data)
            else:
                self._read(data)
        elif state == _BODY:
            self._relay_body(data)
        elif state == _TUNNEL:
            assert self._up is not None
            self._to_upstream(self._up, data)
        elif state == _DISCARD:
            self._discard(data)
        elif state == _LINGER:
            self._spare -= len(data)
            if self._spare < 0:
                self._close()
        elif state != _CLOSED:
            self._hold(self._held + data)

    def ended(self) -> None:
        """See sides.Receiver."""
        self._ended = True
        state = self._state
        if state == _TUNNEL:
            assert self._up is not None
            self._up.sink.end()
            self._close_tunnel()
        elif state == _HEAD:
            self._next()
        elif state in (_DISCARD, _LINGER):
            self._close()
        elif state in (_BODY, _DECIDING) and not self.sent:
            self._leave()
            self._close()

    def lost(self, reset: bool) -> None:
        """See sides.Receiver."""
        self._leave()
        self._state = _CLOSED

    def drained(self) -> None:
        """See sides.Receiver."""
        if self._up is not None:
            self._up.client_drained()
        elif self._state == _BLOCKED:
            self._state = _HEAD
            self._go(_FOR_ANSWERS)
            self._next()

    def expired(self) -> None:
        """See sides.Receiver. A head has one deadline; idle time is counted in ticks, so that a request costs no call to the timer."""
        state = self._state
        if state == _LINGER:
            return self._close()
        if self._timing:
            return self._refuse(Cause.HEAD_TIMEOUT, "the request head did not arrive in time")
        self._quiet += 1
        if state in (_HEAD, _BLOCKED) and self._quiet >= _IDLE_TICKS:
            return self._close()
        if state in (_BODY, _DISCARD) and not self._stopped and self._quiet * self._tick >= self._limits.body_stall_s:
            if self._up is None:
                return self._close()
            self._closing = True
            return self.fail(Cause.BODY_TIMEOUT)
        return self.sink.expire_after(self._tick)

    # Reading requests.

    def _read_on(self, data: bytes) -> None:
        """More of a head that was not complete."""
        known = len(self._held)
        self._held += data
        limits = self._limits
        try:
            if incomplete_untrusted(self._held, known, limits.head_bytes, limits.target_bytes):
                return
        except HeadError as error:
            return self._refuse(error.cause, error.detail)
        data, self._held = self._held, b""
        return self._read(data)

    def _read(self, data: bytes) -> None:
        """Look at the bytes at the beginning of a request."""
        memo = self._memo
        if memo is not None and data.startswith(self._raw):
            head = memo
        else:
            if data.startswith(b"\r\n"):
                # RFC 9112 2.2: some clients end a body with one empty line too many.
                data = data[2:]
                if not data:
                    return
            fresh = self._parse(data)
            if fresh is None:
                return
            head = fresh
        self._quiet = 0
        if self._timing:
            self._timing = False
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
            self._state = _DECIDING
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
            if not self._timing:
                self._timing = True
                self.sink.expire_after(self._limits.header_timeout_s)
        elif head.size <= REMEMBERED_BYTES:
            self._memo, self._raw = head, data[: head.size]
        return head

    def _begin_body(self, head: RequestHead, rest: bytes) -> bool:
        """Check the part of the body that came with its head. False: it was refused."""
        body = self._body = reader_of(head.length)
        try:
            self._span = body.take_untrusted(rest, 0)
        except BodyError as error:
            self._refuse(Cause.BAD_REQUEST, str(error))
            return False
        self.sent = body.done
        self._continued = False
        self.plain = head.plain and body.done and not self._draining
        if self._ended and not body.done:
            self._refuse(Cause.BAD_REQUEST, "the connection ended in the middle of a request")
            return False
        self._hold(rest)
        return True

    def _hold(self, data: bytes) -> None:
        self._held = data
        if len(data) >= self._limits.held_bytes:
            self._stop(_FOR_HELD)

    # Following the verdict.

    def _follow(self, verdict: Verdict) -> None:
        if verdict.__class__ is not Forward:
            self._exchange = verdict.exchange
            assert not isinstance(verdict, Forward)
            return self._answer(verdict.cause, verdict.explain)
        assert isinstance(verdict, Forward)
        up: Http1Upstream
        up, edit, self._exchange = verdict
        head = self.head
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
            return self.upstream_broken(Cause.UPSTREAM_RESET, stale=True)
        self._up = up
        self._state = _WAIT
        if head.bodiless:
            up.start(self, out)
            if up.sink.blocked:
                self._stop(_FOR_UPSTREAM)
            return None
        return self._send_body(up, out, edit)

    def _send_body(self, up: Http1Upstream, out: bytes, edit: HeadEdit) -> None:
        """Send a head together with the part of its body that is there."""
        body, held, span = self._body, self._held, self._span
        assert body is not None
        try:
            if isinstance(body, Chunked):
                body.forbid(edit.strip)
        except BodyError:
            self._up = None
            up.unused()
            self._closing = True
            return self._answer(Cause.BAD_REQUEST, self._gate.explain)
        self._held, self._span = held[span:], 0
        up.start(self, out + held[:span])
        if not self.sent:
            self._state = _BODY
            self._go(_FOR_HELD)
            if self._held:
                rest, self._held = self._held, b""
                return self._relay_body(rest)
        if up.sink.blocked:
            self._stop(_FOR_UPSTREAM)
        return None

    def _relay_body(self, data: bytes) -> None:
        body, up = self._body, self._up
        assert body is not None
        assert up is not None
        self._quiet = 0
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
            self._state = _WAIT
        if end:
            self._to_upstream(up, data if end == len(data) else data[:end])
        if end != len(data):
            self._hold(data[end:])
        return None

    def _to_upstream(self, up: Http1Upstream, data: bytes) -> None:
        up.sink.write(data)
        if up.sink.blocked:
            self._stop(_FOR_UPSTREAM)

    # What upstream.py reports.

    def interim(self, head: ResponseHead) -> None:
        """A 1xx response. HTTP/1.0 clients do not know them (RFC 9110 15.2)."""
        if not self.head.old:
            self._continued = self._continued or head.status == 100
            self.sink.write(translated(head, self.head, close=False))

    def respond(self, head: ResponseHead, length: int, body: bytes) -> None:
        """The final response has begun: its head, the length of its body as in ResponseHead, and what is there of it."""
        request = self.head
        close = self._draining or not request.keep or length == UNTIL_CLOSE
        if not self.sent:
            # An early answer. Whether the client still sends the body it announced is only certain when nobody told it to wait or to stop.
            close = close or not head.keep or (request.expects and not self._continued)
        self._status = head.status
        self._closing = close
        self.sink.write(translated(head, request, close) + body)

    def responded(self, status: int, up: Http1Upstream, on_idle: Callable[[Http1Upstream], None] | None) -> None:
        """The response is complete. on_idle: to be told that the upstream is free, None when it is not."""
        exchange, self._exchange, self._up = self._exchange, None, None
        self._gate.finished(exchange, status, None)
        if on_idle is not None:
            on_idle(up)
        self._settle()

    def tunnel(self, status: int, head: ResponseHead, rest: bytes) -> None:
        """The connection is a tunnel from here on; rest: what the upstream sent after its head."""
        up = self._up
        assert up is not None
        self._status, self._state = status, _TUNNEL
        self.sink.write(switching(head) + rest)
        up.pace(self)
        self._go(_FOR_HELD)
        if self._held:
            held, self._held = self._held, b""
            self._to_upstream(up, held)
        if self._ended:
            up.sink.end()

    def upstream_half_closed(self) -> None:
        """The upstream ended its direction of the tunnel."""
        self._up_ended = True
        self.sink.end()
        self._close_tunnel()

    def upstream_drained(self) -> None:
        """The upstream takes more."""
        self._go(_FOR_UPSTREAM)

    def upstream_broken(self, cause: Cause, stale: bool) -> None:
        """The exchange cannot be completed. stale: the upstream had served before and died before any byte of this response."""
        self._up = None
        head = self.head
        if stale and head.replayable and not self._retried:
            self._retried = True
            self._go(_FOR_UPSTREAM)
            verdict = self._gate.retry(self._exchange, head, self._token)
            if verdict is not None:
                return self._follow(verdict)
            self._state = _DECIDING
            return None
        return self._fail(cause)

    # Ending an exchange.

    def _fail(self, cause: Cause) -> None:
        """Tell the client by an answer, or by cutting the response that has begun: it must never look complete."""
        if not self._status:
            return self._answer(cause, self._gate.explain)
        exchange, self._exchange = self._exchange, None
        self._state = _CLOSED
        self._held = b""
        self.sink.abort()
        return self._gate.finished(exchange, self._status, cause)

    def _answer(self, cause: Cause, explain: bool) -> None:
        head, row = self.head, effect(cause)
        keep = row.keep and head.keep and not (head.old or self._closing or self._draining)
        keep = keep and (self.sent or (self._can_discard() and (self._continued or not head.expects)))
        self._closing = not keep
        self.sink.write(http1_answer(cause, close=not keep, explain=explain, head_request=head.method == b"HEAD"))
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._gate.finished(exchange, row.status, cause)
        self._settle()

    def _settle(self) -> None:
        """The exchange is over: on to the next request, or to the end of the connection."""
        self._status = 0
        self._retried = False
        if self._stopped:
            self._go(_FOR_UPSTREAM | _FOR_HELD)
        if self._closing or self._draining:
            self._close_after_answer()
        elif not self.sent:
            self._state = _DISCARD
            self._spare = self._limits.discard_bytes
            if self._can_discard():
                rest, self._held = self._held[self._span :], b""
                self._span = 0
                self._discard(rest)
            else:
                self._close_after_answer()
        else:
            if self._span:
                self._held, self._span = self._held[self._span :], 0
            self._state = _HEAD
            if self.sink.blocked:
                self._state = _BLOCKED
                self._stop(_FOR_ANSWERS)
            elif self._held or self._ended:
                self._next()

    def _next(self) -> None:
        """Look at the requests that are held, as long as each is over at once."""
        if self._pumping:
            return
        self._pumping = True
        while self._state == _HEAD and self._held:
            held, self._held = self._held, b""
            self._read(held)
            if self._held and len(self._held) == len(held):
                break  # a head that is not complete
        self._pumping = False
        if self._ended and self._state == _HEAD:
            if self._held:
                self._refuse(Cause.BAD_REQUEST, "the connection ended in the middle of a request")
            else:
                self._close()

    def _can_discard(self) -> bool:
        """The rest of the request body may be short enough to be thrown away."""
        return not (isinstance(self._body, Length) and self._body.left > self._limits.discard_bytes)

    def _discard(self, data: bytes) -> None:
        body = self._body
        assert body is not None
        self._quiet = 0
        self._spare -= len(data)
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
        elif self._spare < 0:
            self._close_after_answer()
        return None

    def _refuse(self, cause: Cause, detail: str) -> None:
        """Answer what never became a request, and close."""
        self._gate.refused(cause, detail)
        self.sink.write(http1_answer(cause, close=True, explain=self._gate.explain))
        self._close_after_answer()

    def _close_after_answer(self) -> None:
        """Close so that the client can read its answer: closing over unread bytes would reset the connection and destroy it."""
        self._held = b""
        if self._ended or (self.sent and self._state != _HEAD and not self._held):
            return self._close()
        self._state = _LINGER
        self._timing = False
        self._spare = self._limits.discard_bytes
        self.sink.end()
        self._go(_FOR_UPSTREAM | _FOR_HELD | _FOR_ANSWERS)
        return self.sink.expire_after(self._limits.linger_s)

    def _close(self) -> None:
        self._state = _CLOSED
        self._held = b""
        self.sink.close()

    def _close_tunnel(self) -> None:
        """Both directions have ended."""
        up = self._up
        if up is not None and self._ended and self._up_ended:
            self._up = None
            up.tunnel_closed()
            self._close()
            self._gate.finished(self._exchange, self._status, None)

    def _leave(self) -> None:
        """The client is gone: give up what was under way for it."""
        up, self._up = self._up, None
        if self._state == _DECIDING:
            self._gate.cancelled(self._token)
        elif up is not None:
            up.cancel()
            self._gate.finished(self._exchange, self._status, Cause.CLIENT_GONE)
        self._state = _CLOSED
        self._held = b""

    def _stop(self, reason: int) -> None:
        if not self._stopped:
            self.sink.pause()
        self._stopped |= reason

    def _go(self, reasons: int) -> None:
        if self._stopped & reasons:
            self._stopped &= ~reasons
            if not self._stopped:
                self.sink.resume()
