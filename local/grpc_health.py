"""One question of the gRPC health protocol over plaintext HTTP/2, and its answer: bytes in, value out. Pure; called by local.probing.

Only what a probe needs: one stream, no flow control (both messages are a few bytes). RFC 9113, grpc-health (`grpc.health.v1.Health/Check`).
"""

from __future__ import annotations

import hpack

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY, _CONTINUATION = 0, 1, 3, 4, 7, 9
_END_STREAM, _END_HEADERS = 1, 4
_FRAME_MAX = 16384
_SERVICE_MAX = 100
SERVING = 1


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def health_request(authority: str, service: str) -> bytes:
    """Everything a client says: preface, settings, one request. service: at most 100 bytes of UTF-8."""
    name = service.encode()[:_SERVICE_MAX]
    message = b"\x0a" + bytes([len(name)]) + name if name else b""
    headers = hpack.Encoder().encode(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/grpc.health.v1.Health/Check"),
            (":authority", authority),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ],
        huffman=False,
    )
    body = b"\x00" + len(message).to_bytes(4, "big") + message
    return (
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_SETTINGS, 1, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, headers)
        + _frame(_DATA, _END_STREAM, 1, body)
    )


def read_health_untrusted(received: bytes) -> str | None:
    """None: more bytes are needed. "": SERVING. Else why not. Never raises."""
    position, status = 0, None
    while len(received) - position >= 9:
        length = int.from_bytes(received[position : position + 3], "big")
        kind, stream = received[position + 3], int.from_bytes(received[position + 5 : position + 9], "big") & 0x7FFFFFFF
        if length > _FRAME_MAX or (position == 0 and kind != _SETTINGS):
            return "the answer is not HTTP/2"
        if len(received) - position - 9 < length:
            return None
        payload = received[position + 9 : position + 9 + length]
        position += 9 + length
        if kind in (_RST_STREAM, _GOAWAY):
            return "the server refused the health request"
        if kind == _DATA and stream == 1 and len(payload) >= 5:
            status = _status(payload[5:])
            return "" if status == SERVING else f"the service reports status {status} (1 is SERVING)"
        if kind == _HEADERS and stream == 1 and received[position - 9 - length + 4] & _END_STREAM:
            return "the server answered without a health status: does it implement grpc.health.v1.Health?"
    return None


def _status(message: bytes) -> int:
    """HealthCheckResponse.status (field 1, varint); absent means UNKNOWN."""
    return message[1] if len(message) >= 2 and message[0] == 0x08 else 0
