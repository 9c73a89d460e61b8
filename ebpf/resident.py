"""Gives back the pages of programs and libraries that only a start or a handshake needed.

A node has such a page once, in its page cache, however many processes map it, but the kernel counts it as resident in each that ever
touched it, and maps up to 15 neighbours with it. Half of what the agent touches are the interpreter's way through imports and OpenSSL's
through handshakes. Dropped from this process alone, a page that is needed again is mapped again from the page cache, without reading.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ +/")


def untouched_file_mappings(smaps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Start and length of what is of a file, read-only, and has no page of our own: from /proc/PID/smaps.

    The dynamic linker writes into some read-only mappings before it makes them so (relocations): these have anonymous pages, and
    to drop one would bring the file's bytes back.
    """
    start = end = 0
    for line in smaps:
        name, _, value = line.partition(":")
        if found := _MAPPING.match(line):
            start, end = (0, 0) if "w" in found[3] else (int(found[1], 16), int(found[2], 16))
        elif name == "Anonymous":
            if start and value.split() == ["0", "kB"]:
                yield start, end - start
            start = 0


def drop_file_pages() -> None:
    """Of this process; takes about a millisecond. What cannot be dropped stays."""
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as file:
            mappings = list(untouched_file_mappings(file))
    except OSError:
        return
    for start, length in mappings:
        _LIBC.madvise(start, length, _MADV_DONTNEED)
