"""What both ends of the engine share: the scan over frames, and every frame that is about the connection (RFC 9113 sections 4 to 6).

Theory of operation. `received` walks the bytes once. DATA and HEADERS go to the stream they name; the rest is small and goes through one
table. Two exceptions carry errors up: `StreamFault` ends a stream with RST_STREAM, `ConnectionFault` the connection with GOAWAY.

Pure; the base of exchanges.py, which client.py is built on, and of upstream.py.
"""

from __future__ import annotations

from typing import Final

from proxy.protocol.http2 import frames
from proxy.protocol.http2.blocks import BlockReader
from proxy.protocol.http2.flow import StreamEnd
from proxy.protocol.http2.frames import ConnectionFault, StreamFault
from proxy.protocol.http2.lifetime import Lifetime
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.sides import Sink

_unpack: Final = frames.HEAD.unpack_from


class Connection(Lifetime):
    """One HTTP/2 connection, seen from either end."""

    __slots__ = ("_block", "_block_fin", "_block_size", "_largest", "_rest", "_table_acked", "_unusual", "blocks")

    def __init__(self, sink: Sink, limits: Http2Limits) -> None:
        super().__init__(sink, limits)
        self.blocks = BlockReader(limits)
        self._rest = b""  # the beginning of a frame
        self._largest = limits.max_frame << 8 | 0xFF
        self._unusual = True  # only one kind of frame may come next: the first SETTINGS, or CONTINUATION
        self._block: list[bytes] = []  # the parts of the header block of `_block_id`
        self._block_size = 0  # bytes of these
        self._block_fin = False  # its HEADERS had END_STREAM
        self._table_acked = False  # the peer has acknowledged SETTINGS of ours

    # ---- Receiver

    def received(self, data: bytes) -> None:
        """Bytes arrived."""
        if self.dead:
            return
        try:
            self._scan(data)
        except ConnectionFault as fault:
            self.fail(fault.code, fault.detail)

    def drained(self) -> None:
        """The sink took everything: go on."""
        if self.dead:
            return
        self._backlog = 0
        self._blocked_s = 0.0
        if self._paused:
            self._paused = False
            self.sink.resume()
        if self.holding:
            self.pump()

    # ---- what the ends decide

    def on_block(self, stream_id: int, block: bytes, fin: bool) -> None:
        """A whole header block. Raises ConnectionFault."""
        raise NotImplementedError

    def on_reset(self, end: StreamEnd, code: int) -> None:
        """RST_STREAM for a stream that is open here."""
        raise NotImplementedError

    def on_goaway(self, last_id: int, code: int, debug: bytes) -> None:
        """The peer will open (or look at) no stream above last_id."""
        raise NotImplementedError

    def on_setting(self, key: int, value: int) -> None:
        """A setting that only one end has a use for."""

    def on_settled(self) -> None:
        """A SETTINGS frame was applied."""

    def on_ping_ack(self, opaque: bytes) -> None:
        """The peer answered a PING of ours."""

    def stream_fault(self, end: StreamEnd, fault: StreamFault) -> None:
        """The peer broke a rule on an open stream."""
        raise NotImplementedError

    # ---- frames

    def _scan(self, data: bytes) -> None:
        rest = self._rest
        if not rest:
            self._frames(data, 0)
            return
        missing = 9 + (frames.length_of(rest)) - len(rest) if len(rest) >= 9 else len(data)
        if missing >= len(data):
            self._frames(rest + data, 0)
            return
        self._frames(rest + data[:missing], 0)  # only the frame that the read before began: joining it with all of `data` would copy much
        if not self.dead:
            self._frames(data, missing)

    def _frames(self, data: bytes, at: int) -> None:
        size = len(data)
        while size - at >= 9:
            word, flags, stream_id = _unpack(data, at)
            if word > self._largest:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, f"frame of {word >> 8} bytes")
            start = at + 9
            at = start + (word >> 8)
            if at > size:
                at = start - 9
                break
            kind = word & 0xFF
            if self._unusual:
                self._expect(kind, flags, stream_id)
            if kind == 0:
                self._on_data(data, start, at, flags, stream_id & 0x7FFFFFFF)
            elif kind == 1:
                self._on_headers(data, start, at, flags, stream_id & 0x7FFFFFFF)
            else:
                self._on_other(kind, flags, stream_id & 0x7FFFFFFF, data[start:at])
            if self.dead:
                return
        self._rest = data[at:] if at < size else b""

    def _expect(self, kind: int, flags: int, stream_id: int) -> None:
        if self._block_id:
            if kind != frames.CONTINUATION or stream_id & 0x7FFFFFFF != self._block_id:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "header block interrupted")
        elif kind != frames.SETTINGS or flags & frames.ACK:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        else:
            self._unusual = False

    def _on_data(self, data: bytes, start: int, stop: int, flags: int, stream_id: int) -> None:
        size = stop - start
        self.count_received(size)
        if flags & frames.PADDED:
            start, stop = frames.strip_padding(start, stop, data, frames.PADDED)
        if start == stop and not flags & 1:
            self.spend()
        end = self.streams_by_id.get(stream_id)
        if end is None:
            return self._on_stale(stream_id, frames.STREAM_CLOSED)
        try:
            if end.remote_done:
                raise StreamFault(frames.STREAM_CLOSED, "data after the end of the stream")
            if not end.accepts_data:
                raise StreamFault(frames.PROTOCOL_ERROR, "data before a response head")
            self.take(end, data[start:stop], size, bool(flags & 1))
        except StreamFault as fault:
            self.stream_fault(end, fault)
        return None

    def _on_stale(self, stream_id: int, code: int) -> None:
        """A frame for a stream that is not open: it is late, or the stream never was."""
        if stream_id in self._reset_ids:
            return
        self.spend()
        if stream_id == 0 or self.is_idle(stream_id):
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"frame for stream {stream_id}, which was never opened")
        if code:
            self.spend_reset()
            self.send_reset(stream_id, code)

    def is_idle(self, stream_id: int) -> bool:
        """Neither end has opened this stream."""
        return not stream_id & 1 or stream_id > self.last_id

    def _on_headers(self, data: bytes, start: int, stop: int, flags: int, stream_id: int) -> None:
        if flags & (frames.PADDED | frames.HAS_PRIORITY):
            start, stop = frames.strip_padding(start, stop, data, flags)
            if flags & frames.HAS_PRIORITY:
                refuse_self_dependency(stream_id, data[start - 5 : start - 1])
        if flags & frames.END_HEADERS:
            return self.on_block(stream_id, data[start:stop], bool(flags & 1))
        if stream_id == 0:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "HEADERS on stream 0")
        self._block_id = stream_id
        self._block = [data[start:stop]]
        self._block_size = stop - start
        self._block_fin = bool(flags & 1)
        self._block_s = 0.0
        self._unusual = True
        if self._timer_s > self.limits.head_timeout_s:  # only ever earlier: header blocks in pieces must not put the tick off for ever
            self._arm(self.limits.head_timeout_s)
        return None

    def _on_continuation(self, flags: int, payload: bytes) -> None:
        if not self._block_id:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._block.append(payload)
        self._block_size += len(payload)
        if self._block_size > self.limits.header_list_bytes * 2 or len(self._block) > self.limits.max_continuations + 1:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "header block too long")
        if flags & frames.END_HEADERS:
            stream_id, block = self._block_id, b"".join(self._block)
            self._block_id, self._block, self._unusual = 0, [], False
            if self._timer_s > self.limits.tick_s:
                self._arm(self.limits.tick_s)
            self.on_block(stream_id, block, self._block_fin)

    def _on_other(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == frames.CONTINUATION:
            return self._on_continuation(flags, payload)
        self.spend()
        if kind == frames.WINDOW_UPDATE:
            self._on_window_update(stream_id, payload)
        elif kind == frames.RST_STREAM:
            self._on_rst_stream(stream_id, payload)
        elif kind == frames.PRIORITY:
            self._on_priority(stream_id, payload)
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "PUSH_PROMISE, which we do not allow")
        elif kind in (frames.SETTINGS, frames.PING, frames.GOAWAY):
            if stream_id:
                raise ConnectionFault(frames.PROTOCOL_ERROR, f"frame of type {kind} on stream {stream_id}")
            if kind == frames.SETTINGS:
                self._on_settings(flags, payload)
            elif kind == frames.PING:
                self._on_ping(flags, payload)
            else:
                self.on_goaway(*frames.read_goaway_untrusted(payload))
        return None  # unknown types are ignored (RFC 9113 section 4.1)

    def _on_window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE is not 4 bytes")
        increment = frames.read_u32(payload) & frames.MAX_WINDOW
        if stream_id == 0:
            return self.grow_window(None, increment)
        end = self.streams_by_id.get(stream_id)
        if end is None:
            return self._on_stale(stream_id, 0)
        try:
            self.grow_window(end, increment)
        except StreamFault as fault:
            self.stream_fault(end, fault)
        return None

    def _on_rst_stream(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "RST_STREAM is not 4 bytes")
        end = self.streams_by_id.get(stream_id)
        if end is None:
            return self._on_stale(stream_id, 0)
        self.on_reset(end, frames.read_u32(payload))
        return None

    def _on_priority(self, stream_id: int, payload: bytes) -> None:
        if stream_id == 0:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            end = self.streams_by_id.get(stream_id)
            fault = StreamFault(frames.FRAME_SIZE_ERROR, "PRIORITY is not 5 bytes")
            if end is None:
                raise ConnectionFault(fault.code, fault.detail)
            return self.stream_fault(end, fault)
        return refuse_self_dependency(stream_id, payload[:4])

    def _on_settings(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if payload:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, "SETTINGS acknowledgement with a payload")
            if not self._table_acked:
                self._table_acked = True
                self.blocks.without_table()
            return
        pairs = frames.read_settings_untrusted(payload)
        self.spend(len(pairs) + 8)  # applying one may touch every stream
        for key, value in pairs:
            if key == frames.INITIAL_WINDOW_SIZE:
                self.change_initial_window(value)
            elif key == frames.MAX_FRAME_SIZE:
                self.max_frame = value
            else:
                self.on_setting(key, value)
        self.control(frames.SETTINGS_ACK)
        if not self._settled:
            self._settled = True
            self._arm(self.limits.tick_s)
        if self.holding:
            self.pump()
        self.on_settled()

    def _on_ping(self, flags: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "PING is not 8 bytes")
        if flags & frames.ACK:
            self.on_ping_ack(payload)
        else:
            self.control(frames.ping(payload, ack=True))


def refuse_self_dependency(stream_id: int, dependency: bytes) -> None:
    """Priorities mean nothing here, but a stream that depends on itself is an error of RFC 7540 section 5.3.1. Raises ConnectionFault."""
    if frames.read_u32(dependency) & frames.MAX_STREAM_ID == stream_id:
        raise ConnectionFault(frames.PROTOCOL_ERROR, f"stream {stream_id} depends on itself")
