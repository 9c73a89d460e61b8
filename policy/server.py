"""Serves each sidecar the policy of its own ports and the destinations it dials, over mutual TLS, and keeps them current.

Moves answers of the index to subscribers; decides only who may subscribe: the pod must be known, the peer's verified identity must be
that pod's own, and the connection must come from one of its addresses. Called by policy.controller.

Theory of operation. A connection has a reader, which keeps its set of subscriptions, and a writer. What changed is not queued but
marked: ``due`` holds each subject at most once, and the answer is looked up when the writer gets to it. A sidecar that reads slowly
therefore skips intermediate values and costs one entry per subscription. Answers about an address are encoded once for all subscribers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio
from OpenSSL import SSL

from core.addrs import InvalidAddr, from_sockaddr, parse_addr
from core.alpn import POLICY
from core.credentials import Credentials
from core.names import WorkloadId
from core.runtime import logs, sockets
from core.runtime.rooms import Full, Rooms
from core.runtime.throttle import Throttle
from core.runtime.tls import HandshakeFailed, TlsStream, server_context
from core.runtime.watch import Cell
from policy import wire
from policy.answers import Answers, encoded_policy
from policy.index import Index, Key, PodKey
from policy.lines import LineBuffer, LineTooLong

_log = logs.logger("policy")

_READ_BYTES = 65536
_SEND_BYTES = 65536  # small answers leave together up to about this many bytes
_ADDR_CHARS_MAX = 64  # the longest ``[IPv6]:port`` has 53
_FEW_HANDSHAKES = 4  # at a time: who has more is cut when there is no room, and who has not is never cut for somebody else
_LINES_PER_TURN = 100  # after so many requests of one peer the others get their turn


@dataclass(frozen=True)
class Limits:
    """What one peer, and all together, may cost. Times in seconds.

    line_bytes: of a request; the longest honest one is under 1 KiB. subscriptions: per connection; more are ignored, and the sidecar
    refuses what it gets no answer for. per_pod: connections of one pod; the oldest is closed for the next. pod_wait_s: how long a pod
    that is not known yet is waited for, because a sidecar starts while its pod is still on its way to us. send_s: how long a peer may
    read nothing.
    """

    handshake_s: float = 10
    hello_s: float = 5
    pod_wait_s: float = 5
    send_s: float = 60
    line_bytes: int = 64 * 1024
    subscriptions: int = 8192  # a sidecar's own bounds are 4096 destinations and 1024 undeclared ports
    handshakes: int = 512
    connections: int = 20_000
    per_pod: int = 4


@dataclass
class Counters:
    """For metrics; refused: by stable word."""

    connected: int = 0
    accepted: int = 0
    messages_sent: int = 0
    subscriptions_ignored: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def refuse(self, word: str) -> None:
        """One more peer was refused because of ``word``."""
        self.refused[word] = self.refused.get(word, 0) + 1


class _Refusal(Exception):
    """The peer is told ``sentence`` and the connection ends. word: stable, for metrics."""

    def __init__(self, word: str, sentence: str) -> None:
        super().__init__(sentence)
        self.word = word
        self.sentence = sentence


Subject = int | str
"""A subscribed port of the pod, or a subscribed ``ip:port``."""


class _Subscriber:
    """One admitted connection. sent: every subscription with the answer that was sent last, None when none was."""

    def __init__(self, pod: PodKey, peer: WorkloadId, scope: trio.CancelScope) -> None:
        self.pod = pod
        self.peer = peer
        self.scope = scope
        self.sent: dict[Subject, wire.InboundPolicy | wire.Destination | None] = {}
        self.due: dict[Subject, None] = {}
        self.refusal: _Refusal | None = None
        self.overflowed = False  # has asked for more than it may
        self._wake = trio.Event()

    def mark(self, subject: Subject) -> None:
        self.due[subject] = None
        self._wake.set()

    def refuse(self, refusal: _Refusal) -> None:
        self.refusal = self.refusal or refusal
        self._wake.set()

    async def wait_due(self) -> None:
        while not self.due and self.refusal is None:
            self._wake = trio.Event()
            await self._wake.wait()


class PolicyServer:
    """Answers subscriptions from ``index``; whoever changes the index calls `changed` with what its verbs returned."""

    def __init__(self, index: Index, limits: Limits | None = None) -> None:
        self.counters = Counters()
        self._index = index
        self._limits = limits or Limits()
        self._by_pod: dict[PodKey, list[_Subscriber]] = {}
        self._by_ip: dict[str, dict[str, set[_Subscriber]]] = {}
        self._answers = Answers(index)
        self._handshakes = Rooms(self._limits.handshakes, self._limits.handshakes, _FEW_HANDSHAKES)
        self._pods_changed = trio.lowlevel.ParkingLot()
        self._throttle = Throttle(time.monotonic)

    def changed(self, keys: Iterable[Key]) -> None:
        """Everybody who subscribed to one of these subjects gets its new state, if it is a new one."""
        pods_changed = False
        for key in keys:
            if isinstance(key, PodKey):
                pods_changed = True
                for subscriber in self._by_pod.get(key, ()):
                    self._recheck(subscriber)
            else:
                for addr, subscribers in self._by_ip.get(key.ip, {}).items():
                    self._answers.change(addr)
                    for subscriber in subscribers:
                        subscriber.mark(addr)
        if pods_changed:
            self._pods_changed.unpark_all()

    def _recheck(self, subscriber: _Subscriber) -> None:
        pod = self._index.pod(*subscriber.pod)
        if pod is not None and self._index.identity(pod) != subscriber.peer.uri:
            subscriber.refuse(_Refusal("identity", f"pod {'/'.join(subscriber.pod)} is now {self._index.identity(pod)}"))
        for subject in subscriber.sent:
            if isinstance(subject, int):
                subscriber.mark(subject)

    async def serve(self, listeners: list[trio.SocketListener], credentials: Cell[Credentials | None]) -> None:
        """Accept for ever, with the newest credentials for each new connection; ``credentials`` must hold some."""
        context = _FreshContext(credentials)

        async def handle(stream: trio.SocketStream) -> None:
            await self._handle(stream, context)

        await trio.serve_listeners(handle, listeners)

    async def _handle(self, stream: trio.SocketStream, context: Callable[[], tuple[SSL.Context, str]]) -> None:
        """One connection from accept to end; never raises for what a peer does."""
        tls: TlsStream | None = None
        try:
            if self.counters.connected >= self._limits.connections:
                raise Full
            peer_ip = from_sockaddr(stream.socket.getpeername()).ip
            sockets.tune(stream.socket)  # type: ignore[arg-type]
            with self._handshakes.one(peer_ip) as scope:
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
                hello, rest = await self._wait_hello(stream, lines)
                await self._check(hello, peer, peer_ip)
            except _Refusal as refusal:
                await self._tell(stream, refusal, peer, peer_ip)
                return
            with trio.CancelScope() as scope:
                subscriber = _Subscriber(PodKey(hello.namespace, hello.pod), peer, scope)
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
                        raise _Refusal("no-hello", "the first message must be a hello")
                    return hello, complete[1:]
        raise _Refusal("hello-timeout", f"no hello within {self._limits.hello_s:g} s")

    async def _check(self, hello: wire.Hello, peer: WorkloadId, peer_ip: str | None) -> None:
        """The speaker is the pod it says it is, or _Refusal."""
        name = f"pod {hello.namespace}/{hello.pod}"[:600]
        if hello.namespace != peer.namespace:  # cannot become true by waiting
            raise _Refusal("identity", f"{name} cannot be spoken for by {peer.uri}")
        with trio.move_on_after(self._limits.pod_wait_s):
            while self._index.pod(hello.namespace, hello.pod) is None:
                await self._pods_changed.park()
        pod = self._index.pod(hello.namespace, hello.pod)
        if pod is None:
            raise _Refusal("unknown-pod", f"{name} is not known")
        if self._index.identity(pod) != peer.uri:
            raise _Refusal("identity", f"{name} is {self._index.identity(pod)}, not {peer.uri}")
        if peer_ip is not None and pod.ips and not pod.spec.host_network and peer_ip not in pod.ips:
            raise _Refusal("address", f"{name} has no address {peer_ip}")

    async def _tell(self, stream: trio.abc.Stream, refusal: _Refusal, peer: WorkloadId, peer_ip: str | None) -> None:
        self.counters.refuse(refusal.word)
        about = {"reason": refusal.word, "detail": refusal.sentence, "peer": peer.uri, "client_ip": peer_ip or ""}
        self._throttle.say(_log.warning, refusal.word, "subscriber refused", **about)
        with trio.move_on_after(2):
            await stream.send_all(wire.encode(wire.Refused(refusal.sentence)))

    async def _serve_subscriber(self, stream: trio.abc.Stream, subscriber: _Subscriber, lines: LineBuffer, rest: list[bytes]) -> None:
        same_pod = self._by_pod.setdefault(subscriber.pod, [])
        if len(same_pod) >= self._limits.per_pod:
            same_pod[0].scope.cancel()  # most likely a connection whose other end died without a word
        same_pod.append(subscriber)
        self.counters.accepted += 1
        _log.debug("subscriber connected", pod="/".join(subscriber.pod), peer=subscriber.peer.uri)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream, subscriber)
                await self._read(stream, subscriber, lines, rest)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer is gone; it comes back with all its subscriptions
        finally:
            self._remove(subscriber)

    async def _read(self, stream: trio.abc.Stream, subscriber: _Subscriber, lines: LineBuffer, complete: list[bytes]) -> None:
        """Until the peer ends or a rule is broken; then the writer gets to say why."""
        try:
            while True:
                for number, line in enumerate(complete):
                    self._take(subscriber, _decode(line))
                    if number % _LINES_PER_TURN == _LINES_PER_TURN - 1:
                        await trio.lowlevel.checkpoint()
                data = await stream.receive_some(_READ_BYTES)
                if not data:
                    subscriber.scope.cancel()
                    return
                complete = _complete(lines, bytes(data))
        except _Refusal as refusal:
            subscriber.refuse(refusal)

    def _take(self, subscriber: _Subscriber, message: wire.ToController) -> None:
        if isinstance(message, wire.Hello):
            raise _Refusal("second-hello", "a second hello on one connection")
        if isinstance(message, wire.WatchPort):
            if not 0 < message.port < 65536:
                raise _Refusal("invalid-message", f"port {message.port} does not exist")
            self._subscribe(subscriber, message.port)
            return
        if isinstance(message, wire.ForgetPort):
            subscriber.sent.pop(message.port, None)
            subscriber.due.pop(message.port, None)
            return
        if len(message.addr) > _ADDR_CHARS_MAX:
            raise _Refusal("invalid-message", f"{message.addr[:_ADDR_CHARS_MAX]!r}...: expected IP:PORT")
        try:
            ip = parse_addr(message.addr).ip
        except InvalidAddr as error:
            raise _Refusal("invalid-message", str(error)) from None
        if isinstance(message, wire.ForgetDestination):
            self._unsubscribe(subscriber, message.addr, ip)
        elif self._subscribe(subscriber, message.addr):
            self._by_ip.setdefault(ip, {}).setdefault(message.addr, set()).add(subscriber)

    def _subscribe(self, subscriber: _Subscriber, subject: Subject) -> bool:
        """Asking again means that the answer is wanted again."""
        if subject not in subscriber.sent and len(subscriber.sent) >= self._limits.subscriptions:
            self.counters.subscriptions_ignored += 1
            if not subscriber.overflowed:  # once: a peer that goes on must not write our log
                subscriber.overflowed = True
                _log.warning("subscription ignored", reason="too many", pod="/".join(subscriber.pod), limit=self._limits.subscriptions)
            return False
        subscriber.sent[subject] = None
        subscriber.mark(subject)
        return True

    def _unsubscribe(self, subscriber: _Subscriber, addr: str, ip: str) -> None:
        subscriber.sent.pop(addr, None)
        subscriber.due.pop(addr, None)
        by_addr = self._by_ip.get(ip, {})
        subscribers = by_addr.get(addr, set())
        subscribers.discard(subscriber)
        if not subscribers:
            by_addr.pop(addr, None)
            self._answers.forget(addr)
        if not by_addr:
            self._by_ip.pop(ip, None)

    def _remove(self, subscriber: _Subscriber) -> None:
        for subject in list(subscriber.sent):
            if isinstance(subject, str):
                self._unsubscribe(subscriber, subject, parse_addr(subject).ip)
        same_pod = self._by_pod[subscriber.pod]
        same_pod.remove(subscriber)
        if not same_pod:
            del self._by_pod[subscriber.pod]

    async def _write(self, stream: trio.abc.Stream, subscriber: _Subscriber) -> None:
        while True:
            await subscriber.wait_due()
            if subscriber.refusal is not None:
                break
            messages: list[bytes] = []
            size = 0
            while subscriber.due and size < _SEND_BYTES:
                subject = next(iter(subscriber.due))
                del subscriber.due[subject]
                message = self._message(subscriber, subject)
                if message:
                    messages.append(message)
                    size += len(message)
            with trio.move_on_after(self._limits.send_s) as sending:
                await stream.send_all(b"".join(messages))
            if sending.cancelled_caught:
                self.counters.refuse("slow-reader")
                _log.warning("subscriber cut", reason="slow-reader", pod="/".join(subscriber.pod), send_s=self._limits.send_s)
                break
            self.counters.messages_sent += len(messages)
        subscriber.scope.cancel()

    def _message(self, subscriber: _Subscriber, subject: Subject) -> bytes:
        """The line for a subject, empty when the peer has that state already. A pod that is gone keeps the policy it had."""
        if isinstance(subject, int):
            if self._index.pod(*subscriber.pod) is None:
                return b""
            policy = self._index.inbound_policy(*subscriber.pod, subject)
            before = subscriber.sent.get(subject)
            if policy is before or policy == before:
                return b""
            subscriber.sent[subject] = policy
            return encoded_policy(subject, policy)
        destination, line = self._answers.about(subject, subscriber.pod.namespace)
        if destination is subscriber.sent.get(subject):
            return b""
        subscriber.sent[subject] = destination
        return line


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
        raise _Refusal("line-too-long", str(error)) from None


def _decode(line: bytes) -> wire.ToController:
    try:
        return wire.decode_to_controller_untrusted(line)
    except wire.WireError as error:
        raise _Refusal("invalid-message", f"not a message of this API: {error}"[:300]) from None
