"""The client side of one ``grpc.health.v1.Health/Check`` call as an engine: bytes in, bytes to send out, and an outcome.

Theory of operation: the whole request is known beforehand, so it is sent at once (preface, SETTINGS, HEADERS, DATA); after that only
SETTINGS and PING are acknowledged, and window is never needed because a health answer is a few bytes and everything larger is refused.
The outcome is decided by the trailers. Called by proxy.probes; source: the gRPC health checking protocol, PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

from proxy.protocol.http2 import frames
from proxy.protocol.http2.hpack_codec import NO_TABLE, HeaderListTooLarge, HpackFault, encode, new_decoder

_STREAM = 1
_FRAME_BYTES_MAX = 16384
_TOTAL_BYTES_MAX = 65535  # the connection's window, which we never enlarge: an honest server cannot send more
_SERVING = 1


class NotHealthy(Exception):
    """The call failed or the answer is not SERVING; the text is one short sentence without anything the server chose."""


class HealthCheck:
    """One call. Send `request`, feed `received_untrusted`, until `done`."""

    def __init__(self, authority: str, service: str = "") -> None:
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", b"/grpc.health.v1.Health/Check"),
            (b":authority", authority.encode("ascii", "replace")),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"kube-probe"),
        ]
        name = service.encode()
        message = (b"\x0a" + _varint(len(name)) + name) if name else b""
        body = b"\0" + len(message).to_bytes(4, "big") + message
        block = NO_TABLE + encode([(key, value, False) for key, value in fields])
        self.request = b"".join(
            [
                frames.PREFACE,
                frames.settings([(frames.ENABLE_PUSH, 0), (frames.HEADER_TABLE_SIZE, 0)]),
                frames.header_block(_STREAM, block, False, _FRAME_BYTES_MAX),
                frames.head(len(body) << 8 | frames.DATA, frames.END_STREAM, _STREAM) + body,
            ]
        )
        self.done = False
        self._decoder = new_decoder(4096, 16384)
        self._buffer = b""
        self._total = 0
        self._block: bytes | None = None
        self._block_ends_stream = False
        self._body = b""

    def received_untrusted(self, data: bytes) -> bytes:
        """Take bytes, return bytes to send; sets `done` when the answer is SERVING. Raises NotHealthy."""
        self._total += len(data)
        if self._total > _TOTAL_BYTES_MAX:
            raise NotHealthy("the answer is too long for a health check")
        self._buffer += data
        answer = b""
        while not self.done and len(self._buffer) >= 9:
            length_type, flags, stream = frames.HEAD.unpack_from(self._buffer)
            length, kind = length_type >> 8, length_type & 0xFF
            if length > _FRAME_BYTES_MAX:
                raise NotHealthy("the server does not speak HTTP/2")
            if len(self._buffer) < 9 + length:
                break
            payload, self._buffer = self._buffer[9 : 9 + length], self._buffer[9 + length :]
            try:
                answer += self._frame(kind, flags, stream & frames.MAX_STREAM_ID, payload)
            except (frames.ConnectionFault, HpackFault, HeaderListTooLarge):
                raise NotHealthy("the server broke a rule of HTTP/2") from None
        return answer

    def ended(self) -> None:
        """The server closed the connection; raises NotHealthy unless it had answered."""
        if not self.done:
            raise NotHealthy("the server closed the connection without an answer")

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        if (self._block is not None) != (kind == frames.CONTINUATION):
            raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "a header block was interrupted")
        if kind == frames.SETTINGS:
            if not flags & frames.ACK:
                frames.read_settings_untrusted(payload)
                return frames.SETTINGS_ACK
        elif kind == frames.PING:
            if not flags & frames.ACK:
                return frames.ping(payload[:8].ljust(8, b"\0"), ack=True)
        elif kind == frames.GOAWAY:
            last, _, _ = frames.read_goaway_untrusted(payload)
            if last < _STREAM:
                raise NotHealthy("the server refused the call")
        elif stream == _STREAM:
            self._on_stream(kind, flags, payload)
        return b""

    def _on_stream(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == frames.RST_STREAM:
            raise NotHealthy("the server reset the call")
        if kind in (frames.DATA, frames.HEADERS):
            known_flags = flags if kind == frames.HEADERS else flags & frames.PADDED
            start, end = frames.strip_padding(0, len(payload), payload, known_flags)
            content = payload[start:end]
            if kind == frames.DATA:
                self._body += content
                if flags & frames.END_STREAM:
                    raise NotHealthy("the server ended the call without a gRPC status")
                return
            self._block, self._block_ends_stream = content, bool(flags & frames.END_STREAM)
        elif kind == frames.CONTINUATION and self._block is not None:
            self._block += payload
        if self._block is not None and flags & frames.END_HEADERS:
            fields = {name: value for name, value, _ in self._decoder.decode_untrusted(self._block)}
            self._block = None
            self._headers(fields)

    def _headers(self, fields: dict[bytes, bytes]) -> None:
        status = fields.get(b":status")
        if status not in (None, b"200") and not (status or b"").startswith(b"1"):
            raise NotHealthy("the server does not speak gRPC")
        if not self._block_ends_stream:
            return
        code = fields.get(b"grpc-status", b"")
        if code != b"0":
            known = {b"5": "the server does not know this service", b"12": "the server does not implement health checks"}
            raise NotHealthy(known.get(code, "the call failed"))
        if _serving_status(self._body) != _SERVING:
            raise NotHealthy("the service is not serving")
        self.done = True


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _serving_status(body: bytes) -> int:
    """HealthCheckResponse.status: field 1, a varint. Anything but exactly this field is not an answer we believe."""
    message = body[5:]
    if body[:1] != b"\0" or int.from_bytes(body[1:5], "big") != len(message):
        raise NotHealthy("the answer is not a gRPC message")
    if len(message) != 2 or message[0] != 0x08:
        return 0
    return message[1]
