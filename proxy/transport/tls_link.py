"""A connection that the relay carries and whose bytes are TLS records; its engine sees plaintext, as with any other `Link`.

What TLS adds: records that concern TLS itself and that OpenSSL answers, an end that counts only if it was announced (close_notify), and
buffers that are given back when a connection falls silent.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from proxy.protocol.sides import Receiver
from proxy.transport.link import Link
from proxy.transport.tls_bio import NO_RECORDS, READ_MAX, RECEIVE_BUFFER, RECORD_OVERHEAD, Records, TlsBroken

if TYPE_CHECKING:
    from proxy.transport.relay import Relay

_ANSWERS_MAX: Final = 8192  # some 300 key updates: honest peers send one in a hundred gigabytes, and each costs us an answer


class TlsLink(Link):
    """One TLS connection that the relay carries; a `Sink` for its engine. Made by `Relay.adopt` or `Relay.secure`."""

    __slots__ = ("_answered", "_decrypt", "_encrypt", "_records", "_recv_into", "active")

    def __init__(self, relay: Relay, sock: socket.socket, receiver: Receiver, records: Records) -> None:
        super().__init__(relay, sock, receiver)
        self._records = records
        self._answered = 0  # bytes that OpenSSL sent by itself
        self._decrypt, self._encrypt = records.decrypt, records.encrypt
        self._recv_into = sock.recv_into
        self.active = False
        """Whether the relay knows that it was used since it last looked for connections at rest."""

    def start(self) -> None:
        self._watch()
        self._relay.later(self._deliver_leftover, self)

    def rest(self) -> None:
        """Give buffers back. The relay calls this when nothing was read or written for a while."""
        self._records.slim()

    def _used(self) -> None:
        self.active = True
        self._relay.resting.pop(self, None)
        self._relay.active[self] = None

    def _drop(self) -> None:
        self._relay.resting.pop(self, None)
        self._relay.active.pop(self, None)
        super()._drop()
        self._records = NO_RECORDS
        self._decrypt, self._encrypt = NO_RECORDS.decrypt, NO_RECORDS.encrypt

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
        if not self.active:
            self._used()
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
        """Deliver what a read amounted to that was not exactly one record of application data."""
        if answer := self._records.output():  # to a key update
            self._answered += len(answer)
            if self._answered > _ANSWERS_MAX:
                return self._lose(reset=True)
            self._put_on_wire(answer)
        if data:
            self.read_bytes += len(data)
            self.receiver.received(data)
        if self._records.ended and not self._ended and not self._dead:
            self._end_of_input()
        return None

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

    def doomed(self) -> None:
        # a sidecar that answers early goes on reading for a while (`Link.close`): its answer came before any reset
        self._lose(reset=True)

    def write(self, data: bytes) -> None:
        if self._queued or self._held or self._dead or self._shut or len(data) > READ_MAX:
            self._write_later(data)
            return
        self.written_bytes += len(data)
        if not self.active:
            self._used()
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
        if not self.active:
            self._used()
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
