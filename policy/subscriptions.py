"""Who subscribed to what, and what each subscriber still has to be told.

What changed is not queued but marked: ``due`` holds each subject at most once, and the answer is looked up when the writer gets to it. A
sidecar that reads slowly therefore skips intermediate values and costs one entry per subscription. Moves no bytes: called by policy.server
for every connection, and through it by policy.controller when the index has changed.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from core.addrs import Addr, InvalidAddr, parse_addr
from core.names import WorkloadId
from core.runtime import logs
from policy import wire
from policy.answers import Answers, encoded_policy
from policy.index import Index, Key, PodKey
from policy.limits import Counters, Limits
from policy.shares import Shares, bytes_of

_log = logs.logger("policy")

_ADDR_CHARS_MAX = 64  # the longest ``[IPv6]:port`` has 53


class Refusal(Exception):
    """The peer is told ``sentence`` and the connection ends. word: stable, for metrics."""

    def __init__(self, word: str, sentence: str) -> None:
        super().__init__(sentence)
        self.word = word
        self.sentence = sentence


Subject = int | str
"""A subscribed port of the pod, or a subscribed ``ip:port``."""


class Subscriber:
    """One admitted connection. sent: every subscription with the answer that was sent last, None when none was."""

    def __init__(self, pod: PodKey, peer: WorkloadId, scope: trio.CancelScope) -> None:
        self.pod = pod
        self.peer = peer
        self.scope = scope
        self.sent: dict[Subject, wire.InboundPolicy | wire.Destination | None] = {}
        self.due: dict[Subject, None] = {}
        self.refusal: Refusal | None = None
        self.overflowed = False  # has asked for more than it may
        self.bytes_taken = 0  # 0: it is not, or no longer, among the subscribers
        self._wake = trio.Event()

    def mark(self, subject: Subject) -> None:
        """The subject may have another answer now."""
        self.due[subject] = None
        self._wake.set()

    def refuse(self, refusal: Refusal) -> None:
        """The connection must end; the first reason counts."""
        self.refusal = self.refusal or refusal
        self._wake.set()

    async def wait_due(self) -> None:
        """Until there is something to tell, or a reason to end."""
        while not self.due and self.refusal is None:
            self._wake = trio.Event()
            await self._wake.wait()


class Subscriptions:
    """Of all subscribers. Whoever changes the index calls `changed`; what came of it is in each subscriber's ``due``."""

    def __init__(self, index: Index, limits: Limits, counters: Counters) -> None:
        self._index = index
        self._limits = limits
        self._counters = counters
        self._answers = Answers(index)
        self._shares = Shares(limits.memory_bytes)
        self._by_pod: dict[PodKey, list[Subscriber]] = {}
        self._by_ip: dict[str, dict[str, set[Subscriber]]] = {}

    def add(self, subscriber: Subscriber) -> None:
        """A pod's oldest connection ends for one that is too many: most likely its other end died without a word. Raises Refusal when
        there is no memory for one more pod."""
        if not self._has_room(subscriber.pod, bytes_of(0)):
            raise Refusal("overloaded", "no memory is left for one more sidecar, see docs/scale.md")
        same_pod = self._by_pod.setdefault(subscriber.pod, [])
        if len(same_pod) >= self._limits.per_pod:
            same_pod[0].scope.cancel()
        same_pod.append(subscriber)
        self._account(subscriber, bytes_of(0))

    def remove(self, subscriber: Subscriber) -> None:
        """Nothing of it is left; nothing happens when it was removed before."""
        if not subscriber.bytes_taken:
            return
        for subject in list(subscriber.sent):
            if isinstance(subject, str):
                self._unsubscribe(subscriber, subject, parse_addr(subject).ip)
        subscriber.sent.clear()
        subscriber.due.clear()
        self._account(subscriber, 0)
        same_pod = self._by_pod[subscriber.pod]
        same_pod.remove(subscriber)
        if not same_pod:
            del self._by_pod[subscriber.pod]

    def changed(self, keys: Iterable[Key]) -> None:
        """Everybody who subscribed to one of these subjects gets its new state, if it is a new one."""
        for key in keys:
            if isinstance(key, PodKey):
                for subscriber in self._by_pod.get(key, ()):
                    self._recheck(subscriber)
            else:
                for addr, subscribers in self._by_ip.get(key.ip, {}).items():
                    self._answers.change(addr)
                    for subscriber in subscribers:
                        subscriber.mark(addr)

    def take(self, subscriber: Subscriber, message: wire.ToController) -> None:
        """One message of a subscriber after its hello; raises Refusal when it breaks a rule."""
        if not subscriber.bytes_taken:
            return  # it had to leave a moment ago
        if isinstance(message, wire.Hello):
            raise Refusal("second-hello", "a second hello on one connection")
        if isinstance(message, wire.WatchPort):
            if not 0 < message.port < 65536:
                raise Refusal("invalid-message", f"port {message.port} does not exist")
            self._subscribe(subscriber, message.port)
            return
        if isinstance(message, wire.ForgetPort):
            subscriber.sent.pop(message.port, None)
            subscriber.due.pop(message.port, None)
            self._account(subscriber, bytes_of(len(subscriber.sent)))
            return
        ip = _dialled(message.addr).ip
        if isinstance(message, wire.ForgetDestination):
            self._unsubscribe(subscriber, message.addr, ip)
        elif self._subscribe(subscriber, message.addr):
            self._by_ip.setdefault(ip, {}).setdefault(message.addr, set()).add(subscriber)

    def message(self, subscriber: Subscriber, subject: Subject) -> bytes:
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

    def _subscribe(self, subscriber: Subscriber, subject: Subject) -> bool:
        """Asking again means that the answer is wanted again."""
        if subject not in subscriber.sent:
            if len(subscriber.sent) >= self._limits.subscriptions:
                self._ignore(subscriber, "too many")
                return False
            needed = bytes_of(len(subscriber.sent) + 1)
            if not self._has_room(subscriber.pod, needed - subscriber.bytes_taken):
                self._ignore(subscriber, "memory is short")
                return False
            self._account(subscriber, needed)
        subscriber.sent[subject] = None
        subscriber.mark(subject)
        return True

    def _ignore(self, subscriber: Subscriber, reason: str) -> None:
        self._counters.subscriptions_ignored += 1
        if not subscriber.overflowed:  # once: a peer that goes on must not write our log
            subscriber.overflowed = True
            about = {"pod": "/".join(subscriber.pod), "subscriptions": len(subscriber.sent), "limit": self._limits.subscriptions}
            _log.warning("subscription ignored", reason=reason, **about)

    def _unsubscribe(self, subscriber: Subscriber, addr: str, ip: str) -> None:
        subscriber.sent.pop(addr, None)
        subscriber.due.pop(addr, None)
        self._account(subscriber, bytes_of(len(subscriber.sent)))
        by_addr = self._by_ip.get(ip, {})
        subscribers = by_addr.get(addr, set())
        subscribers.discard(subscriber)
        if not subscribers:
            by_addr.pop(addr, None)
            self._answers.forget(addr)
        if not by_addr:
            self._by_ip.pop(ip, None)

    def _has_room(self, pod: PodKey, more: int) -> bool:
        """Is there memory for this, also by having others leave that hold far more?"""
        while not self._shares.fits(more):
            greedy = self._shares.who_leaves(pod, more)
            if greedy is None:
                return False
            leaving = max(self._by_pod[greedy], key=lambda subscriber: subscriber.bytes_taken)
            sentence = f"memory is short, and pod {'/'.join(greedy)} has {len(leaving.sent)} subscriptions here, see docs/scale.md"
            self.remove(leaving)
            leaving.refuse(Refusal("overloaded", sentence))
            leaving.scope.cancel()  # at once: a peer that reads slowly would hold the memory for a minute
        return True

    def _account(self, subscriber: Subscriber, now: int) -> None:
        """The subscriber takes so much memory now."""
        if now != subscriber.bytes_taken:
            self._shares.change(subscriber.pod, now - subscriber.bytes_taken)
            subscriber.bytes_taken = now
            self._counters.bytes_taken = self._shares.taken

    def _recheck(self, subscriber: Subscriber) -> None:
        pod = self._index.pod(*subscriber.pod)
        if pod is not None and self._index.identity(pod) != subscriber.peer.uri:
            subscriber.refuse(Refusal("identity", f"pod {'/'.join(subscriber.pod)} is now {self._index.identity(pod)}"))
        for subject in subscriber.sent:
            if isinstance(subject, int):
                subscriber.mark(subject)


def _dialled(text: str) -> Addr:
    """The address of a subscription, or Refusal. Each has one spelling, the sidecars': an answer may be megabytes, and is kept for each."""
    if len(text) > _ADDR_CHARS_MAX:
        raise Refusal("invalid-message", f"{text[:_ADDR_CHARS_MAX]!r}...: expected IP:PORT")
    try:
        addr = parse_addr(text)
    except InvalidAddr as error:
        raise Refusal("invalid-message", str(error)) from None
    if str(addr) != text:
        raise Refusal("invalid-message", f"{text!r}: expected {addr}, the one spelling of this address")
    return addr
