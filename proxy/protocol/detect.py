"""Which protocol begins with these bytes. A function of the bytes so far, so that it does not matter how they were split.

Errs towards HTTP: a client that begins like an HTTP request is treated as one, and refused if it then is not. That way round because
HTTP read as opaque bytes would bypass what is done to requests, while opaque bytes that begin with ``GET `` are rare. What no usual
client of HTTP sends and servers take all the same (empty lines first, a method in lower case, HTTP/1.2) is HTTP when its first line came
whole; who splits it is taken for opaque, and cut as soon as `FirstLine` sees the line end as a request does.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Final

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_METHOD_MAX = 24  # the longest registered method is UPDATEREDIRECTREF with 17 (IANA HTTP Method Registry)
_REQUEST_START = re.compile(rb"[A-Z][A-Z-]{0,%d} [/*a-zA-Z0-9\[]" % (_METHOD_MAX - 1))
_METHOD_PREFIX = re.compile(rb"[A-Z][A-Z-]{0,%d} ?" % (_METHOD_MAX - 1))
# What servers take between the words of a request line: RFC 9112 section 3, and all that Python's str.split takes for white space.
_BLANK: Final = b" \t\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0"
_ONE_BLANK: Final = bytes.maketrans(_BLANK, b" " * len(_BLANK))
# A version at the end; or a request of HTTP/0.9, behind which some servers read header fields too.
_is_request = re.compile(rb"(?i)(?:.* )?HTTP/[0-9]+(?:\.[0-9]*)? ?$|GET (?:/|https?:)", re.DOTALL).match
_KEPT: Final = 64  # of the beginning and of the end of a line
LINE_MAX = 16 * 1024


class Detected(enum.Enum):
    """What the first bytes are."""

    HTTP1 = "http1"
    HTTP2 = "http2"
    TLS = "tls"
    OPAQUE = "opaque"


HTTP: Final = (Detected.HTTP1, Detected.HTTP2)
"""What is carried request by request; everything else is opaque."""

DECLARED: Final[Mapping[str, Detected]] = {
    "http1": Detected.HTTP1,
    "http2": Detected.HTTP2,
    "grpc": Detected.HTTP2,
    "opaque": Detected.OPAQUE,
    "tls": Detected.OPAQUE,
}
"""What policy and discovery name a port's protocol; any other name leaves it to the first bytes."""


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
    data = data.lstrip(_BLANK + b"\n")
    end = data.find(b"\n")
    if end >= 0:
        return Detected.HTTP1 if _is_request(_words(data[:end])) else Detected.OPAQUE
    if not _could_be_request(data):
        return Detected.OPAQUE
    if len(data) >= LINE_MAX:
        return Detected.HTTP1  # a request line beyond every limit: the HTTP engine answers 414
    return Detected.OPAQUE if ended else None


def _words(line: bytes) -> bytes:
    """The line with one space for each run of blanks, at its end too; of a long one the middle is missing."""
    if len(line) > 2 * LINE_MAX:
        line = line[:LINE_MAX] + line[-LINE_MAX:]
    plain = line.translate(_ONE_BLANK)
    words = b" ".join(plain.split())
    return words + b" " if plain.endswith(b" ") else words


def _could_be_request(data: bytes) -> bool:
    if _REQUEST_START.match(data):
        return True
    return _METHOD_PREFIX.fullmatch(data) is not None


class FirstLine:
    """Watches what is carried as opaque bytes until its first line has ended: a request line makes it HTTP, however it was split.

    Bounded: holds the beginning and the end of the line only.
    """

    __slots__ = ("_line",)

    def __init__(self) -> None:
        self._line = b""

    def is_http_untrusted(self, data: bytes) -> bool | None:
        """The next bytes: whether the stream is HTTP, None while that is open. Not to be called again after an answer."""
        if not self._line:
            data = data.lstrip(_BLANK + b"\n")
        end = data.find(b"\n")
        line = _words(self._line + (data if end < 0 else data[:end]))
        if end >= 0:
            return _is_request(line) is not None
        self._line = line if len(line) <= 2 * _KEPT else line[:_KEPT] + line[-_KEPT:]
        return None
