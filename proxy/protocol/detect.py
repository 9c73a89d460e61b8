"""Which protocol begins with these bytes. A function of the bytes so far, so that it does not matter how they were split.

Errs towards HTTP: a client that begins like an HTTP request is treated as one, and refused if it then is not. That way round because
HTTP read as opaque bytes would bypass what is done to requests, while opaque bytes that begin with ``GET `` are rare. What no usual
client of HTTP sends and servers take all the same (empty lines first, a method in lower case, HTTP/1.2) is HTTP when its first line came
whole; who splits it is taken for opaque, and cut as soon as `FirstLine` sees the line end as a request does.
"""

from __future__ import annotations

import enum
import re
from typing import Final

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_METHOD_MAX = 24  # the longest registered method is UPDATEREDIRECTREF with 17 (IANA HTTP Method Registry)
_REQUEST_START = re.compile(rb"[A-Z][A-Z-]{0,%d} [/*a-zA-Z0-9\[]" % (_METHOD_MAX - 1))
_METHOD_PREFIX = re.compile(rb"[A-Z][A-Z-]{0,%d} ?" % (_METHOD_MAX - 1))
_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_SPACE: Final = b" \t\x0b\x0c\r"  # what lenient servers take between the parts of a request line (RFC 9112 section 3)
_ENDS_HTTP = re.compile(rb"[" + _SPACE + rb"]HTTP/[0-9]+(?:\.[0-9]*)?$", re.IGNORECASE)
_REQUEST_LINE = re.compile(_TOKEN + rb"{1,%d}[" % _METHOD_MAX + _SPACE + rb"][^\n]*$")
_tokens = re.compile(_TOKEN + rb"*").match
_TAIL: Final = 32  # the end of a line that can hold a version
LINE_MAX = 16 * 1024


class Detected(enum.Enum):
    """What the first bytes are."""

    HTTP1 = "http1"
    HTTP2 = "http2"
    TLS = "tls"
    OPAQUE = "opaque"


def detect_untrusted(data: bytes, ended: bool = False) -> Detected | None:
    """The protocol that begins with ``data`` (not empty); None while it could still be HTTP or not.

    ended: no more bytes will come, so undecided means opaque.
    """
    if HTTP2_PREFACE.startswith(data[: len(HTTP2_PREFACE)]):
        if len(data) >= len(HTTP2_PREFACE):
            return Detected.HTTP2
        return Detected.OPAQUE if ended else None
    if data[0] == 0x16:
        return Detected.TLS
    if data[0] in b"\r\n":
        data = data.lstrip(b"\r\n")
    usual = _could_be_request(data)
    end = data.find(b"\n")
    if end >= 0:
        line = data[:end].rstrip(_SPACE)
        http = (usual or _REQUEST_LINE.match(line)) and _ENDS_HTTP.search(line)
        return Detected.HTTP1 if http else Detected.OPAQUE
    if not usual:
        return Detected.OPAQUE
    if len(data) >= LINE_MAX:
        return Detected.HTTP1  # a request line beyond every limit: the HTTP engine answers 414
    return Detected.OPAQUE if ended else None


def _could_be_request(data: bytes) -> bool:
    if _REQUEST_START.match(data):
        return True
    return _METHOD_PREFIX.fullmatch(data) is not None


class FirstLine:
    """Watches what is carried as opaque bytes until its first line has ended: a request line makes it HTTP, however it was split.

    Bounded: holds the end of the line only.
    """

    __slots__ = ("_in_token", "_named", "_tail")

    def __init__(self) -> None:
        self._named = False  # a method has begun
        self._in_token = True
        self._tail = b""

    def is_http_untrusted(self, data: bytes) -> bool | None:
        """The next bytes: whether the stream is HTTP, None while that is open. Not to be called again after an answer."""
        if not self._named:
            data = data.lstrip(b"\r\n")
            if not data:
                return None
        if self._in_token:
            found = _tokens(data)
            assert found is not None
            self._named = self._named or found.end() > 0
            if found.end() == len(data):
                return None
            data = data[found.end() :]
            if not self._named or data[0] not in _SPACE:
                return False
            self._in_token = False
        end = data.find(b"\n")
        line = self._tail + (data if end < 0 else data[:end])
        kept = line.rstrip(_SPACE)
        if end >= 0:
            return _ENDS_HTTP.search(kept) is not None
        self._tail = kept[-_TAIL:] + (line[-1:] if len(kept) < len(line) else b"")
        return None
