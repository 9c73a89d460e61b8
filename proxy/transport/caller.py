"""Step 12, the app's view: tell the kernel who really calls, so that the app's accept() and getpeername() say so.

Works where the node's eBPF programs serve this pod, and costs one system call a connection there. Everywhere else the kernel refuses the
option once, and it is not tried again: how a pod is captured is settled before its sidecar starts.
"""

from __future__ import annotations

import socket

from core.addrs import ClientAddr
from core.capture import CALLER_LEVEL, CALLER_OPTION, caller_option


class CallerTeller:
    """Tells the kernel about callers, until it says that it does not take this."""

    def __init__(self) -> None:
        self.heard = True
        """False once the kernel has said that nobody here takes it."""

    def tell(self, sock: socket.socket, caller: ClientAddr) -> None:
        """Before connect(2). Never fails: an app that sees our own address instead works as it does in every other mesh."""
        if not self.heard:
            return
        try:
            sock.setsockopt(CALLER_LEVEL, CALLER_OPTION, caller_option(caller))
        except OSError:
            self.heard = False  # ENOPROTOOPT: no programs here; EPERM: switched off for this pod
