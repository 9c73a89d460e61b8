"""From the bytes of the policy API to its lines, bounded. Pure; used by both ends."""

from __future__ import annotations


class LineTooLong(ValueError):
    """The peer sent more than ``max_bytes`` without a newline; nothing it sends can be understood any more."""


class LineBuffer:
    """Collects bytes until there is a newline; keeps at most ``max_bytes`` of an unfinished line."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0

    def feed_untrusted(self, data: bytes) -> list[bytes]:
        """The lines that are complete now, without their newlines; raises LineTooLong."""
        *complete, rest = data.split(b"\n")
        if complete and self._parts:
            complete[0] = b"".join((*self._parts, complete[0]))
            self._parts, self._size = [], 0
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
        if self._size > self._max_bytes or any(len(line) > self._max_bytes for line in complete):
            raise LineTooLong(f"a line of more than {self._max_bytes} bytes")
        return complete
