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
import struct
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import trio

from core.runtime.memory import give_back
from proxy.protocol.sides import Receiver
from proxy.transport.tls_bio import READ_MAX, RECEIVE_BUFFER, RECORD_OVERHEAD, Records, TlsBroken
from proxy.transport.turn import Turn, turns

R = TypeVar("R", bound=Receiver)

_EVENTS_PER_PASS: Final = 128
_READ_START: Final = 16 * 1024  # one TLS record or a typical request; grows while reads come back full
_MANY_CLOSED: Final = 200  # connections: some 8 MB; fewer are not worth the milliseconds
_LINGER_S: Final = 2.0  # how long a closed connection may still drain, so that our last bytes are not lost to an RST
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
_DEAD = select.EPOLLERR | select.EPOLLHUP
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_NEVER = float("inf")
_UNWATCHED: Final = -1


class Link:
    """One plaintext connection under the relay's care; a `Sink` for its engine. Made by `Relay.adopt`.

    read_bytes, written_bytes: application bytes so far, for metrics. on_gone: called once when the socket is closed, after the pass.
    """

    __slots__ = (
        "_closing", "_dead", "_ended", "_fd", "_held", "_mask", "_paused", "_queued", "_read_size", "_recv", "_relay", "_send",
        "_shut", "blocked", "bucket", "deadline", "on_gone", "read_bytes", "reading", "receiver", "sock", "written_bytes",
    )  # fmt: skip

    def __init__(self, relay: Relay, sock: socket.socket, receiver: Receiver) -> None:
        self._relay = relay
        self.sock = sock
        self.receiver = receiver
        self._recv, self._send = sock.recv, sock.send
        self._fd = sock.fileno()
        self._read_size = _READ_START
        self._mask = _UNWATCHED
        self._held: list[memoryview] = []
        self._queued: list[bytes] = []
        self.bucket = 0
        self.deadline = _NEVER
        self.on_gone: Callable[[], None] | None = None
        self.reading = True  # whether readiness is to be acted upon: not paused, not ended, not dead
        self.blocked = self._paused = self._ended = self._shut = self._closing = self._dead = False
        self.read_bytes = self.written_bytes = 0

    # --- what the loop calls -------------------------------------------------------------------------------------------

    def readable(self) -> None:
        """Read once and deliver."""
        try:
            data = self._recv(self._read_size)
        except BlockingIOError:
            return
        except OSError:
            self._lose(reset=True)
            return
        if not data:
            self._end_of_input()
            return
        n = len(data)
        self.read_bytes += n
        if n == self._read_size and n < READ_MAX:
            self._read_size = min(n * 4, READ_MAX)
        self.receiver.received(data)

    def writable(self) -> None:
        """Send what is held; tell the receiver when all of it is gone."""
        held = self._held
        while held:
            n = self._transmit(held[0])
            if n < 0:
                return
            if n < len(held[0]):
                held[0] = held[0][n:]
                return
            del held[0]
        self.blocked = False
        if self._closing:
            self._finish_close()
            return
        if self._shut:
            self._shutdown_socket()
        self._watch()
        self.receiver.drained()

    def hung_up(self) -> None:
        """EPOLLERR or EPOLLHUP while we were not reading: find out what happened without consuming bytes."""
        if self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._lose(reset=True)
        else:  # both directions are closed but bytes wait to be read: watch again when reading is resumed
            self._relay.epoll.unregister(self._fd)
            self._mask = _UNWATCHED

    def flush(self) -> None:
        """Write what was queued during the pass."""
        queued = self._queued
        if not queued:
            return
        data = queued[0] if len(queued) == 1 else b"".join(queued)
        queued.clear()
        self.write(data)

    # --- Sink ------------------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._queued or self._held or self._dead or self._shut:
            self._write_later(data)
            return
        try:
            n = self._send(data)
        except BlockingIOError:
            n = 0
        except OSError:
            self._relay.doom(self)
            return
        self.written_bytes += n
        if n < len(data):
            self._hold(memoryview(data)[n:])

    def _write_later(self, data: bytes) -> None:
        """Behind what waits already, unless nothing may be written any more."""
        if self._queued:
            self._queued.append(data)
        elif not self._dead and not self._shut:
            self._held.append(memoryview(data))

    def queue(self, data: bytes) -> None:
        if not self._queued:
            if not self._relay.in_pass:
                self.write(data)
                return
            self._relay.dirty.append(self)
        self._queued.append(data)

    def pause(self) -> None:
        if not self._paused:
            self._paused = True
            self.reading = False
            self._watch()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self.reading = not (self._ended or self._dead)
            self._watch()

    def end(self) -> None:
        self.flush()
        if self._shut or self._dead:
            return
        self._shut = True
        self._say_goodbye()
        if not self._held:
            self._shutdown_socket()

    def close(self) -> None:
        self.flush()
        if self._dead or self._closing:
            return
        self._closing = True
        self.receiver = _DISCARD
        if not self._shut:
            self._shut = True
            self._say_goodbye()
        self.deadline = _NEVER
        if self._held:
            self.expire_after(_LINGER_S * 15)  # a peer that does not take our last bytes does not keep the socket for ever
        else:
            self._finish_close()

    def abort(self) -> None:
        if not self._dead:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._drop()

    def expire_after(self, seconds: float | None) -> None:
        if seconds is None:
            self.deadline = _NEVER
            return
        self.deadline = deadline = self._relay.now + seconds
        if not self.bucket or deadline < self.bucket - 1:
            self._relay.schedule(self, deadline)

    # --- inside ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to deliver; called once by `Relay.adopt`, after the creator stored the link."""
        self._watch()

    def _transmit(self, data: bytes | memoryview) -> int:
        """Send; the number of bytes taken, 0 when the socket is full, -1 when it is dead (the receiver hears of it later)."""
        try:
            n = self._send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._relay.doom(self)
            return -1
        self.written_bytes += n
        return n

    def _hold(self, rest: memoryview) -> None:
        self._held.append(rest)
        self.blocked = True
        self._watch()

    def _say_goodbye(self) -> None:
        """What a protocol below the application wants to send before FIN."""

    def _shutdown_socket(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def _end_of_input(self) -> None:
        self._ended = True
        self.reading = False
        if self._closing:
            if not self._held:
                self._drop()
            return
        self._watch()
        self.receiver.ended()

    def _finish_close(self) -> None:
        self._shutdown_socket()
        if self._ended:
            self._drop()
            return
        self._paused = False
        self.reading = True
        self._watch()
        self.expire_after(_LINGER_S)

    def _lose(self, reset: bool) -> None:
        if not self._dead:
            self._drop()
            if not self._closing:
                self.receiver.lost(reset)

    def doomed(self) -> None:
        """The loop's turn to tell the receiver that a send failed."""
        self._lose(reset=True)

    @property
    def dead(self) -> bool:
        """Its socket is closed."""
        return self._dead

    def timed_out(self) -> None:
        """The wheel reached our deadline."""
        self.deadline = _NEVER
        if self._closing:
            self.abort()
        else:
            self.receiver.expired()

    def _drop(self) -> None:
        self._dead = True
        self.reading = self.blocked = False
        self._held.clear()
        self._queued.clear()
        self.deadline = _NEVER
        self._relay.unschedule(self)
        if self._mask != _UNWATCHED:
            self._relay.epoll.unregister(self._fd)
        self._relay.release(self._fd)
        self.sock.close()
        if self.on_gone is not None:
            self._relay.later(self.on_gone)

    def _watch(self) -> None:
        if self._dead:
            return
        mask = (0 if self._paused or self._ended else _READ) | (_WRITE if self._held else 0)
        if mask == self._mask:
            return
        if self._mask != _UNWATCHED:
            self._relay.epoll.modify(self._fd, mask)
        elif self._relay.epoll.closed:
            self.abort()  # a task came with it while the process was ending
            return
        elif mask:
            self._relay.epoll.register(self._fd, mask)
        else:
            return
        self._mask = mask


class TlsLink(Link):
    """A connection whose bytes are TLS records; its receiver sees plaintext."""

    __slots__ = ("_decrypt", "_encrypt", "_records", "_recv_into")

    def __init__(self, relay: Relay, sock: socket.socket, receiver: Receiver, records: Records) -> None:
        super().__init__(relay, sock, receiver)
        self._records = records
        self._decrypt, self._encrypt = records.decrypt, records.encrypt
        self._recv_into = sock.recv_into

    def start(self) -> None:
        self._watch()
        self._relay.later(self._deliver_leftover, self)

    def readable(self) -> None:
        size = self._read_size
        try:
            n = self._recv_into(RECEIVE_BUFFER, size)
        except BlockingIOError:
            return
        except OSError:
            self._lose(reset=True)
            return
        if not n:
            self.reading = False
            if self._records.ended:
                self._ended = True
                self._watch()
                return
            self._ended = True
            self._lose(reset=False)  # cut off without close_notify: what we have is not all there was
            return
        if n == size and n < READ_MAX:
            self._read_size = min(n * 4, READ_MAX)
        try:
            data = self._decrypt(n)
        except TlsBroken:
            self._refuse_record()
            return
        size = len(data)
        if size + RECORD_OVERHEAD == n:  # exactly one record of application data, the usual case
            self.read_bytes += size
            self.receiver.received(data)
        else:
            self._deliver(data)

    def _deliver(self, data: bytes) -> None:
        """Pass on what several or special records amounted to."""
        if answer := self._records.output():  # to a key update
            self._put_on_wire(answer)
        if data:
            self.read_bytes += len(data)
            self.receiver.received(data)
        if self._records.ended and not self._ended and not self._dead:
            self._end_of_input()

    def _deliver_leftover(self) -> None:
        if self._dead:
            return
        try:
            data = self._decrypt(0)
        except TlsBroken:
            self._refuse_record()
            return
        self._deliver(data)

    def _refuse_record(self) -> None:
        if alert := self._records.output():
            self._put_on_wire(alert)
        self._lose(reset=True)

    def write(self, data: bytes) -> None:
        if self._queued or self._held or self._dead or self._shut or len(data) > READ_MAX:
            self._write_later(data)
            return
        self.written_bytes += len(data)
        try:
            wire = self._encrypt(data)
        except TlsBroken:
            self._relay.doom(self)
            return
        try:
            n = self._send(wire)
        except BlockingIOError:
            n = 0
        except OSError:
            self._relay.doom(self)
            return
        if n < len(wire):
            self._hold(memoryview(bytes(wire[n:])))

    def _write_later(self, data: bytes) -> None:
        if self._queued:
            self._queued.append(data)
            return
        if self._dead or self._shut:
            return
        self.written_bytes += len(data)
        view = memoryview(data)
        try:
            while view:
                self._put_on_wire(self._encrypt(view[:READ_MAX]))
                view = view[READ_MAX:]
        except TlsBroken:
            self._relay.doom(self)

    def _put_on_wire(self, records: bytes | memoryview) -> None:
        if self._held:
            self._held.append(memoryview(bytes(records)))
            return
        n = self._transmit(records)
        if 0 <= n < len(records):
            self._hold(memoryview(bytes(records[n:])))

    def _transmit(self, data: bytes | memoryview) -> int:
        try:
            return self._send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._relay.doom(self)
            return -1

    def _say_goodbye(self) -> None:
        if not self._dead and (record := self._records.close_notify()):
            self._put_on_wire(record)


class _Discard:
    """The receiver of a closing connection: what still arrives is of no interest to anybody."""

    def received(self, data: bytes) -> None: ...
    def ended(self) -> None: ...
    def lost(self, reset: bool) -> None: ...
    def drained(self) -> None: ...
    def expired(self) -> None: ...


_DISCARD: Final[Receiver] = _Discard()


class Relay:
    """All links of a process. `run` is a task; everything else is synchronous and belongs to the same thread.

    report: told of exceptions that cost a connection. take_turns: run where trio would sleep (turn.py), else as a task of trio's.
    """

    def __init__(
        self, report: Callable[[BaseException], None], clock: Callable[[], float] = time.monotonic, *, take_turns: bool = True
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
        self._closed = self._closed_before = 0
        self.dirty: list[Link] = []
        self.in_pass = False
        self.now = clock()

    def attach(self, sock: socket.socket, make: Callable[[Link], R], records: Records | None = None) -> R:
        """Take over a connection and start to deliver to the receiver that ``make`` builds on its link."""
        link = self.adopt(sock, _DISCARD, records)
        receiver = make(link)
        link.receiver = receiver
        link.start()
        return receiver

    def adopt(self, sock: socket.socket, receiver: Receiver, records: Records | None = None) -> Link:
        """Take over a connected non-blocking socket; with records, after its TLS handshake. Delivery starts with `Link.start`."""
        link = Link(self, sock, receiver) if records is None else TlsLink(self, sock, receiver, records)
        self._links[sock.fileno()] = link
        return link

    @property
    def open_links(self) -> int:
        """How many connections the loop carries."""
        return len(self._links)

    async def run(self) -> None:
        """Carry bytes until cancelled; then every connection is reset."""
        crashed: list[BaseException] = []
        async with trio.open_nursery() as nursery:

            def failed(error: BaseException) -> None:
                crashed.append(error)
                nursery.cancel_scope.cancel()

            nursery.start_soon(self._turn_wheel)
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
        self._closed += 1

    def schedule(self, link: Link, deadline: float) -> None:
        """Look at the link again when its deadline has passed."""
        self.unschedule(link)
        if link.dead:
            return  # an engine that learns of the end only later
        link.bucket = slot = max(int(deadline) + 1, self._reached + 1)
        self._wheel.setdefault(slot, {})[link] = None

    def unschedule(self, link: Link) -> None:
        """Forget the link: a closed connection must not stay in memory, engine and all, until its idle time would have been over."""
        slot = self._wheel.get(link.bucket)
        if slot is not None:
            slot.pop(link, None)

    async def _turn_wheel(self) -> None:
        while True:
            await trio.sleep(1)
            with self.batch():
                self.expire(int(self.now))
            self._give_memory_back()

    def _give_memory_back(self) -> None:
        """After many connections closed, and once no more do, return what they held."""
        if self._closed > _MANY_CLOSED and self._closed == self._closed_before:
            give_back()
            self._closed = 0
        self._closed_before = self._closed

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
                elif link.deadline != _NEVER:
                    self.schedule(link, link.deadline)


def _nothing() -> None: ...
