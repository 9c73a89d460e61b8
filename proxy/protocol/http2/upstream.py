"""An upstream's connection: we are the client end. Carries the requests of any number of clients' connections, each on a stream.

Theory of operation. `open` gives a request a stream of its own number; what comes back on it goes to the client's end of the exchange
(`stream.other`), whose connection decides what a failure means. A request waits here while the upstream reads nothing, has no stream
free, or (extended CONNECT) has not said yet what it supports; GOAWAY and loss hand the waiting ones back as unprocessed.

Must not: decide about requests, call gates. Called by the relay through `Receiver`, by exchanges.py, and by the pool through `open`,
`drain`, `streams`, `capacity`, `usable`.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.protocol.http2 import frames
from proxy.protocol.http2.blocks import RequestHead
from proxy.protocol.http2.connection import Connection
from proxy.protocol.http2.flow import StreamEnd
from proxy.protocol.http2.frames import ConnectionFault, StreamFault
from proxy.protocol.http2.hpack_codec import HeaderListTooLarge
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.http2.messages import Malformed
from proxy.protocol.http2.streams import ClientStream, UpstreamStream, unlink
from proxy.protocol.sides import Sink
from proxy.rescue import Cause

_ASSUMED_STREAMS = 100  # until the upstream said otherwise; RFC 9113 section 6.5.2 recommends that no peer allows fewer


class Http2Upstream(Connection):
    """Receiver of an upstream's connection.

    on_idle: called with this object when its last stream ended. on_gone: called once, when it takes no more requests; streams may
    still be running then. meshed: the other end is a sidecar whose identity was verified, so its `PROXY_ERROR` field is believed;
    anybody else's is removed.
    """

    __slots__ = (
        "_allowed", "_extended_connect", "_leaving", "_next_id", "_on_gone", "_on_idle", "_waiting",
    )  # fmt: skip

    def __init__(
        self,
        sink: Sink,
        limits: Http2Limits,
        on_idle: Callable[[Http2Upstream], None] = lambda _: None,
        on_gone: Callable[[Http2Upstream], None] = lambda _: None,
        *,
        meshed: bool = False,
    ) -> None:
        super().__init__(sink, limits)
        if meshed:
            self.blocks.believe()
        self._on_idle = on_idle
        self._on_gone = on_gone
        self._allowed = _ASSUMED_STREAMS
        self._extended_connect = False
        self._leaving = False
        self._next_id = 1
        self._waiting: dict[UpstreamStream, RequestHead] = {}
        pairs = (
            (frames.HEADER_TABLE_SIZE, 0),
            (frames.ENABLE_PUSH, 0),
            (frames.INITIAL_WINDOW_SIZE, limits.stream_window),
            (frames.MAX_FRAME_SIZE, limits.max_frame),
            (frames.MAX_HEADER_LIST_SIZE, limits.header_list_bytes),
        )
        self.queue(frames.PREFACE + frames.settings(pairs))
        if limits.connection_window > 65535:
            self.queue(frames.window_update(0, limits.connection_window - 65535))

    # ---- for the pool

    @property
    def streams(self) -> int:
        """Requests under way or waiting here."""
        return len(self.streams_by_id) + len(self._waiting)

    @property
    def capacity(self) -> int:
        """How many more requests would not have to wait; 0 when no more are taken."""
        return max(0, self._allowed - self.streams) if self.usable else 0

    @property
    def usable(self) -> bool:
        """Takes requests."""
        return not (self._leaving or self.dead)

    def drain(self) -> None:
        """Take no more requests; close when the last one is done."""
        self._take_no_more()
        if not self.streams and not self.dead:
            self.leave()

    # ---- for the client's end

    def open(self, stream: UpstreamStream, head: RequestHead) -> None:
        """Send a request, or keep it until that is possible."""
        if not self.usable:
            return _fail(stream, Cause.UPSTREAM_RESET, None, unprocessed=True)
        if self._waiting or self.sink.blocked or len(self.streams_by_id) >= self._allowed or (head.extended and not self._settled):
            self._waiting[stream] = head
            stream.waiting_at = self
            return None
        return self._start(stream, head)

    def cancel(self, end: StreamEnd, code: int) -> None:
        assert isinstance(end, UpstreamStream)
        self.send_reset(end.id, code)
        self._forget(end)

    def withdraw(self, stream: UpstreamStream) -> None:
        """The client left while its request waited."""
        self._waiting.pop(stream, None)
        stream.waiting_at = None

    def _start(self, stream: UpstreamStream, head: RequestHead) -> None:
        if head.extended and not self._extended_connect:
            return _fail(stream, Cause.UPSTREAM_PROTOCOL, None, unprocessed=False)
        client_end = stream.other
        assert isinstance(client_end, ClientStream)
        stream.conn = self
        stream.id = self.last_id = self._next_id
        self._next_id += 2
        stream.window = self.initial_window
        stream.credit = self.limits.stream_window
        stream.head = head
        self.streams_by_id[stream.id] = stream
        self.control_tokens += 4
        self.send_block(stream, head.encoded(client_end.edit), head.bodiless)
        if stream.held:
            self.holding[stream] = None
            self.pump_stream(stream)
        elif stream.fin is not None:
            self.send_fin(stream)
        if self._next_id > frames.MAX_STREAM_ID:
            self._take_no_more()
        return None

    def _start_waiting(self) -> None:
        while self._waiting and not self.sink.blocked and len(self.streams_by_id) < self._allowed and self._settled:
            stream = next(iter(self._waiting))
            head = self._waiting.pop(stream)
            stream.waiting_at = None
            self._start(stream, head)

    # ---- Connection

    def drained(self) -> None:
        """The sink took everything."""
        super().drained()
        self._start_waiting()

    def end_stalled(self, passed: float) -> None:
        super().end_stalled(passed)
        for stream in list(self._waiting):
            stream.stalled_s += passed
            if stream.stalled_s >= self.limits.stall_timeout_s and stream in self._waiting:
                self.withdraw(stream)
                _fail(stream, Cause.UPSTREAM_TIMEOUT, None, unprocessed=True)

    def busy(self) -> bool:
        return bool(self.streams_by_id or self._waiting)

    def on_setting(self, key: int, value: int) -> None:
        if key == frames.MAX_CONCURRENT_STREAMS:
            self._allowed = value
        elif key == frames.ENABLE_CONNECT_PROTOCOL:
            self._extended_connect = bool(value)
        elif key == frames.ENABLE_PUSH and value:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "an upstream that enables push")

    def on_settled(self) -> None:
        self._start_waiting()

    def on_block(self, stream_id: int, block: bytes, fin: bool) -> None:
        stream = self.streams_by_id.get(stream_id)
        if stream is None:
            self._on_stale(stream_id, frames.STREAM_CLOSED)
            return self.blocks.discard_untrusted(block)
        assert isinstance(stream, UpstreamStream)
        try:
            if stream.remote_done:
                self.blocks.discard_untrusted(block)
                raise StreamFault(frames.STREAM_CLOSED, "HEADERS after the end of the stream")
            if stream.accepts_data:
                trailers = self.blocks.trailers_untrusted(block, ())
                if not fin:
                    raise StreamFault(frames.PROTOCOL_ERROR, "trailers without END_STREAM")
                if (client_end := stream.other).__class__ is ClientStream:
                    assert isinstance(client_end, ClientStream)
                    client_end.grpc_status = trailers.grpc_status
                self.take_trailers(stream, trailers.block)
            else:
                self._on_response(stream, block, fin)
        except (Malformed, HeaderListTooLarge) as error:
            self.stream_fault(stream, StreamFault(frames.PROTOCOL_ERROR, str(error) or "header list too large"))
        except StreamFault as fault:
            self.stream_fault(stream, fault)
        return None

    def _on_response(self, stream: UpstreamStream, block: bytes, fin: bool) -> None:
        head = self.blocks.response_untrusted(block)
        client_end = stream.other
        assert isinstance(client_end, ClientStream)
        if head.status < 200:
            stream.informational += 1
            if fin or stream.informational > self.limits.max_informational:
                raise StreamFault(frames.PROTOCOL_ERROR, "1xx that ends the stream" if fin else "too many 1xx")
        else:
            if head.unreached is not None and not stream.informational:
                return self._on_unreached(stream, head.unreached, fin)
            if head.status >= 400 and client_end.client.unwanted(client_end, head.status):
                return self._dismiss(stream, client_end, fin)
            stream.accepts_data = True
            stream.kept = None
            client_end.grpc_status = head.grpc_status
            request = stream.head
            if request.method == b"HEAD" or head.status in (204, 304):
                stream.expect = stream.announced = 0
            elif not request.connect:
                stream.expect = stream.announced = head.content_length
                if fin and head.content_length > 0:
                    raise StreamFault(frames.PROTOCOL_ERROR, "content-length without data")
            elif head.status < 300 and not client_end.client.may_tunnel(client_end):
                return None
        stream.remote_done = fin
        client_end.client.upstream_responded(client_end, head, fin)
        if fin and stream.local_done and not stream.over:
            self.stream_over(stream)
        return None

    def _on_unreached(self, stream: UpstreamStream, cause: Cause, fin: bool) -> None:
        """The sidecar at the other end could not connect to its app: nobody acted on the request."""
        if not (fin and stream.local_done):
            self.send_reset(stream.id, frames.CANCEL)
        self._give_up(stream, cause, unprocessed=True)

    def _dismiss(self, stream: UpstreamStream, client_end: ClientStream, fin: bool) -> None:
        """The client will get another response instead of this one."""
        if not (fin and stream.local_done):
            self.send_reset(stream.id, frames.CANCEL)
        self._forget(stream)
        client_end.client.dismissed(client_end)

    def on_reset(self, end: StreamEnd, code: int) -> None:
        assert isinstance(end, UpstreamStream)
        whole, client_end = end.remote_done, end.other
        self._forget(end)
        if client_end.over:
            return
        assert isinstance(client_end, ClientStream)
        if whole and code == frames.NO_ERROR:
            client_end.client.no_more(client_end)
        else:
            client_end.client.upstream_failed(client_end, Cause.UPSTREAM_RESET, code, unprocessed=code == frames.REFUSED_STREAM)

    def on_goaway(self, last_id: int, code: int, debug: bytes) -> None:
        self._take_no_more()
        unseen = [end for end in self.streams_by_id.values() if end.id > last_id]
        self._fail_streams(unseen, unprocessed=True)
        self._fail_waiting()
        if not self.streams and not self.dead:
            self.leave()

    def stream_fault(self, end: StreamEnd, fault: StreamFault) -> None:
        assert isinstance(end, UpstreamStream)
        self.send_reset(end.id, fault.code)
        self._give_up(end, Cause.UPSTREAM_PROTOCOL, unprocessed=False)

    def stalled(self, end: StreamEnd) -> None:
        assert isinstance(end, UpstreamStream)
        self.send_reset(end.id, frames.CANCEL)
        self._give_up(end, Cause.UPSTREAM_TIMEOUT, unprocessed=False)

    def _give_up(self, end: UpstreamStream, cause: Cause, *, unprocessed: bool) -> None:
        client_end = end.other
        self._forget(end)
        if not client_end.over:
            assert isinstance(client_end, ClientStream)
            client_end.client.upstream_failed(client_end, cause, None, unprocessed=unprocessed)

    def stream_over(self, end: StreamEnd) -> None:
        assert isinstance(end, UpstreamStream)
        self._forget(end)

    def die(self) -> None:
        self._take_no_more()
        self.dead = True
        self.sink.expire_after(None)
        self._fail_streams(list(self.streams_by_id.values()), unprocessed=False)
        self._fail_waiting()

    def _take_no_more(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._on_gone(self)

    def _fail_streams(self, ends: list[StreamEnd], *, unprocessed: bool) -> None:
        for end in ends:
            assert isinstance(end, UpstreamStream)
            if not end.over:
                del self.streams_by_id[end.id]
                self.holding.pop(end, None)
                if end.other.over:
                    unlink(end)
                else:
                    _fail(end, Cause.UPSTREAM_RESET, None, unprocessed=unprocessed)

    def _fail_waiting(self) -> None:
        while self._waiting:
            stream, _ = self._waiting.popitem()
            stream.waiting_at = None
            _fail(stream, Cause.UPSTREAM_RESET, None, unprocessed=True)

    def _forget(self, end: UpstreamStream) -> None:
        """The stream is closed here."""
        end.over = True
        del self.streams_by_id[end.id]
        self.holding.pop(end, None)
        if end.other.over:
            unlink(end)
        if self._waiting:
            self._start_waiting()
        if not self.streams:
            if not self._leaving:
                self._on_idle(self)
            elif not self.dead:
                self.leave()


def _fail(stream: UpstreamStream, cause: Cause, code: int | None, *, unprocessed: bool) -> None:
    """Tell the client's end, which is not over, what became of its request here."""
    client_end = stream.other
    assert isinstance(client_end, ClientStream)
    client_end.client.upstream_failed(client_end, cause, code, unprocessed=unprocessed)
