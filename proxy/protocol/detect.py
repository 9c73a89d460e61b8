"""Which protocol begins with these bytes. A function of the bytes so far, so that it does not matter how they were split.

Errs towards HTTP: what begins like an HTTP request is treated as one, and refused if it turns out not to be. HTTP taken for opaque bytes
would bypass what is done to requests, while opaque bytes that begin with ``GET `` are rare. Some requests are unusual, but servers accept
them (empty lines first, a method in lower case, HTTP/1.2): they are HTTP if their first line arrives whole. If it arrives in pieces they
are taken for opaque at first, and cut as soon as `FirstLine` sees the line end as a request line does.
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
_HTTP2_SETTINGS: Final = b"\x04" + bytes(5)  # type, flags and stream of the SETTINGS that a server of HTTP/2 begins with, behind its length
_HTTP1_RESPONSE: Final = b"HTTP/"
FIRST_BYTES: Final = 9
"""So many bytes say whether a server that speaks first is one of HTTP."""
_PROXY1: Final = b"PROXY "
_PROXY1_MAX: Final = 107
_PROXY2: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_PROXY2_BYTES: Final = 16  # then as many more as its last two say
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


def is_http2_server_untrusted(first: bytes) -> bool:
    """Whether a server that begins with these bytes, at least `FIRST_BYTES`, speaks HTTP/2: its SETTINGS need not wait for any request."""
    return first[3:FIRST_BYTES] == _HTTP2_SETTINGS


def may_be_http_server_untrusted(first: bytes) -> bool:
    """Whether a server that begins with these bytes may take requests: it said SETTINGS, a response nobody asked for, or too little."""
    return first[3:FIRST_BYTES] == _HTTP2_SETTINGS[: max(len(first) - 3, 0)] or _HTTP1_RESPONSE.startswith(first[: len(_HTTP1_RESPONSE)])


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


def proxy_header_untrusted(data: bytes) -> int | None:
    """The length of the PROXY protocol's header at the beginning of ``data`` (version 1 is a line, 2 is binary).

    0: there is none. None: more bytes are needed to say.
    """
    if data.startswith(_PROXY1):
        end = data.find(b"\n", 0, _PROXY1_MAX)
        return end + 1 if end >= 0 else 0 if len(data) >= _PROXY1_MAX else None
    if data.startswith(_PROXY2):
        return _PROXY2_BYTES + int.from_bytes(data[14:_PROXY2_BYTES], "big") if len(data) >= _PROXY2_BYTES else None
    return None if _PROXY1.startswith(data) or _PROXY2.startswith(data) else 0


class FirstLine:
    """Watches what is carried as opaque bytes until its first line has ended: a request line makes it HTTP, however it was split.

    A header of the PROXY protocol before it is skipped: servers that accept one read a request behind it. Memory is bounded: it holds the
    beginning of such a header, then the beginning and the end of the line.
    """

    __slots__ = ("_begin", "_line", "_skip")

    def __init__(self) -> None:
        self._begin: bytes | None = b""  # what may be the beginning of a PROXY header
        self._skip = 0  # bytes of that header that are still to come
        self._line = b""

    def is_http_untrusted(self, data: bytes) -> bool | None:
        """Look at the next bytes: is the stream HTTP? None: not known yet. Not to be called again after True or False."""
        if self._begin is not None:
            data = self._begin + data
            size = proxy_header_untrusted(data)
            if size is None:
                self._begin = data
                return None
            self._begin, self._skip = None, size
        if self._skip:
            there = len(data)
            data = data[self._skip :]
            self._skip = max(self._skip - there, 0)
        if not self._line:
            data = data.lstrip(_BLANK + b"\n")
        end = data.find(b"\n")
        line = _words(self._line + (data if end < 0 else data[:end]))
        if end >= 0:
            return _is_request(line) is not None
        self._line = line if len(line) <= 2 * _KEPT else line[:_KEPT] + line[-_KEPT:]
        return None
