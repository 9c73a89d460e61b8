"""Limits how far the sidecar may run ahead of its app where eBPF carries their hop past TCP, so that nothing has to fall back to TCP.

There, what the app has not read lies in a queue that only the programs bound: beyond their limit they send by TCP. An app that waits
edge-triggered may then miss the rest: it reads the queue's bytes, is told (FIONREAD) or finds that nothing is left, and the edge for the
bytes in TCP has passed. So the sidecar asks, once in so many bytes, how much is unread, and waits before the limit is reached. Where no
program answers, TCP's window does this, and asking costs one system call in 16 MiB. Called by `Link`; the other half is `pace` in
ebpf/bpf/mesh.h.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from core.capture import CALLER_LEVEL, UNREAD_OPTION

if TYPE_CHECKING:
    from proxy.transport.link import Link
    from proxy.transport.relay import Relay

ASK_AFTER: Final = 1 << 20
"""Bytes that a connection may send before the first question."""
UNREAD_MAX: Final = 3 << 19
"""Bytes that the app may have unread: with `SEND_MAX` more, still below QUEUE_LIMIT in ebpf/bpf/mesh.h (2 MiB)."""
SEND_MAX: Final = 256 * 1024
"""Bytes of one send, between two questions."""
_ENOUGH: Final = 256 * 1024  # room that is worth a question
_NOT_ASKED: Final = 16 << 20  # bytes until the next question where nobody answered
_PAUSE_MIN_S: Final = 0.001
_PAUSE_MAX_S: Final = 0.02
_PAUSE_EACH_S: Final = 0.0001  # so that thousands of clients of an app that reads nothing cost some percent of a processor, not all of it


def unread_by_app(sock: socket.socket) -> int:
    """Bytes of ours in the app's queue; raises OSError where no program answers, as then the hop goes by TCP."""
    return sock.getsockopt(CALLER_LEVEL, UNREAD_OPTION)


class Pace:
    """The links of a relay that wait for their app to read, and the task that asks again for them. unread: as `unread_by_app`."""

    def __init__(self, relay: Relay, unread: Callable[[socket.socket], int]) -> None:
        self._relay = relay
        self._unread = unread
        self._waiting: dict[Link, None] = {}
        self._somebody = trio.Event()

    def room(self, sock: socket.socket) -> int:
        """How many bytes may be sent before the next question; 0: wait until the app has read."""
        try:
            room = UNREAD_MAX - self._unread(sock)
        except OSError:
            return _NOT_ASKED
        return room if room >= _ENOUGH else 0

    def wait(self, link: Link) -> None:
        """Call the link's `send_again` soon."""
        self._waiting[link] = None
        self._somebody.set()

    def forget(self, link: Link) -> None:
        """It is closed."""
        self._waiting.pop(link, None)

    async def run(self) -> None:
        """Ask again, soon while apps read and ever later while none does."""
        while True:
            await self._somebody.wait()
            self._somebody = trio.Event()
            pause = _PAUSE_MIN_S
            while self._waiting:
                await trio.sleep(max(pause, len(self._waiting) * _PAUSE_EACH_S))
                asked, self._waiting = self._waiting, {}
                with self._relay.batch():
                    for link in asked:
                        self._relay.later(link.send_again, link)
                pause = min(pause * 2, _PAUSE_MAX_S) if self._waiting.keys() == asked.keys() else _PAUSE_MIN_S
