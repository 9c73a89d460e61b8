"""A listening socket that the relay carries: what it accepts is handed on within the relay's pass, so that no task has to wake up."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from proxy.transport.link import NEVER, NO_RECEIVER, Link

if TYPE_CHECKING:
    from proxy.transport.relay import Relay

_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RESOURCE_PAUSE_S: Final = 1.0
_ACCEPTS_PER_PASS: Final = 16  # then connections have their turn


class Listener(Link):
    """accepted: takes each new socket with its peer's address. Made by `Relay.listen`; ends with `abort`."""

    __slots__ = ("_accepted",)

    def __init__(self, relay: Relay, sock: socket.socket, accepted: Callable[[socket.socket, tuple[object, ...]], None]) -> None:
        super().__init__(relay, sock, NO_RECEIVER)
        self._accepted = accepted

    def readable(self) -> None:
        """Accept what waits."""
        for _ in range(_ACCEPTS_PER_PASS):
            try:
                sock, peer = self.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self.pause()
                    self.expire_after(_RESOURCE_PAUSE_S)
                    return
                continue  # ECONNABORTED and network errors concern the one connection that is gone already
            self._relay.later(partial(self._accepted, sock, peer))  # what it raises is reported there, and must not end us

    def timed_out(self) -> None:
        """Somebody may have given back what was missing."""
        self.deadline = NEVER
        self.resume()
