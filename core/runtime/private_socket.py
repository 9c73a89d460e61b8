"""Listening Unix sockets that only their owner may connect to. Called by programs when they start, before they have threads."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def listen_privately(path: Path, backlog: int) -> socket.socket:
    """A listening socket at ``path``, 0600 from the moment it exists; replaces one that a dead process left. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if path.is_socket():
            path.unlink()
        before = os.umask(0o177)  # a mode that is set after bind() would come too late
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock
