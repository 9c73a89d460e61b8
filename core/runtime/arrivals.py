"""Accepting connections from clients of which some may open as many as they can: nobody waits behind them.

A control-plane process is reachable by every pod. With one connection accepted a turn of the loop, a flood stands in the kernel's queue,
where nobody can be told from another, and everybody waits for seconds; so everything that waits is accepted at once, which is cheap. What
is not cheap, the handshake, is done for a few connections of an address at a time. Called by core.k8s.https and policy.server.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from core.runtime import logs
from core.runtime.throttle import Throttle

_log = logs.logger("accept")

_AT_ONCE = 32  # a turn: who is connected already must get theirs
_PAUSE_S = 0.1  # when there is no descriptor or memory for one more
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


async def serve_arrivals(
    listeners: Sequence[trio.SocketListener], handle: Callable[[trio.SocketStream], Awaitable[None]], handlers: trio.Nursery
) -> None:
    """For ever, run ``handle`` in ``handlers`` for every connection; closes the listeners at the end. ``handle`` must not raise."""
    throttle = Throttle(time.monotonic)
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, handle, handlers, throttle)


async def _accept(
    listener: trio.SocketListener,
    handle: Callable[[trio.SocketStream], Awaitable[None]],
    handlers: trio.Nursery,
    throttle: Throttle,
) -> None:
    theirs = listener.socket
    async with listener:
        with socket.fromfd(theirs.fileno(), theirs.family, theirs.type) as sock:  # a descriptor of our own, accepted from without trio
            sock.setblocking(False)
            while True:
                await trio.lowlevel.wait_readable(sock)
                try:
                    for _ in range(_AT_ONCE):
                        accepted, _peer = sock.accept()
                        accepted.setblocking(False)
                        handlers.start_soon(handle, trio.SocketStream(trio.socket.from_stdlib_socket(accepted)))
                except BlockingIOError:
                    continue
                except OSError as error:  # also of a client that left while it waited
                    if error.errno in _NO_ROOM:
                        throttle.say(_log.error, "no-room", "no connection can be accepted", reason=str(error))
                        await trio.sleep(_PAUSE_S)


class Turns:
    """``few`` of each address at a time; the others of that address wait for them, and no other address does."""

    def __init__(self, few: int) -> None:
        self._few = few
        self._of: dict[str, tuple[trio.CapacityLimiter, int]] = {}

    def __len__(self) -> int:
        return len(self._of)

    @asynccontextmanager
    async def one(self, ip: str) -> AsyncIterator[None]:
        """The turn of a connection from this address."""
        limiter, users = self._of.get(ip) or (trio.CapacityLimiter(self._few), 0)
        self._of[ip] = limiter, users + 1
        try:
            async with limiter:
                yield
        finally:
            limiter, users = self._of[ip]
            if users > 1:
                self._of[ip] = limiter, users - 1
            else:
                del self._of[ip]
