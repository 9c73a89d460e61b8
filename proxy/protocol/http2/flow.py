"""Flow control and what is held because of it (RFC 9113 section 5.2, 6.9): windows of streams and of the connection, both directions.

Theory of operation. A request is two `StreamEnd`s, one on the client's connection and one on an upstream's, each the other's `other`.
DATA that arrives at one leaves at the other. The two kinds of credit are returned at different moments: the connection's on receipt, so
that a stream that nobody reads cannot freeze its neighbours; the stream's when its bytes were forwarded, so that a receiver that does not
read stops its own sender. What cannot leave (stream window, connection window, `sink.blocked`, or no upstream chosen yet) is held at the
end it will leave from, at most one stream window of it. Held data leaves in turns, one frame a stream, so that a long stream does not
starve a short one.

What follows DATA (END_STREAM, trailers) waits behind it: `fin`. Pure; the base of connection.py.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from proxy.protocol.http2 import frames
from proxy.protocol.http2.frames import ConnectionFault, StreamFault, head
from proxy.protocol.http2.hpack_codec import NO_TABLE
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.sides import Sink

_LARGE: Final = 2048  # bytes from which a copy costs more than a second entry in the queue
_EARNED: Final = 4  # control frames a DATA frame of ours entitles the peer to: two WINDOW_UPDATEs and two PINGs (BDP probes)


class StreamEnd:
    """One end of an exchange: a stream on one connection. The other end is `other`."""

    __slots__ = (
        "accepts_data", "conn", "credit", "expect", "fin", "held", "held_bytes", "id", "kept", "local_done", "other", "over", "owed",
        "progress", "remote_done", "sent", "stalled_s", "window",
    )  # fmt: skip

    other: StreamEnd

    def __init__(self, conn: FlowControl | None, stream_id: int, window: int, credit: int) -> None:
        self.conn = conn  # None while no connection carries it
        self.id = stream_id
        self.window = window  # bytes the peer lets us send
        self.credit = credit  # bytes we let the peer send
        self.owed = 0  # bytes forwarded whose credit was not returned yet
        # Bytes of body still due by content-length. Without one it begins at -1 and goes down, so that its first value minus this one is
        # always what has arrived.
        self.expect = -1
        self.held: deque[bytes] | None = None  # data waiting to be sent here
        self.held_bytes = 0
        self.fin: bytes | None = None  # what follows that data: b"" for END_STREAM, else an encoded trailer section
        self.kept: bytearray | None = None  # a copy of the data sent, for a retry
        self.accepts_data = True  # DATA may arrive here; at an upstream's end, once its final response head has
        self.remote_done = False  # the peer has sent END_STREAM
        self.local_done = False  # we have sent END_STREAM
        self.over = False  # closed in both directions
        self.sent = False  # some DATA or trailers were sent from here
        self.progress = False  # since the last tick, for the stall timeout
        self.stalled_s = 0.0


NOBODY: Final = StreamEnd(None, 0, 0, 0)
"""The other end of an exchange that is over: two ends that kept pointing at each other would be garbage that only the collector finds."""
NOBODY.over = True


class FlowControl:
    """The sending half of a connection and the bookkeeping of both directions' windows."""

    __slots__ = (
        "_backlog", "_half_stream", "_paused", "_prefix", "control_tokens", "credit", "dead", "half_connection", "held_from", "holding",
        "initial_window", "limits", "max_frame", "owed", "queue", "sink", "streams_by_id", "window",
    )  # fmt: skip

    def __init__(self, sink: Sink, limits: Http2Limits) -> None:
        self.sink = sink
        self.limits = limits
        self.queue = sink.queue
        self.dead = False
        self.streams_by_id: dict[int, StreamEnd] = {}
        self.window = 65535  # what the peer lets us send, all streams together
        self.initial_window = 65535
        self.max_frame = 16384
        self.credit = limits.connection_window
        self.owed = 0
        self.held_from = 0  # bytes this peer sent that are held at the other ends of its streams
        self.control_tokens = limits.control_budget
        self.holding: dict[StreamEnd, None] = {}
        self._half_stream = limits.stream_window // 2
        self.half_connection = limits.connection_window // 2
        self._prefix = NO_TABLE
        self._backlog = 0
        self._paused = False

    # ---- sending

    def control(self, frame: bytes) -> None:
        """Send a frame that flow control does not bound; a peer that lets too many of them pile up is no longer read."""
        if self.sink.blocked:
            self._backlog += len(frame)
            if self._backlog > self.limits.backlog_bytes and not self._paused:
                self._paused = True
                self.sink.pause()
        self.queue(frame)

    def send_block(self, end: StreamEnd, block: bytes, fin: bool) -> None:
        """Send HEADERS on a stream now."""
        self.send_head(end.id, block, fin)
        if fin:
            self.sent_fin(end)

    def send_head(self, stream_id: int, block: bytes, fin: bool) -> None:
        """Send a header block, the connection's first one after the announcement that we use no dynamic table."""
        if self._prefix:
            block, self._prefix = self._prefix + block, b""
        self.control(frames.header_block(stream_id, block, fin, self.max_frame))

    def sent_fin(self, end: StreamEnd) -> None:
        """END_STREAM left on this stream."""
        end.local_done = True
        if end.remote_done:
            self.stream_over(end)

    def cancel(self, end: StreamEnd, code: int) -> None:
        """The other end of an exchange is gone: reset this one."""
        raise NotImplementedError

    def stream_over(self, end: StreamEnd) -> None:
        """Both directions of a stream are done."""
        raise NotImplementedError

    def pump(self) -> None:
        """Send held data in turns, one frame a stream, until a window or the sink stops it."""
        turn = [end for end in self.holding if end.window > 0]
        while turn:
            again = []
            for end in turn:
                if self.sink.blocked or self.window <= 0:
                    return
                if not end.over:
                    self._send_held(end)
                    if end.held and end.window > 0:
                        again.append(end)
            turn = again

    def pump_stream(self, end: StreamEnd) -> None:
        """The same for one stream."""
        while end.held and end.window > 0 and self.window > 0 and not self.sink.blocked:
            self._send_held(end)
        if not end.held:
            self.send_fin(end)

    def _send_held(self, end: StreamEnd) -> None:
        held = end.held
        assert held
        chunk = held[0]
        size = min(len(chunk), end.window, self.window, self.max_frame)
        if size == len(chunk):
            held.popleft()
        else:
            chunk, held[0] = chunk[:size], chunk[size:]
        end.held_bytes -= size
        end.window -= size
        self.window -= size
        end.progress = end.sent = True
        if end.kept is not None:
            self._keep(end, chunk)
        self.control_tokens += _EARNED
        fin = not held and end.fin == b""
        self.queue(head(size << 8, fin, end.id))
        self.queue(chunk)
        source = end.other
        if source.conn is not None:
            source.conn.held_from -= size
            source.conn.give_back(source, size)
        if held:
            return
        if fin:
            self.holding.pop(end, None)
            end.fin = None
            self.sent_fin(end)
        else:
            self.send_fin(end)

    def _keep(self, end: StreamEnd, data: bytes) -> None:
        """Keep a copy of what was sent, for a retry; when it becomes longer than the limit, keep nothing."""
        kept = end.kept
        assert kept is not None
        kept += data
        if len(kept) > self.limits.replay_bytes:
            end.kept = None

    def send_fin(self, end: StreamEnd) -> None:
        """Send what follows the data of a stream, if that is known."""
        fin = end.fin
        self.holding.pop(end, None)
        if fin is None or end.over:
            return
        end.fin = None
        end.sent = True
        if fin:
            end.kept = None  # a request with trailers is too rare to be kept for a retry
            self.send_block(end, fin, True)
        else:
            self.queue(head(0, frames.END_STREAM, end.id))
            self.sent_fin(end)

    # ---- receiving

    def take(self, end: StreamEnd, payload: bytes, size: int, fin: bool) -> None:
        """DATA arrived at `end`: forward it, or hold it where it will leave. size: with padding. Raises StreamFault."""
        end.credit -= size
        if end.credit < 0:
            raise StreamFault(frames.FLOW_CONTROL_ERROR, "more data than the stream's window")
        length = len(payload)
        if end.expect >= 0:
            end.expect -= length
            if end.expect < 0 or (fin and end.expect):
                raise StreamFault(frames.PROTOCOL_ERROR, "content-length and data disagree")
        else:
            end.expect -= length
        if fin:
            end.remote_done = True
        to = end.other
        conn = to.conn
        if to.over or to.local_done:  # nobody wants it any more
            self.give_back(end, size)
        elif (
            conn is None or to.held or length > to.window or length > conn.window or length > conn.max_frame or conn.sink.blocked
        ):  # fmt: skip
            self._hold(to, payload, fin)
            if size > length:
                self.give_back(end, size - length)
        else:
            to.window -= length
            conn.window -= length
            conn.control_tokens += _EARNED
            to.sent = True
            if to.kept is not None:
                conn._keep(to, payload)
            if length >= _LARGE:
                conn.queue(head(length << 8, fin, to.id))
                conn.queue(payload)
            else:
                conn.queue(head(length << 8, fin, to.id) + payload)
            if fin:
                conn.sent_fin(to)
            else:
                self.give_back(end, size)
        if fin and end.local_done and not end.over:
            self.stream_over(end)

    def _hold(self, to: StreamEnd, payload: bytes, fin: bool) -> None:
        if payload:
            if to.held is None:
                to.held = deque()
            # Small pieces are joined: a deque of single bytes would cost sixty times what its window allows.
            if to.held and len(to.held[-1]) + len(payload) <= 2048:
                to.held[-1] += payload
            else:
                to.held.append(payload)
            to.held_bytes += len(payload)
            self.held_from += len(payload)
        if fin:
            to.fin = b""
        if to.conn is not None:
            to.conn.holding[to] = None
            to.conn.pump_stream(to)

    def take_trailers(self, end: StreamEnd, block: bytes) -> None:
        """A trailer section arrived, encoded to be sent on; b"" when it was empty. Raises StreamFault."""
        if end.expect > 0:
            raise StreamFault(frames.PROTOCOL_ERROR, "content-length and data disagree")
        end.remote_done = True
        to = end.other
        if not (to.over or to.local_done):
            to.fin = block
            if to.conn is not None and not to.held:
                to.conn.send_fin(to)
        if end.local_done and not end.over:
            self.stream_over(end)

    def give_back(self, end: StreamEnd, size: int) -> None:
        """Bytes of a stream were forwarded: return its credit once half a window is due."""
        end.owed += size
        if end.owed >= self._half_stream and not end.remote_done and not end.over:
            end.credit += end.owed
            self.control(frames.window_update(end.id, end.owed))
            end.owed = 0
        if self.owed >= self.half_connection:
            self.return_credit()

    def count_received(self, size: int) -> None:
        """A DATA frame of any stream arrived. Raises ConnectionFault."""
        self.credit -= size
        self.owed += size
        if self.credit < 0:
            raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "more data than the connection's window")
        if self.owed >= self.half_connection:
            self.return_credit()

    def return_credit(self) -> None:
        """Return the connection's credit, unless unread streams hold too much already."""
        if self.held_from <= self.limits.held_bytes and not self.dead:
            self.control(frames.window_update(0, self.owed))
            self.credit += self.owed
            self.owed = 0

    def forget_held(self, end: StreamEnd) -> None:
        """A stream ended early: drop what waits to be sent on it."""
        self.holding.pop(end, None)
        drop_held(end)

    # ---- what the peer says about windows

    def grow_window(self, end: StreamEnd | None, increment: int) -> None:
        """WINDOW_UPDATE. Raises ConnectionFault, or StreamFault when it is about a stream."""
        if end is None:
            self.window += increment
            if not increment or self.window > frames.MAX_WINDOW:
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR if increment else frames.PROTOCOL_ERROR, f"window increment {increment}")
            if self.holding:
                self.pump()
            return
        end.window += increment
        if not increment or end.window > frames.MAX_WINDOW:
            raise StreamFault(frames.FLOW_CONTROL_ERROR if increment else frames.PROTOCOL_ERROR, f"window increment {increment}")
        if end.held:
            self.pump_stream(end)

    def change_initial_window(self, value: int) -> None:
        """SETTINGS_INITIAL_WINDOW_SIZE: windows of all streams move, below zero if need be (RFC 9113 section 6.9.2)."""
        delta = value - self.initial_window
        self.initial_window = value
        for end in self.streams_by_id.values():
            end.window += delta
            if end.window > frames.MAX_WINDOW:
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "initial window makes a stream's window overflow")


def rewind(end: StreamEnd) -> bool:
    """Hold what was sent from this end again, as if it had just arrived, for another connection to send. False: not all of it was kept."""
    if not end.sent:
        return True
    kept, source = end.kept, end.other
    if kept is None or source.conn is None:
        return False
    size = len(kept)
    if size:
        if end.held is None:
            end.held = deque()
        end.held.appendleft(bytes(kept))
        end.held_bytes += size
        source.conn.held_from += size
        source.owed -= size  # its credit was returned already
        kept.clear()
    if source.remote_done and end.fin is None:
        end.fin = b""
    end.sent = False
    return True


def drop_held(end: StreamEnd) -> None:
    """Forget what waits to be sent at an end, and stop counting it against the connection it came from."""
    source = end.other.conn
    if source is not None and end.held_bytes:
        source.held_from -= end.held_bytes
        if source.owed >= source.half_connection:
            source.return_credit()
    end.held = None
    end.held_bytes = 0
    end.fin = None
