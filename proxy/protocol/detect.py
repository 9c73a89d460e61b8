"""Which protocol begins with these bytes. A function of the bytes so far, so that it does not matter how they were split.

Errs towards HTTP: a client that begins exactly like an HTTP request is treated as one, and refused if it then is not. That way
round because HTTP read as opaque bytes would bypass the rules of routes, while opaque bytes that begin with ``GET `` are rare.
"""

from __future__ import annotations

import enum
import re

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_METHOD_MAX = 24  # the longest registered method is UPDATEREDIRECTREF with 17 (IANA HTTP Method Registry)
_REQUEST_START = re.compile(rb"[A-Z][A-Z-]{0,%d} [/*a-zA-Z0-9\[]" % (_METHOD_MAX - 1))
_METHOD_PREFIX = re.compile(rb"[A-Z][A-Z-]{0,%d} ?" % (_METHOD_MAX - 1))
_LINE_ENDS_HTTP = re.compile(rb" HTTP/1\.[01]\r?$")
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
    if not _could_be_request(data):
        return Detected.OPAQUE
    end = data.find(b"\n")
    if end >= 0:
        return Detected.HTTP1 if _LINE_ENDS_HTTP.search(data[:end]) else Detected.OPAQUE
    if len(data) >= LINE_MAX:
        return Detected.HTTP1  # a request line beyond every limit: the HTTP engine answers 414
    return Detected.OPAQUE if ended else None


def _could_be_request(data: bytes) -> bool:
    if _REQUEST_START.match(data):
        return True
    return _METHOD_PREFIX.fullmatch(data) is not None
