"""The first part of `serve`'s path without a task: the relay loop itself reads a client's first bytes and does its handshake.

A task with its scopes and waits costs more CPU than the signature of a handshake, and most clients speak at once, to a port whose policy
is known. Such a connection is a link of the relay from its accept on, and `Arrival` is its receiver until it has an engine. When there is
something to wait for (a policy, the rest of a first line, an app for opaque bytes, a silent client), the connection goes on as a task in
`serve`, with what was read so far. So nothing is decided here that is not decided there too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from core.runtime.tls import Handshake, HandshakeFailed
from proxy.discover import PortState
from proxy.inbound.serve import Inbound, Peer
from proxy.protocol.detect import HTTP
from proxy.rescue import Failure
from proxy.transport.accept import Accepted
from proxy.transport.sniff import classify

Serve = Callable[[Accepted], Awaitable[None]]


class Arrivals:
    """Connections that the relay carries and nobody serves yet.

    start_task: starts a task that serves a connection from here on. settle: told that a connection is served now (None), or why it is not.
    Exactly one of the two is called, once, for every connection taken.
    """

    def __init__(
        self, inbound: Inbound, start_task: Callable[[Accepted, Serve], None], settle: Callable[[Accepted, Exception | None], None]
    ) -> None:
        self.inbound = inbound
        self.start_task = start_task
        self.settle = settle
        self._open = 0
        self._silent: dict[Arrival, float] = {}  # until when each may say something; all have the same time, so the first is the next
        self._listening = False

    def __len__(self) -> int:
        return self._open

    def take(self, accepted: Accepted) -> bool:
        """Begin to serve a connection. False: its first step has to wait for something, so it needs a task from the beginning."""
        try:
            port = self.inbound.known_port(accepted)
        except Failure:
            port = None  # the task is refused by the same rule and says so
        if port is None:
            return False
        arrival = Arrival(self, accepted, port)
        self._open += 1
        self._silent[arrival] = trio.current_time() + self.inbound.config.detect_silence_s
        if not self._listening:
            self._listening = True
            self.inbound.nursery.start_soon(self._hear_silence)
        arrival.link.start()
        return True

    def left(self, arrival: Arrival) -> None:
        """It is somebody else's from now on."""
        self._open -= 1
        self._silent.pop(arrival, None)

    def spoke(self, arrival: Arrival) -> None:
        """It is silent no longer."""
        self._silent.pop(arrival, None)

    async def _hear_silence(self) -> None:
        """One task for all of them, while there are any: those whose time is over are left to `serve`."""
        while self._silent:
            arrival, until = next(iter(self._silent.items()))
            if until <= trio.current_time():
                arrival.stayed_silent()
            else:
                await trio.sleep_until(until)
        self._listening = False


class Arrival:
    """The receiver of one connection until it is served."""

    __slots__ = ("_accepted", "_arrivals", "_handshake", "_port", "link")

    def __init__(self, arrivals: Arrivals, accepted: Accepted, port: PortState) -> None:
        self._arrivals = arrivals
        self._accepted = accepted
        self._port = port
        self._handshake: Handshake | None = None
        self.link = arrivals.inbound.relay.adopt(accepted.stream.sock, self)

    # --- Receiver --------------------------------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        """See sides.Receiver."""
        try:
            if self._handshake is None:
                self._hear(data)
            else:
                self._shake(self._handshake, data)
        except Exception as error:
            self._fail(error)

    def ended(self) -> None:
        """See sides.Receiver."""
        if self._handshake is None:
            self._start_task(self._arrivals.inbound.serve)
        else:
            self._fail(HandshakeFailed("closed", "the peer ended the handshake early"))

    def lost(self, reset: bool) -> None:
        """See sides.Receiver."""
        if self._handshake is None:
            self._fail(ConnectionResetError("the client reset the connection before it said anything"))
        else:
            self._fail(HandshakeFailed("reset", "the peer reset the connection during the handshake"))

    def drained(self) -> None:
        """See sides.Receiver."""

    def expired(self) -> None:
        """See sides.Receiver."""
        self._fail(HandshakeFailed("timeout", "the handshake was not finished in time"))

    # --- steps -----------------------------------------------------------------------------------------------------------

    def stayed_silent(self) -> None:
        """Its time for first bytes is over."""
        self._start_task(partial(self._arrivals.inbound.serve, silent=True))

    def _hear(self, data: bytes) -> None:
        inbound = self._arrivals.inbound
        sniffed = classify(data)
        if sniffed is None:
            self._start_task(partial(inbound.serve, received=data))
        elif inbound.addressed_to_us(sniffed):
            self._arrivals.spoke(self)
            self._handshake = inbound.security.accepting()
            self.link.expire_after(inbound.config.handshake_timeout_s)
            self._shake(self._handshake, data)
        else:
            self._serve(inbound.peer_without_identity(sniffed, self._port))

    def _shake(self, handshake: Handshake, data: bytes) -> None:
        if flight := handshake.step(data):
            self.link.write(flight)
        if not handshake.done:
            return
        if self.link.blocked:
            raise HandshakeFailed("protocol", "the peer finished a handshake of which it did not read our part")
        self._serve(self._arrivals.inbound.peer_of_handshake(handshake))

    def _serve(self, peer: Peer) -> None:
        inbound, port = self._arrivals.inbound, self._port
        if peer.protocol not in HTTP:
            self._start_task(partial(inbound.serve_opaque, peer=peer, port=port))
            return
        self._accepted.stream.release()
        if peer.records is not None:
            self.link = inbound.relay.secure(self.link, peer.records)
        inbound.serve_http(self._accepted, self.link, peer, port)
        self._arrivals.left(self)
        self._arrivals.settle(self._accepted, None)

    def _start_task(self, serve: Serve) -> None:
        self.link.leave()
        self._arrivals.left(self)
        self._arrivals.start_task(self._accepted, serve)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, HandshakeFailed) and error.farewell:
            self.link.write(error.farewell)
        self.link.abort()
        self._arrivals.left(self)
        self._arrivals.settle(self._accepted, error)
