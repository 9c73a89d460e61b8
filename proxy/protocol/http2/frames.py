"""HTTP/2 frames as bytes: numbers, builders and the readers of fixed-size payloads (RFC 9113 sections 4, 6 and 7).

Knows nothing of connections or streams. Called by the connection ends; the scan loop itself lives in connection.py, where it runs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
INTERNAL_ERROR: Final = 0x2
FLOW_CONTROL_ERROR: Final = 0x3
SETTINGS_TIMEOUT: Final = 0x4
STREAM_CLOSED: Final = 0x5
FRAME_SIZE_ERROR: Final = 0x6
REFUSED_STREAM: Final = 0x7
CANCEL: Final = 0x8
COMPRESSION_ERROR: Final = 0x9
CONNECT_ERROR: Final = 0xA
ENHANCE_YOUR_CALM: Final = 0xB

HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6
ENABLE_CONNECT_PROTOCOL: Final = 0x8  # RFC 8441

MAX_WINDOW: Final = 0x7FFFFFFF
MAX_STREAM_ID: Final = 0x7FFFFFFF

# Length and type share the first four bytes: one unpack gives (length << 8 | type, flags, stream id with the reserved bit).
HEAD: Final = struct.Struct(">IBI")
head: Final = HEAD.pack
_U32: Final = struct.Struct(">I")
_SETTING: Final = struct.Struct(">HI")
_GOAWAY: Final = struct.Struct(">II")


class ConnectionFault(Exception):
    """The peer broke a rule that ends the connection with GOAWAY(code)."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class StreamFault(Exception):
    """The peer broke a rule that ends one stream with RST_STREAM(code)."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def settings(pairs: Iterable[tuple[int, int]]) -> bytes:
    """A SETTINGS frame."""
    body = b"".join([_SETTING.pack(key, value) for key, value in pairs])
    return head(len(body) << 8 | SETTINGS, 0, 0) + body


SETTINGS_ACK: Final = head(SETTINGS, ACK, 0)


def ping(opaque: bytes, *, ack: bool) -> bytes:
    """A PING frame; opaque: 8 bytes."""
    return head(8 << 8 | PING, ACK if ack else 0, 0) + opaque


def goaway(last_stream: int, code: int, debug: bytes = b"") -> bytes:
    """A GOAWAY frame: streams above last_stream were not and will not be looked at."""
    return head(8 + len(debug) << 8 | GOAWAY, 0, 0) + _GOAWAY.pack(last_stream, code) + debug


def rst_stream(stream: int, code: int) -> bytes:
    """A RST_STREAM frame."""
    return head(4 << 8 | RST_STREAM, 0, stream) + _U32.pack(code)


def window_update(stream: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection."""
    return head(4 << 8 | WINDOW_UPDATE, 0, stream) + _U32.pack(increment)


def header_block(stream: int, block: bytes, end_stream: bool, max_frame: int) -> bytes:
    """HEADERS, and CONTINUATION for what one frame of the receiver does not hold."""
    if len(block) <= max_frame:
        return head(len(block) << 8 | HEADERS, END_HEADERS | end_stream, stream) + block
    parts = [head(max_frame << 8 | HEADERS, int(end_stream), stream), block[:max_frame]]
    for at in range(max_frame, len(block), max_frame):
        piece = block[at : at + max_frame]
        last = at + max_frame >= len(block)
        parts += (head(len(piece) << 8 | CONTINUATION, END_HEADERS if last else 0, stream), piece)
    return b"".join(parts)


def length_of(header: bytes) -> int:
    """The payload's length by the first 9 bytes of a frame."""
    return header[0] << 16 | header[1] << 8 | header[2]


def read_u32(payload: bytes) -> int:
    """The 31 bits of a WINDOW_UPDATE, or the 32 of a RST_STREAM."""
    value: int = _U32.unpack(payload)[0]
    return value


def read_goaway_untrusted(payload: bytes) -> tuple[int, int, bytes]:
    """(last stream id, error code, debug data). Raises ConnectionFault when it is too short."""
    if len(payload) < 8:
        raise ConnectionFault(FRAME_SIZE_ERROR, "GOAWAY shorter than 8 bytes")
    last, code = _GOAWAY.unpack_from(payload)
    return last & MAX_STREAM_ID, code, payload[8:]


def read_settings_untrusted(payload: bytes) -> list[tuple[int, int]]:
    """The settings in order, values checked against their ranges (RFC 9113 section 6.5.2). Raises ConnectionFault."""
    if len(payload) % 6:
        raise ConnectionFault(FRAME_SIZE_ERROR, "SETTINGS is not a multiple of 6 bytes")
    pairs = [(key, value) for key, value in _SETTING.iter_unpack(payload)]
    for key, value in pairs:
        if key in (ENABLE_PUSH, ENABLE_CONNECT_PROTOCOL) and value > 1:
            raise ConnectionFault(PROTOCOL_ERROR, f"setting {key} is {value}, not 0 or 1")
        if key == INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ConnectionFault(FLOW_CONTROL_ERROR, f"initial window of {value} bytes")
        if key == MAX_FRAME_SIZE and not 16384 <= value <= 0xFFFFFF:
            raise ConnectionFault(PROTOCOL_ERROR, f"maximum frame size of {value} bytes")
    return pairs


def strip_padding(payload_start: int, payload_end: int, data: bytes, flags: int) -> tuple[int, int]:
    """Where the content of a padded or prioritised HEADERS, or a padded DATA frame begins and ends. Raises ConnectionFault."""
    start, end = payload_start, payload_end
    if flags & PADDED:
        if start >= end:
            raise ConnectionFault(FRAME_SIZE_ERROR, "padded frame without a pad length")
        end -= data[start]
        start += 1
    if flags & HAS_PRIORITY:
        start += 5
    if start > end:
        raise ConnectionFault(PROTOCOL_ERROR, "padding longer than the frame")
    return start, end
