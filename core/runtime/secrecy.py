"""Keeps this process's memory, with the private keys in it, from core files and from other processes of its user."""

from __future__ import annotations

import ctypes
import os

_PR_SET_DUMPABLE = 4


def keep_memory_private() -> None:
    """From now on a crash writes no core file, and only who may trace every process can read this one's memory or take its descriptors.

    Without it an app that shares the pod's process namespace and becomes the sidecar's user reads the key. Does nothing but on Linux.
    """
    try:
        refused = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if refused:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
