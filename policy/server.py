"""Serves each sidecar the policy of its own ports and the destinations it dials, over mutual TLS, and keeps them current.

Moves answers of the index to subscribers; decides only who may subscribe: the pod must be known, the peer's verified identity must be
that pod's own, and the connection must come from one of its addresses. Called by policy.controller.

Theory of operation. A connection has a reader, which keeps its subscriptions in policy.subscriptions, and a writer, which sends what is due
there. A sidecar that reads slowly skips intermediate values. Answers about an address are encoded once for all subscribers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice

import trio
from OpenSSL import SSL

from core.addrs import from_sockaddr
from core.alpn import POLICY
from core.credentials import Credentials
from core.names import WorkloadId
from core.runtime import logs, sockets
from core.runtime.arrivals import Turns, serve_arrivals
from core.runtime.rooms import Full, Rooms
from core.runtime.throttle import Throttle
from core.runtime.tls import HandshakeFailed, TlsStream, server_context
from core.runtime.watch import Cell
from policy import wire
from policy.index import Index, Key, PodKey
from policy.limits import Counters, Limits
from policy.lines import LineBuffer, LineTooLong
from policy.subscriptions import Refusal, Subscriber, Subscriptions

_log = logs.logger("policy")

_READ_BYTES = 65536
_SEND_BYTES = 65536  # small answers leave together up to about this many bytes
_FEW_AT_ONCE = 4  # of one address: who has more is cut when there is no room, and who has not is never cut for somebody else
_HANDSHAKES_OF_ONE = 8  # address, at a time; the next ones wait
_LINES_PER_TURN = 100  # after so many requests of one peer the others get their turn
_ANSWERS_PER_TURN = 100  # looked up, though most may be what the peer has already


class PolicyServer:
    """Answers subscriptions from ``index``; whoever changes the index calls `changed` with what its verbs returned."""

    def __init__(self, index: Index, limits: Limits | None = None) -> None:
        self.counters = Counters()
        self._index = index
        self._limits = limits or Limits()
        self._subscriptions = Subscriptions(index, self._limits, self.counters)
        self._handshakes = Rooms(self._limits.handshakes, self._limits.handshakes, _FEW_AT_ONCE)
        self._turns = Turns(_HANDSHAKES_OF_ONE)
        self._newcomers = Rooms(self._limits.newcomers, self._limits.newcomers, _FEW_AT_ONCE)
        self._pods_changed = trio.lowlevel.ParkingLot()
        self._throttle = Throttle(time.monotonic)

    def changed(self, keys: Iterable[Key]) -> None:
        """Everybody who subscribed to one of these subjects gets its new state, if it is a new one."""
        keys = tuple(keys)
        self._subscriptions.changed(keys)
        if any(isinstance(key, PodKey) for key in keys):
            self._pods_changed.unpark_all()

    async def serve(self, listeners: list[trio.SocketListener], credentials: Cell[Credentials | None]) -> None:
        """Accept for ever, with the newest credentials for each new connection; ``credentials`` must hold some."""
        context = _FreshContext(credentials)

        async def handle(stream: trio.SocketStream) -> None:
            await self._handle(stream, context)

        async with trio.open_nursery() as nursery:
            await serve_arrivals(listeners, handle, nursery)

    async def _handle(self, stream: trio.SocketStream, context: Callable[[], tuple[SSL.Context, str]]) -> None:
        """One connection from accept to end; never raises for what a peer does."""
        tls: TlsStream | None = None
        try:
            if self.counters.connected >= self._limits.connections:
                raise Full
            peer_ip = from_sockaddr(stream.socket.getpeername()).ip
            sockets.tune(stream.socket)  # type: ignore[arg-type]
            with self._handshakes.one(peer_ip) as scope:
                async with self._turns.one(peer_ip):
                    tls = await self._handshake(stream, *context())
            if scope.cancelled_caught:
                raise Full
            if tls is not None and tls.peer is not None:
                await self.serve_peer(tls, tls.peer, peer_ip)
        except Full:
            self.counters.refuse("overloaded")
        except OSError as error:
            _log.debug("connection lost", reason=str(error))
        except Exception as error:  # a bug of ours that one peer has found must not take the policy from all others
            self.counters.refuse("internal")
            _log.error("a bug of ours ended a connection", exc_info=error)
        finally:
            await trio.aclose_forcefully(stream)

    async def _handshake(self, stream: trio.SocketStream, context: SSL.Context, trust_domain: str) -> TlsStream | None:
        tls = TlsStream.server(stream, context, trust_domain)
        try:
            with trio.fail_after(self._limits.handshake_s):
                await tls.do_handshake()
            return tls
        except (HandshakeFailed, trio.TooSlowError, trio.BrokenResourceError) as error:
            reason = error.reason if isinstance(error, HandshakeFailed) else "handshake-timeout"
            self.counters.refuse(reason)
            self._throttle.say(_log.info, reason, "peer refused", reason=reason, detail=str(error))
            return None

    async def serve_peer(self, stream: trio.abc.Stream, peer: WorkloadId, peer_ip: str | None) -> None:
        """Serve an authenticated peer until it goes or breaks a rule; closes the stream. peer_ip: None when there is none to check."""
        lines = LineBuffer(self._limits.line_bytes)
        self.counters.connected += 1
        try:
            try:
                hello, rest = await self._admit(stream, lines, peer, peer_ip)
                subscriber = Subscriber(PodKey(hello.namespace, hello.pod), peer, trio.CancelScope())
                self._subscriptions.add(subscriber)
            except Refusal as refusal:
                await self._tell(stream, refusal, peer, peer_ip)
                return
            with subscriber.scope:
                await self._serve_subscriber(stream, subscriber, lines, rest)
            if subscriber.refusal is not None:
                await self._tell(stream, subscriber.refusal, peer, peer_ip)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer is gone; it comes back with all its subscriptions
        finally:
            self.counters.connected -= 1
            with trio.move_on_after(2) as closing:
                closing.shield = True
                await stream.aclose()

    async def _admit(
        self, stream: trio.abc.Stream, lines: LineBuffer, peer: WorkloadId, peer_ip: str | None
    ) -> tuple[wire.Hello, list[bytes]]:
        """Who it is, checked, and what else it said already; raises Refusal."""
        try:
            with self._newcomers.one(peer_ip or ""):
                hello, rest = await self._wait_hello(stream, lines)
                await self._check(hello, peer, peer_ip)
                return hello, rest
        except Full:
            pass
        raise Refusal("overloaded", "too many have not said yet who they are, or nobody knows them")

    async def _wait_hello(self, stream: trio.abc.Stream, lines: LineBuffer) -> tuple[wire.Hello, list[bytes]]:
        with trio.move_on_after(self._limits.hello_s):
            while True:
                data = await stream.receive_some(_READ_BYTES)
                if not data:
                    raise trio.BrokenResourceError("the peer left without a hello")
                complete = _complete(lines, bytes(data))
                if complete:
                    hello = _decode(complete[0])
                    if not isinstance(hello, wire.Hello):
                        raise Refusal("no-hello", "the first message must be a hello")
                    return hello, complete[1:]
        raise Refusal("hello-timeout", f"no hello within {self._limits.hello_s:g} s")

    async def _check(self, hello: wire.Hello, peer: WorkloadId, peer_ip: str | None) -> None:
        """The speaker is the pod it says it is, or Refusal."""
        name = f"pod {hello.namespace}/{hello.pod}"[:600]
        if hello.namespace != peer.namespace:  # cannot become true by waiting
            raise Refusal("identity", f"{name} cannot be spoken for by {peer.uri}")
        with trio.move_on_after(self._limits.pod_wait_s):
            while self._index.pod(hello.namespace, hello.pod) is None:
                await self._pods_changed.park()
        pod = self._index.pod(hello.namespace, hello.pod)
        if pod is None:
            raise Refusal("unknown-pod", f"{name} is not known")
        if self._index.identity(pod) != peer.uri:
            raise Refusal("identity", f"{name} is {self._index.identity(pod)}, not {peer.uri}")
        if peer_ip is not None and pod.ips and not pod.spec.host_network and peer_ip not in pod.ips:
            raise Refusal("address", f"{name} has no address {peer_ip}")

    async def _tell(self, stream: trio.abc.Stream, refusal: Refusal, peer: WorkloadId, peer_ip: str | None) -> None:
        self.counters.refuse(refusal.word)
        about = {"reason": refusal.word, "detail": refusal.sentence, "peer": peer.uri, "client_ip": peer_ip or ""}
        self._throttle.say(_log.warning, refusal.word, "subscriber refused", **about)
        with trio.move_on_after(2):
            await stream.send_all(wire.encode(wire.Refused(refusal.sentence)))

    async def _serve_subscriber(self, stream: trio.abc.Stream, subscriber: Subscriber, lines: LineBuffer, rest: list[bytes]) -> None:
        self.counters.accepted += 1
        _log.debug("subscriber connected", pod="/".join(subscriber.pod), peer=subscriber.peer.uri)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream, subscriber)
                await self._read(stream, subscriber, lines, rest)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer is gone; it comes back with all its subscriptions
        finally:
            self._subscriptions.remove(subscriber)

    async def _read(self, stream: trio.abc.Stream, subscriber: Subscriber, lines: LineBuffer, complete: list[bytes]) -> None:
        """Until the peer ends or a rule is broken; then the writer gets to say why."""
        try:
            while True:
                for number, line in enumerate(complete):
                    self._subscriptions.take(subscriber, _decode(line))
                    if number % _LINES_PER_TURN == _LINES_PER_TURN - 1:
                        await trio.lowlevel.checkpoint()
                data = await stream.receive_some(_READ_BYTES)
                if not data:
                    subscriber.scope.cancel()
                    return
                complete = _complete(lines, bytes(data))
        except Refusal as refusal:
            subscriber.refuse(refusal)

    async def _write(self, stream: trio.abc.Stream, subscriber: Subscriber) -> None:
        while True:
            await subscriber.wait_due()
            if subscriber.refusal is not None:
                break
            messages: list[bytes] = []
            size = 0
            for subject in tuple(islice(subscriber.due, _ANSWERS_PER_TURN)):
                del subscriber.due[subject]
                message = self._subscriptions.message(subscriber, subject)
                if message:
                    messages.append(message)
                    size += len(message)
                    if size >= _SEND_BYTES:
                        break
            with trio.move_on_after(self._limits.send_s) as sending:
                await stream.send_all(b"".join(messages))  # others get their turn here, also when there is nothing to send
            if sending.cancelled_caught:
                self.counters.refuse("slow-reader")
                _log.warning("subscriber cut", reason="slow-reader", pod="/".join(subscriber.pod), send_s=self._limits.send_s)
                break
            self.counters.messages_sent += len(messages)
        subscriber.scope.cancel()


class _FreshContext:
    """The TLS context of the newest credentials, made once for each."""

    def __init__(self, credentials: Cell[Credentials | None]) -> None:
        self._credentials = credentials
        self._made: tuple[Credentials, SSL.Context] | None = None

    def __call__(self) -> tuple[SSL.Context, str]:
        current = self._credentials.value
        if current is None:
            raise OSError("no credentials yet")
        if self._made is None or self._made[0] is not current:
            self._made = current, server_context(current, client="required", alpn=(POLICY,))
        return self._made[1], current.identity.trust_domain


def _complete(lines: LineBuffer, data: bytes) -> list[bytes]:
    try:
        return lines.feed_untrusted(data)
    except LineTooLong as error:
        raise Refusal("line-too-long", str(error)) from None


def _decode(line: bytes) -> wire.ToController:
    try:
        return wire.decode_to_controller_untrusted(line)
    except wire.WireError as error:
        raise Refusal("invalid-message", f"not a message of this API: {error}"[:300]) from None
