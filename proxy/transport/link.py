"""One connection that the relay carries: reading, writing, holding what the socket does not take, and ending in order.

A `Link` is the `Sink` of its engine. Links never wait and never call back into a receiver from within a call of it: what has to be told
later goes through the relay. Made by `Relay.adopt` only; connections whose bytes are TLS records are `tls_link`'s.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from proxy.protocol.sides import Receiver
from proxy.transport.pace import ASK_AFTER, SEND_MAX
from proxy.transport.tls_bio import READ_MAX

if TYPE_CHECKING:
    from proxy.transport.relay import Relay

_READ_START: Final = 16 * 1024  # one TLS record or a typical request; grows while reads come back full
_LINGER_S: Final = 2.0  # how long a closed connection may still drain, so that our last bytes are not lost to an RST
_READ: Final = select.EPOLLIN
_WRITE: Final = select.EPOLLOUT
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_UNWATCHED: Final = -1

NEVER: Final = float("inf")
"""A deadline that does not come."""


class Link:
    """One plaintext connection that the relay carries; a `Sink` for its engine. Made by `Relay.adopt`.

    read_bytes, written_bytes: application bytes so far, for metrics. on_gone: called once when the socket is closed, after the pass.
    """

    __slots__ = (
        "_ahead", "_ask_at", "_closing", "_dead", "_ended", "_fd", "_held", "_mask", "_paused", "_queued", "_read_size", "_recv",
        "_relay", "_send", "_shut", "blocked", "bucket", "deadline", "on_gone", "read_bytes", "reading", "receiver", "sock",
        "written_bytes",
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
        self.deadline = NEVER
        self.on_gone: Callable[[], None] | None = None
        self.reading = True  # whether readiness is to be acted upon: not paused, not ended, not dead
        self.blocked = self._paused = self._ended = self._shut = self._closing = self._dead = False
        self._ahead = False  # of an app that has to read first; `pace` calls `send_again`
        self._ask_at = ASK_AFTER  # written bytes at which `pace` is asked
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
        if self.written_bytes >= self._ask_at and self._too_far_ahead():
            self._hold(memoryview(data))
            return
        try:
            n = self._send(data if len(data) <= SEND_MAX else memoryview(data)[:SEND_MAX])
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
        self.receiver = NO_RECEIVER
        if not self._shut:
            self._shut = True
            self._say_goodbye()
        self.deadline = NEVER
        if self._held:
            self.expire_after(_LINGER_S * 15)  # a peer that does not take our last bytes does not keep the socket for ever
        else:
            self._finish_close()

    def abort(self) -> None:
        if not self._dead:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._drop()

    def leave(self) -> socket.socket:
        """Give the socket back to whoever wants to wait on it. This link is dead from then on, and its receiver hears nothing more."""
        if self._mask != _UNWATCHED:
            self._relay.epoll.unregister(self._fd)
        self._stop()
        self._relay.forget(self._fd)
        return self.sock

    def expire_after(self, seconds: float | None) -> None:
        if seconds is None:
            self.deadline = NEVER
            return
        self.deadline = deadline = self._relay.now + seconds
        if not self.bucket or deadline < self.bucket - 1:
            self._relay.schedule(self, deadline)

    # --- inside ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to deliver; called once, by whoever adopted the connection, after the receiver is in its place."""
        self._watch()

    def succeed(self, link: Link) -> None:
        """Replace another link of the same socket, which is dead from then on; what epoll watches stays the same. For `Relay.secure`."""
        self._mask = link._mask
        link._stop()

    def _stop(self) -> None:
        self._dead = True
        self.reading = self.blocked = False
        self._mask = _UNWATCHED
        self.deadline = NEVER
        self._relay.unschedule(self)

    def _transmit(self, data: bytes | memoryview) -> int:
        """Send; the number of bytes taken, 0 when the socket is full, -1 when it is dead (the receiver hears of it later)."""
        if self.written_bytes >= self._ask_at and self._too_far_ahead():
            return 0
        try:
            n = self._send(data if len(data) <= SEND_MAX else memoryview(data)[:SEND_MAX])
        except BlockingIOError:
            return 0
        except OSError:
            self._relay.doom(self)
            return -1
        self.written_bytes += n
        return n

    def _too_far_ahead(self) -> bool:
        """Whether the app must read before more is sent; asked once in so many bytes (pace.py)."""
        room = self._relay.pace.room(self.sock)
        if room:
            self._ask_at = self.written_bytes + room
            return False
        self._ahead = True
        self._relay.pace.wait(self)
        self._watch()
        return True

    def send_again(self) -> None:
        """Some time after `_too_far_ahead`."""
        if not self._dead:
            self._ahead = False
            self.writable()
            self._watch()

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
        """The loop's turn to tell the receiver that a send failed.

        What the peer said before is still there to be read: an app that refuses an upload answers and closes, and is then said to have
        reset the connection, over what it did not read.
        """
        while self.reading:
            try:
                data = self._recv(READ_MAX)
            except OSError:
                break
            if not data:
                break
            self.read_bytes += len(data)
            self.receiver.received(data)
        self._lose(reset=True)

    @property
    def dead(self) -> bool:
        """Its socket is closed."""
        return self._dead

    def timed_out(self) -> None:
        """The wheel reached our deadline."""
        self.deadline = NEVER
        if self._closing:
            self.abort()
        else:
            self.receiver.expired()

    def _drop(self) -> None:
        self._dead = True
        self.reading = self.blocked = False
        self._held.clear()
        self._queued.clear()
        self.deadline = NEVER
        self._relay.unschedule(self)
        if self._ahead:
            self._relay.pace.forget(self)
        if self._mask != _UNWATCHED:
            self._relay.epoll.unregister(self._fd)
        self._relay.release(self._fd)
        self.sock.close()
        if self.on_gone is not None:
            self._relay.later(self.on_gone)

    def _watch(self) -> None:
        if self._dead:
            return
        mask = (0 if self._paused or self._ended else _READ) | (_WRITE if self._held and not self._ahead else 0)
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


class _NoReceiver:
    """The receiver of a connection whose engine does not exist yet, or that is closing: what arrives is of no interest to anybody."""

    def received(self, data: bytes) -> None: ...
    def ended(self) -> None: ...
    def lost(self, reset: bool) -> None: ...
    def drained(self) -> None: ...
    def expired(self) -> None: ...


NO_RECEIVER: Final[Receiver] = _NoReceiver()
