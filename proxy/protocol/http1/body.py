"""Where the body of an HTTP/1.1 message ends: readers that look at received bytes and say up to where they may be sent on.

Theory of operation. A reader is shown a byte string and a position, and returns the position up to which everything was checked and belongs
to the body. Those bytes pass untouched, framing included. What lies behind is either the next message (`done`), or the beginning of a
chunk-size line or trailer section that is not complete yet: the caller keeps that, bounded by the reader, and shows it again with more. So
no byte of framing is sent on before its whole line was checked. A message with a broken trailer section lacks its last chunk, so that its
receiver takes it for cut short.
Pure; called by client.py and upstream.py.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from core.spelling import canonical
from proxy.protocol.http1.heads import CHUNKED, FIELD, TOKEN

LINE_BYTES: Final = 4096  # one chunk-size line with its extensions
TRAILER_BYTES: Final = 16384

# Without possessive repeats: Python before 3.11.5 gets them wrong around choices. Each byte has one reading, so nothing is tried twice.
_QUOTED: Final = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
_match_size = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;" + TOKEN + rb"+(?:=(?:" + TOKEN + rb"+|" + _QUOTED + rb"))?)*\r\n").match
_SIZE_BYTES: Final = 17  # after so many, only an extension goes on
_may_go_on = re.compile(rb"[\t\x20-\x7e\x80-\xff]*\r?").fullmatch
_may_be_size = re.compile(rb"[0-9A-Fa-f]{0,16}(?:(?<=[0-9A-Fa-f]);[\t\x20-\x7e\x80-\xff]*)?\r?").fullmatch
_match_trailer = re.compile(rb"(?:" + FIELD + rb")*+\r\n").match
# RFC 9110 section 6.5.1: a recipient that merges trailers into the head would change what was decided on.
FRAMING_NAMES: Final[tuple[bytes, ...]] = (
    b"content-length", b"transfer-encoding", b"host", b"connection", b"upgrade", b"te", b"trailer", b"authorization",
)  # fmt: skip


class BodyError(Exception):
    """The framing of a body is broken, or has two readings. The text says which rule, for the log."""


class BodyReader(Protocol):
    """Finds the end of one body."""

    done: bool

    def seen(self) -> int:
        """Bytes of the body among what was taken, without its framing."""
        ...

    def take_untrusted(self, data: bytes, at: int) -> int:
        """Position up to which ``data`` may be sent on, at least ``at``. Raises BodyError. Not to be called once `done`."""
        ...


class Length:
    """A body of a known number of bytes (RFC 9112 section 6.2)."""

    __slots__ = ("_length", "done", "left")

    def __init__(self, length: int) -> None:
        self.left = self._length = length
        self.done = length == 0

    def seen(self) -> int:
        """See BodyReader."""
        return self._length - self.left

    def take_untrusted(self, data: bytes, at: int) -> int:
        """See BodyReader; every byte string is a body."""
        there = len(data) - at
        if there < self.left:
            self.left -= there
            return len(data)
        at += self.left
        self.left = 0
        self.done = True
        return at


class UntilClose:
    """A response body that ends with its connection (RFC 9112 section 6.3 rule 8): never done by itself."""

    __slots__ = ("_seen", "done")

    def __init__(self) -> None:
        self._seen = 0
        self.done = False

    def seen(self) -> int:
        """See BodyReader."""
        return self._seen

    def take_untrusted(self, data: bytes, at: int) -> int:
        """See BodyReader."""
        self._seen += len(data) - at
        return len(data)


class Chunked:
    """A body in chunks (RFC 9112 section 7.1)."""

    __slots__ = ("_awaited", "_begun", "_forbidden", "_known", "_left", "_trailer_names", "done")

    def __init__(self) -> None:
        self._forbidden = FRAMING_NAMES
        self._trailer_names = b""
        self._left = 0  # bytes of the present chunk that are still to come, its CRLF included
        self._begun = 0  # bytes of all chunks that have begun
        self._known = 0  # bytes that were shown, were not enough, and will be shown again with more
        self._awaited = b""  # what must be in those that are new
        self.done = False

    def seen(self) -> int:
        """See BodyReader."""
        return self._begun - max(0, self._left - 2)

    def take_untrusted(self, data: bytes, at: int) -> int:
        """See BodyReader."""
        size = len(data)
        if self._known and not self._is_enough(data, at):
            return at
        while True:
            left = self._left
            if left > 2:
                there = size - at
                if there <= left - 2:
                    self._left = left - there
                    return size
                at += left - 2
                left = 2
                self._left = 2
            if left:
                end = data[at : at + 2]
                if end != b"\r\n":
                    if end and end != b"\r":
                        raise BodyError("a chunk is longer than its size")
                    return at
                at += 2
                self._left = 0
            if at == size:
                return at
            line = _match_size(data, at)
            if line is None:
                self._partial(data, at)
                return at
            length = int(line[1], 16)
            if length >> 62:
                raise BodyError("a chunk size overflows")
            if not length:
                return self._trailer(data, at, line.end())
            self._begun += length
            self._left = length + 2
            at = line.end()

    def forbid(self, names: tuple[bytes, ...]) -> None:
        """Refuse these lower-case names in trailers too. Raises BodyError when one was there already."""
        self._forbidden = FRAMING_NAMES + names
        self._check_trailer()

    def _check_trailer(self) -> None:
        if self._trailer_names and any(b"\n" + canonical(name) + b":" in self._trailer_names for name in self._forbidden):
            raise BodyError("a trailer section names a field of the head")

    def _is_enough(self, data: bytes, at: int) -> bool:
        """Whether what is shown again has become complete. Looks at the new bytes only: a peer that sends single bytes must not make us
        look at everything for each of them. Raises BodyError."""
        if data.find(self._awaited, max(at, at + self._known - len(self._awaited) + 1)) >= 0:
            self._known = 0
            return True
        if self._awaited == b"\n":
            self._partial(data, at)
        self._known = len(data) - at
        if self._known > LINE_BYTES + TRAILER_BYTES:
            raise BodyError("a too long trailer section")
        return False

    def _partial(self, data: bytes, at: int) -> None:
        """Raise BodyError when the bytes from ``at`` cannot become a chunk-size line."""
        rest = data[at : at + LINE_BYTES + 1]
        if len(rest) > LINE_BYTES:
            raise BodyError("a too long chunk size")
        looked_at = self._known - 1  # the last byte may be a CR, which only LF may follow
        if not (_may_be_size(rest) if looked_at < _SIZE_BYTES else _may_go_on(rest, looked_at)):
            raise BodyError("not a chunk size")
        self._known, self._awaited = len(rest), b"\n"

    def _trailer(self, data: bytes, at: int, begin: int) -> int:
        """The end of the body if the trailer section is there, else ``at``, the beginning of the last chunk's line."""
        found = _match_trailer(data, begin)
        if found is None:
            if data.find(b"\r\n\r\n", begin - 2) >= 0 or len(data) - begin > TRAILER_BYTES:
                raise BodyError("a malformed or too long trailer section")
            self._known, self._awaited = len(data) - at, b"\r\n\r\n"
            return at
        end = found.end()
        if end - begin > 2:
            if end - begin > TRAILER_BYTES:
                raise BodyError("a too long trailer section")
            self._trailer_names = b"\n" + canonical(data[begin:end].lower())
            self._check_trailer()
        self.done = True
        return end


def reader_of(length: int) -> BodyReader:
    """The reader for a body of ``length`` bytes, or CHUNKED, or UNTIL_CLOSE."""
    if length >= 0:
        return Length(length)
    return Chunked() if length == CHUNKED else UntilClose()
