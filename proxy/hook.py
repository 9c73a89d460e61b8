"""The abstract Unix socket that the sidecar's postStart hook (injector.hold) connects to; it listens before anything else is loaded.

From then on no hook is missed: one that came and went early still waits in the socket's queue when proxy.hold accepts. Imports little,
because proxy.__main__ calls it first of all. An abstract name belongs to the network namespace, so it is the pod's own.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping

SOCKET = "\0pillion-hold"


@functools.cache
def listener() -> socket.socket:
    """This process's listening socket, non-blocking, made by the first call; raises OSError when somebody else has the name."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        found.bind(SOCKET)
        found.listen(4)
    except BaseException:
        found.close()
        raise
    return found


def is_wanted(environ: Mapping[str, str]) -> bool:
    """As proxy.config reads the setting."""
    return environ.get("PILLION_PROVE_CAPTURE", "").strip().lower() == "true"
