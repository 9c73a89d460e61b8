"""The upstream's side of HTTP/1.1: one exchange at a time, the response relayed as received.

Theory of operation. An upstream connection is idle, waits for a response head, relays a body, is a tunnel, or is gone. The client's engine
starts an exchange by handing over the request's first bytes. Fast path: when head and body of a response arrive in one read, need no
change and end exactly where the read ends, `received` finishes the exchange with a single write to the client. Everything else takes the
general path in `_respond`.

An upstream is offered for reuse only when nothing is open: the whole request was sent, the response ended by its own framing, nothing
followed it and both ends keep the connection. In any other case it is closed: the next response on it might belong to an earlier request.
This module must not decide anything about requests; it talks to connection.py only. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from proxy.protocol.http1.body import BodyError, BodyReader, reader_of
from proxy.protocol.http1.heads import CHUNKED, UNTIL_CLOSE, HeadError, ResponseHead, without
from proxy.protocol.http1.parse import incomplete_untrusted, response_untrusted
from proxy.protocol.sides import Sink
from proxy.rescue import PROXY_ERROR, Cause, unreached

if TYPE_CHECKING:
    from proxy.protocol.http1.connection import ClientConnection

_IDLE: Final = 0
_HEAD: Final = 1
_BODY: Final = 2
_TUNNEL: Final = 3
_GONE: Final = 4

RESPONSE_HEAD_BYTES: Final = 65536
INTERIM_RESPONSES: Final = 64  # of one exchange
REMEMBERED_BYTES: Final = 2048  # heads up to this size are remembered, in case the next one is the same


class Http1Upstream:
    """Receiver of one upstream connection.

    on_idle: the exchange is over and the connection may serve another one. on_gone: called once, when the connection is given up for
    whatever reason, `close` included. Both are called outside of any exchange and may not start one before they return. meshed: the
    other end is a sidecar whose identity was verified, so its `PROXY_ERROR` field is believed; anybody else's is removed.
    """

    __slots__ = (
        "_body", "_client", "_head", "_held", "_interims", "_last", "_memo", "_memo_bytes", "_on_gone", "_on_idle", "_paused", "_state",
        "meshed", "served", "sink",
    )  # fmt: skip

    def __init__(
        self, sink: Sink, on_idle: Callable[[Http1Upstream], None], on_gone: Callable[[Http1Upstream], None], *, meshed: bool = False
    ) -> None:
        self.sink = sink
        self.meshed = meshed
        self.served = 0
        """Exchanges completed. With at least one, a sudden end is taken for that of a stale pooled connection."""
        self._on_idle = on_idle
        self._on_gone = on_gone
        self._client: ClientConnection | None = None
        self._state = _IDLE
        self._held = b""  # the beginning of a head, chunk-size line or trailer section
        self._head: ResponseHead | None = None  # the final response being relayed
        self._body: BodyReader | None = None
        self._interims = 0
        self._paused = self._last = False
        self._memo_bytes = b"\0"  # no head begins like this
        self._memo: ResponseHead | None = None

    @property
    def reusable(self) -> bool:
        """Idle and alive."""
        return self._state == _IDLE

    def close(self) -> None:
        """Close an idle connection; one that serves an exchange is cut, and its client hears of it."""
        if self._state == _IDLE:
            self._give_up(self.sink.close)
        elif self._state != _GONE:
            self._broken(Cause.UPSTREAM_RESET)

    # What the client's engine calls.

    def start(self, client: ClientConnection, data: bytes, *, last: bool = False) -> None:
        """Begin an exchange with the first bytes of a request. Raises RuntimeError when the connection is not `reusable`.

        last: they say that no other request follows.
        """
        if self._state != _IDLE:
            raise RuntimeError("an HTTP/1.1 upstream serves one exchange at a time")
        self._client = client
        self._state = _HEAD
        self._last = last
        self.sink.write(data)

    def unused(self) -> None:
        """The client's side refused the request before a byte of it was sent."""
        self._on_idle(self)

    def cancel(self) -> None:
        """The client's side gives up the exchange."""
        if self._state != _GONE:
            self._give_up(self.sink.abort)

    def client_drained(self) -> None:
        """The client takes more."""
        if self._paused:
            self._paused = False
            self.sink.resume()

    def tunnel_closed(self) -> None:
        """Both directions of a tunnel have ended."""
        self._give_up(self.sink.close)

    # What the relay calls.

    def received(self, data: bytes) -> None:
        """See sides.Receiver."""
        state = self._state
        if state == _HEAD:
            client = self._client
            assert client is not None
            if self._held:
                known, self._held = len(self._held), self._held + data
                if not self._is_head(known):
                    return
                data, self._held = self._held, b""
            memo = self._memo
            if memo is not None and data.startswith(self._memo_bytes):
                head = memo
            else:
                fresh = self._read_head(data)
                if fresh is None:
                    return
                head = fresh
            if head.plain and client.plain and len(data) - head.size == head.length:
                client.sink.write(data)
                self._complete(client, head.status, head.keep, head.length)
            else:
                self._respond(client, head, data)
        elif state == _BODY:
            self._relay(data)
        elif state == _TUNNEL:
            assert self._client is not None
            self._client.response_bytes += len(data)
            self._to_client(self._client, data)
        elif state == _IDLE:
            self._give_up(self.sink.abort)  # a response that nobody asked for: the next one could be the wrong client's

    def ended(self) -> None:
        """See sides.Receiver."""
        if self._state == _BODY and self._head is not None and self._head.length == UNTIL_CLOSE:
            client, body = self._client, self._body
            assert client is not None
            assert body is not None
            self._complete(client, self._head.status, False, body.seen())
        elif self._state == _TUNNEL:
            assert self._client is not None
            self._client.upstream_half_closed()
        elif self._state == _IDLE:
            self._give_up(self.sink.close)
        elif self._state != _GONE:
            self._broken(Cause.UPSTREAM_RESET)  # before its response was complete

    def lost(self, reset: bool) -> None:
        """See sides.Receiver."""
        if self._state == _IDLE:
            self._give_up(None)
        elif self._state != _GONE:
            self._broken(Cause.UPSTREAM_RESET)

    def drained(self) -> None:
        """See sides.Receiver."""
        if self._client is not None:
            self._client.upstream_drained()

    def expired(self) -> None:
        """See sides.Receiver: the owner's idle timer."""
        if self._state == _IDLE:
            self._give_up(self.sink.close)

    # Reading the response.

    def _is_head(self, known: int) -> bool:
        """Whether what is held is a whole head; when it cannot become one, the exchange is broken off."""
        try:
            return not incomplete_untrusted(self._held, known, RESPONSE_HEAD_BYTES, RESPONSE_HEAD_BYTES)
        except HeadError:
            self._broken(Cause.UPSTREAM_PROTOCOL)
            return False

    def _read_head(self, data: bytes) -> ResponseHead | None:
        """The head at the beginning of ``data``, or None when it is not complete or was refused."""
        try:
            head = response_untrusted(data, RESPONSE_HEAD_BYTES)
        except HeadError:
            self._broken(Cause.UPSTREAM_PROTOCOL)
            return None
        if head is None:
            self._held = data
            return None
        if head.error is not None and not self.meshed:
            head.wire = without(head.wire, (PROXY_ERROR,))
            head.error = None
        if head.size <= REMEMBERED_BYTES:
            self._memo, self._memo_bytes = head, head.received
        return head

    def _respond(self, client: ClientConnection, head: ResponseHead, data: bytes) -> None:
        """Relay a response head and what came with it, whatever its kind."""
        request = client.head
        status = head.status
        if status == 101 or (request.connects and 200 <= status < 300):
            if status == 101 and not (request.upgrades and client.sent):
                return self._broken(Cause.UPSTREAM_PROTOCOL)  # a 101 that nobody asked for
            self._state = _TUNNEL
            client.tunnel(status, head, data[head.size :])
            return None
        if status < 200:
            return self._interim(client, head, data)
        if head.error is not None and not self._interims:
            cause = unreached(head.error)
            if cause is not None:
                return self._unreached(client, head, data, cause)
        length = 0 if request.method == b"HEAD" or status in (204, 304) else head.length
        if status >= 400 and client.unwanted(status):
            return self._dismiss(client, head, length, data)
        if length == CHUNKED and request.old:
            return self._broken(Cause.UPSTREAM_PROTOCOL)
        body = reader_of(length)
        end = head.size
        try:
            if not body.done:
                end = body.take_untrusted(data, end)
        except BodyError:
            return self._broken(Cause.UPSTREAM_PROTOCOL)
        client.respond(head, length, data[head.size : end])
        self._head = head
        self._body = body
        self._state = _BODY
        self._after_span(client, body, data, end)
        return None

    def _interim(self, client: ClientConnection, head: ResponseHead, data: bytes) -> None:
        """Relay a 1xx response (RFC 9110 section 15.2) and go on with what follows it."""
        self._interims += 1
        if self._interims > INTERIM_RESPONSES:
            return self._broken(Cause.UPSTREAM_PROTOCOL)
        client.interim(head)
        rest = data[head.size :]
        if rest:
            self.received(rest)
        return None

    def _relay(self, data: bytes) -> None:
        client, body = self._client, self._body
        assert client is not None
        assert body is not None
        if self._held:
            data = self._held + data
            self._held = b""
        try:
            end = body.take_untrusted(data, 0)
        except BodyError:
            return self._broken(Cause.UPSTREAM_PROTOCOL)
        if end:
            self._to_client(client, data if end == len(data) else data[:end])
        self._after_span(client, body, data, end)
        return None

    def _after_span(self, client: ClientConnection, body: BodyReader, data: bytes, end: int) -> None:
        if body.done:
            assert self._head is not None
            self._complete(client, self._head.status, self._head.keep and end == len(data), body.seen())
        else:
            self._held = data[end:]
            self.pace(client)

    def _to_client(self, client: ClientConnection, data: bytes) -> None:
        client.sink.write(data)
        self.pace(client)

    def pace(self, client: ClientConnection) -> None:
        """Stop reading while the client does not read."""
        if client.sink.blocked and not self._paused:
            self._paused = True
            self.sink.pause()

    # The end of an exchange, and of the connection.

    def _unreached(self, client: ClientConnection, head: ResponseHead, data: bytes, cause: Cause) -> None:
        """The sidecar at the other end could not connect to its app: the request may go elsewhere, the connection serve others."""
        self._dismiss(client, head, head.length, data)
        client.upstream_unreached(cause)

    def _dismiss(self, client: ClientConnection, head: ResponseHead, length: int, data: bytes) -> None:
        """The client will get another response instead. If all of this one has arrived, the connection can be used again."""
        if head.keep and client.sent and not self._last and len(data) - head.size == length:
            self._client = None
            self._state = _IDLE
            self.served += 1
            self._interims = 0
            self._on_idle(self)
        else:
            self._give_up(self.sink.close if client.sent else self.sink.abort)

    def _complete(self, client: ClientConnection, status: int, keep: bool, body_bytes: int) -> None:
        """The whole response went to the client."""
        self._client = None
        if keep and client.sent and not self._last:
            self._state = _IDLE
            self.served += 1
            self._body = self._head = None
            self._interims = 0
            if self._paused:
                self.client_drained()
            client.responded(status, body_bytes, self, self._on_idle)
        else:
            self._give_up(self.sink.close if client.sent else self.sink.abort)
            client.responded(status, body_bytes, self, None)

    def _broken(self, cause: Cause) -> None:
        """The exchange cannot be completed."""
        client, untouched = self._client, self._state == _HEAD and not self._held and not self._interims
        assert client is not None
        stale = untouched and self.served > 0 and cause is Cause.UPSTREAM_RESET
        self._give_up(self.sink.abort)
        client.upstream_broken(cause, stale)

    def _give_up(self, end: Callable[[], None] | None) -> None:
        client, body = self._client, self._body
        if client is not None and body is not None:
            client.response_bytes = body.seen()
        self._state = _GONE
        self._client = None
        self._body = self._head = self._memo = None
        self._held = self._memo_bytes = b"\0"
        if end is not None:
            end()
        self._on_gone(self)
