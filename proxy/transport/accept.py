"""Step 1 of both paths: accept a redirected connection and ask the kernel whom it was meant for."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from core.addrs import ClientAddr, OriginalDst, from_sockaddr
from core.runtime.sockets import RawStream, tune
from proxy.transport.listener import Listener
from proxy.transport.original_dst import original_dst
from proxy.transport.relay import Relay


@dataclass(frozen=True, slots=True)
class Accepted:
    """A connection that was accepted. dst: the address it dialled before the redirect; our listen address when it was not redirected."""

    stream: RawStream
    client: ClientAddr
    dst: OriginalDst


def accepting(relay: Relay, sock: socket.socket, begin: Callable[[Accepted], None], admit: Callable[[], bool]) -> Listener:
    """Call ``begin`` with every connection that is made to a listening socket, until the listener is aborted.

    admit: False when there are too many connections already; the newcomer is reset, so that it learns at once.
    """

    def take(sock: socket.socket, peer: tuple[object, ...]) -> None:
        stream = RawStream(sock)
        if not admit():
            stream.abort()
            return
        try:
            accepted = Accepted(stream, ClientAddr(from_sockaddr(peer)), original_dst(sock))
        except OSError:
            stream.abort()  # reset by the client while it waited in the queue
            return
        begin(accepted)

    tune(sock)  # inherited by what is accepted
    return relay.listen(sock, take)
