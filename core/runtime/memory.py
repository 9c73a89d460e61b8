"""Giving freed memory back to the machine, which the C library does not do by itself."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable


def give_back() -> None:
    """Return free pages to the kernel. Takes milliseconds: for quiet moments after many connections closed.

    OpenSSL's memory is the C library's; without this it stays with the process for ever, as it does in Linkerd
    (linkerd2#11430). Does nothing on a C library other than glibc.
    """
    gc.collect()
    if _malloc_trim is not None:
        _malloc_trim(0)


def settle() -> None:
    """After a start that built much that will stay: free what it left over, and let the cycle collector pass over the rest from now on.

    A full collection of an index of ten thousand pods stops everything for 100 ms and finds nothing.
    """
    give_back()
    gc.freeze()


def _find_malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return found


_malloc_trim = _find_malloc_trim()
