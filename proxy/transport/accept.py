"""Step 1 of both paths: accept a redirected connection and ask the kernel whom it was meant for."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from core.addrs import ClientAddr, OriginalDst, from_sockaddr
from core.runtime.sockets import RawStream, tune
from proxy.transport.original_dst import original_dst

_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_RESOURCE_PAUSE_S = 0.1
_ACCEPTS_PER_TURN = 64  # then other tasks run


@dataclass(frozen=True, slots=True)
class Accepted:
    """A connection somebody made to us. dst: what it dialled before the redirect; the listen address itself when nobody redirected it."""

    stream: RawStream
    client: ClientAddr
    dst: OriginalDst


async def accept_forever(
    listener: socket.socket, handle: Callable[[Accepted], Awaitable[None]], nursery: trio.Nursery, admit: Callable[[], bool]
) -> None:
    """Start ``handle`` in ``nursery`` for every connection, until cancelled; the listener is closed then.

    admit: False when there are too many connections already; the newcomer is reset, so that it learns at once.
    """
    tune(listener)  # inherited by what is accepted
    with listener:
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(_ACCEPTS_PER_TURN):
                try:
                    sock, peer = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in _OUT_OF_RESOURCES:
                        await trio.sleep(_RESOURCE_PAUSE_S)
                        break
                    continue  # ECONNABORTED and network errors concern the one connection that is gone already
                _take(sock, peer, handle, nursery, admit)


def _take(
    sock: socket.socket,
    peer: tuple[object, ...],
    handle: Callable[[Accepted], Awaitable[None]],
    nursery: trio.Nursery,
    admit: Callable[[], bool],
) -> None:
    stream = RawStream(sock)
    if not admit():
        stream.abort()
        return
    try:
        accepted = Accepted(stream, ClientAddr(from_sockaddr(peer)), original_dst(sock))
    except OSError:
        stream.abort()  # reset by the client while it waited in the queue
        return
    nursery.start_soon(handle, accepted)
