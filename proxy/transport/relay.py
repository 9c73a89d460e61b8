"""The relay loop: one level-triggered epoll of our own that carries every connection whose next step waits for nothing.

Theory of operation. A trio task that waits for each read costs an epoll_ctl, a wake-up through the scheduler and a read that fails;
measured, that doubles the CPU of a small request. So established connections leave trio: a `Link` owns a non-blocking socket, and
when the socket is ready the loop reads once and hands the bytes to the link's `Receiver` (an HTTP engine, an opaque splice), which
answers by calling sinks. Nothing here awaits; the loop runs where trio would sleep (turn.py). What needs to wait (dialling, a
handshake, a policy) is a trio task that ends in a call into an engine, inside `Relay.batch`.

* One pass handles at most `_EVENTS_PER_PASS` connections and one read of each, then trio runs: control work never starves.
* Writes go out at once (`write`) or together at the end of the pass (`queue`). What the socket does not take is held by the link,
  `blocked` says so, and the receiver on the other side stops its source: memory is bounded by one read per connection.
* A link that dies inside a call tells its receiver after the call returned, never from within.
* An exception from a receiver is a bug of ours: it aborts that link's connections only, and is reported with its traceback.
* Deadlines live in a wheel of one-second slots. Moving a deadline later is one attribute assignment.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, TypeVar

import trio

from core.runtime.memory import give_back
from proxy.protocol.sides import Receiver
from proxy.transport.link import NEVER, NO_RECEIVER, Link
from proxy.transport.listener import Listener
from proxy.transport.pace import Pace, unread_by_app
from proxy.transport.tls_bio import Records
from proxy.transport.tls_link import TlsLink
from proxy.transport.turn import Turn, turns

_MANY_CLOSED: Final = 200  # connections, some 8 MB: giving back less is not worth the milliseconds it takes
_MANY_EVENTS: Final = 10_000  # a burst of requests, which leaves some 2 MB of freed decisions, heads and buffers behind

R = TypeVar("R", bound=Receiver)

_EVENTS_PER_PASS: Final = 128
_SLIM_PER_TURN: Final = 1000  # connections at rest, some 3 ms
_WRITE: Final = select.EPOLLOUT
_DEAD: Final = select.EPOLLERR | select.EPOLLHUP


class Relay:
    """All links of a process. `run` is a task; everything else is synchronous and belongs to the same thread.

    report: told of exceptions that cost a connection. take_turns: run where trio would sleep (turn.py), else as a task of trio's. unread:
    as `unread_by_app`.
    """

    def __init__(
        self,
        report: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        take_turns: bool = True,
        unread: Callable[[socket.socket], int] = unread_by_app,
    ) -> None:
        self._take_turns = take_turns
        self._turn: Turn | None = None
        self.epoll = select.epoll()
        self._links: dict[int, Link] = {}
        self._wheel: dict[int, dict[Link, None]] = {}
        self._reached = int(clock())
        self._clock = clock
        self._report = report
        self._doomed: list[Link] = []
        self._later: list[tuple[Callable[[], None], Link | None]] = []
        self._quiet = Quiet()
        self.pace = Pace(self, unread)
        self.active: dict[TlsLink, None] = {}
        self.resting: dict[TlsLink, None] = {}
        self.dirty: list[Link] = []
        self.in_pass = False
        self.now = clock()

    def attach(self, sock: socket.socket, make: Callable[[Link], R], records: Records | None = None) -> R:
        """Take over a connection and start to deliver to the receiver that ``make`` builds on its link."""
        link = self.adopt(sock, NO_RECEIVER, records)
        receiver = make(link)
        link.receiver = receiver
        link.start()
        return receiver

    def adopt(self, sock: socket.socket, receiver: Receiver, records: Records | None = None) -> Link:
        """Take over a connected non-blocking socket; with records, after its TLS handshake. Delivery starts with `Link.start`."""
        link = Link(self, sock, receiver) if records is None else TlsLink(self, sock, receiver, records)
        self._links[sock.fileno()] = link
        return link

    def listen(self, sock: socket.socket, accepted: Callable[[socket.socket, tuple[object, ...]], None]) -> Listener:
        """Take over a listening non-blocking socket; ``accepted`` takes each connection. Until the listener's `abort`."""
        self._links[sock.fileno()] = listener = Listener(self, sock, accepted)
        listener.start()
        return listener

    def secure(self, link: Link, records: Records) -> Link:
        """From now on the bytes of a plain link are the records of a TLS connection: the link that stands in its place.

        For connections whose handshake the link's receiver did. Nothing may be held by the old link: its peer has read what it was sent.
        """
        secured = TlsLink(self, link.sock, NO_RECEIVER, records)
        secured.succeed(link)
        self._links[link.sock.fileno()] = secured
        return secured

    @property
    def open_links(self) -> int:
        """How many sockets the loop carries."""
        return len(self._links)

    async def run(self) -> None:
        """Carry bytes until cancelled; then every connection is reset."""
        crashed: list[BaseException] = []
        async with trio.open_nursery() as nursery:

            def failed(error: BaseException) -> None:
                crashed.append(error)
                nursery.cancel_scope.cancel()

            nursery.start_soon(self._turn_wheel)
            nursery.start_soon(self.pace.run)
            if self._take_turns:
                self._turn = turns(self.epoll, self.carry, _EVENTS_PER_PASS, failed)
            carried = self._be_watched if self._turn is None else trio.sleep_forever
            try:
                await carried()
            finally:
                if self._turn is not None:
                    self._turn.close()
                for link in list(self._links.values()):
                    link.abort()
                self.epoll.close()
        if crashed:
            raise crashed[0]

    async def _be_watched(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.epoll.fileno())
            self.carry(self.epoll.poll(0, _EVENTS_PER_PASS))

    def carry(self, events: list[tuple[int, int]]) -> None:
        """One pass over ready connections."""
        self._quiet.events += len(events)
        self.now = self._clock()
        self.in_pass = True
        links = self._links
        for fd, event in events:
            link = links.get(fd)
            if link is None:
                continue
            try:
                if event & _WRITE:
                    link.writable()
                if link.reading:
                    if event != _WRITE:
                        link.readable()
                elif event & _DEAD and fd in links:
                    link.hung_up()
            except Exception as error:
                self._crashed(link, error)
        self._settle()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """For tasks that call into engines: what the calls queue leaves in one send, as at the end of a pass."""
        self.now = self._clock()
        if self.in_pass:
            yield
            return
        self.in_pass = True
        try:
            yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Flush what was queued, and tell receivers of links that died meanwhile, until nothing is left to tell."""
        while self.dirty or self._doomed or self._later:
            dirty, self.dirty = self.dirty, []
            doomed, self._doomed = self._doomed, []
            later, self._later = self._later, []
            for link in dirty:
                self._guarded(link.flush, link)
            for link in doomed:
                self._guarded(link.doomed, link)
            for call, concerned in later:
                self._guarded(call, concerned)
        self.in_pass = False

    def _guarded(self, call: Callable[[], None], link: Link | None) -> None:
        try:
            call()
        except Exception as error:
            self._crashed(link, error)

    def _crashed(self, link: Link | None, error: Exception) -> None:
        self._report(error)
        if link is not None:
            receiver = link.receiver
            link.abort()
            with contextlib.suppress(Exception):  # the engine is in an unknown state already and was reported
                receiver.lost(True)

    def later(self, call: Callable[[], None], link: Link | None = None) -> None:
        """Run ``call`` at the end of the current pass or batch, or at once when there is none. link: lost when the call raises."""
        self._later.append((call, link))
        if not self.in_pass:
            self.in_pass = True
            self._settle()

    def doom(self, link: Link) -> None:
        """A send failed inside somebody's call: its receiver will be told when the call is over."""
        self._doomed.append(link)
        if not self.in_pass:
            self.later(_nothing)

    def release(self, fd: int) -> None:
        """A link closed its socket."""
        del self._links[fd]
        self._quiet.closed += 1

    def forget(self, fd: int) -> None:
        """A link left with its socket open."""
        del self._links[fd]

    def schedule(self, link: Link, deadline: float) -> None:
        """Look at the link again when its deadline has passed."""
        self.unschedule(link)
        if link.dead:
            return  # an engine that learns of the end only later
        link.bucket = slot = max(int(deadline) + 1, self._reached + 1)
        self._wheel.setdefault(slot, {})[link] = None

    def unschedule(self, link: Link) -> None:
        """Forget the link. Otherwise a closed connection, engine and all, would stay in memory until its deadline."""
        slot = self._wheel.get(link.bucket)
        if slot is not None:
            slot.pop(link, None)

    async def _turn_wheel(self) -> None:
        while True:
            await trio.sleep(1)
            with self.batch():
                self.expire(int(self.now))
            self._slim()
            if self._quiet.now():
                give_back()

    def _slim(self) -> None:
        """Let connections that moved nothing for two turns of the wheel give their buffers back, at most `_SLIM_PER_TURN` at a time."""
        for link in list(islice(self.resting, _SLIM_PER_TURN)):
            del self.resting[link]
            link.rest()
        for link in self.active:
            link.active = False
        self.resting.update(self.active)
        self.active = {}

    def expire(self, slot: int) -> None:
        """Let everything expire whose deadline lies before second ``slot``."""
        while self._reached < slot:
            self._reached += 1
            for link in self._wheel.pop(self._reached, ()):
                if link.bucket != self._reached:
                    continue  # one that expired before it in this slot has given it another deadline
                link.bucket = 0
                if link.deadline <= self._reached:
                    self._guarded(link.timed_out, link)
                elif link.deadline != NEVER:
                    self.schedule(link, link.deadline)


class Quiet:
    """Says once, after each burst of work, that it is over: the moment to give freed memory back without delaying anybody.

    closed: connections so far. events: readiness of sockets so far.
    """

    __slots__ = ("_before", "_given_at", "closed", "events")

    def __init__(self) -> None:
        self.closed = self.events = 0
        self._before = self._given_at = (0, 0)

    def now(self) -> bool:
        """Asked every second. True when nothing happened since the last question, but much since the last True."""
        state = (self.closed, self.events)
        quiet, self._before = state == self._before, state
        if quiet and (self.closed - self._given_at[0] > _MANY_CLOSED or self.events - self._given_at[1] > _MANY_EVENTS):
            self._given_at = state
            return True
        return False


def _nothing() -> None: ...
