"""The agent's one loop: its Unix socket, its admin port, and a tick. Moves bytes; what they mean is its caller's (ebpf.agent).

Small on purpose: no event-loop library, because the agent's memory is a headline number. Everything is bounded: connections, bytes and
time of each. On the Unix socket only root and the agent's own user are answered (SO_PEERCRED); the admin port is read-only, and whatever
happens there takes nothing from the socket.
"""

from __future__ import annotations

import array
import contextlib
import os
import selectors
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ebpf.wire import MAX_LINE_BYTES, BadMessage, Request, decode_request_untrusted, encode

_HEAD_BYTES_MAX = 8 << 10
_CONNECTIONS_MAX = 64  # of the socket, and as many of the admin port
_IDLE_S = 30.0
_FDS_MAX = 4


class BadRequest(ValueError):
    """Bytes on the admin port that are no request we answer; the text is the status line's rest."""


class HttpRequest(NamedTuple):
    """All that matters of a request here."""

    method: str
    path: str


def parse_http_untrusted(data: bytes) -> HttpRequest | None:
    """A request head, None while it is incomplete; raises BadRequest. Bodies are never read: every answer closes the connection."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        if len(data) > _HEAD_BYTES_MAX:
            raise BadRequest("431 Request Header Fields Too Large")
        return None
    words = head.partition(b"\r\n")[0].split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1.") or not words[1].startswith(b"/") or not head.isascii():
        raise BadRequest("400 Bad Request")
    return HttpRequest(words[0].decode(), words[1].partition(b"?")[0].decode())


class Delayed:
    """An answer that is not known yet. answer: gives it, or None to be asked again at the next tick."""

    def __init__(self, answer: Callable[[], dict[str, Any] | None], within_s: float, otherwise: dict[str, Any]) -> None:
        self.answer, self.otherwise = answer, otherwise
        self.deadline = time.monotonic() + within_s


class Application(Protocol):
    """What is said to whom."""

    def asked(self, request: Request, fds: list[int]) -> dict[str, Any] | Delayed:
        """A request of a trusted peer; ``fds`` are closed after the call."""

    def got(self, request: HttpRequest) -> tuple[int, str, str]:
        """(status, content type, body) for the admin port."""

    def tick(self) -> float:
        """What is due; returns seconds until the next call. Called after every request too."""


class _Connection:
    """holder: the address of a client of the admin port."""

    def __init__(self, sock: socket.socket, http: bool, holder: str) -> None:
        self.sock, self.http, self.holder = sock, http, holder
        self.received = b""
        self.unsent = b""
        self.fds: list[int] = []
        self.delayed: Delayed | None = None
        self.closing = False
        self.deadline = time.monotonic() + _IDLE_S

    def close(self) -> None:
        self.sock.close()
        self.drop_fds()

    def drop_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Server:
    """Serves until `stop`. listeners: (socket, whether it is the admin port)."""

    def __init__(self, application: Application, listeners: list[tuple[socket.socket, bool]]) -> None:
        self._application = application
        self._selector = selectors.DefaultSelector()
        self._connections: dict[_Connection, None] = {}  # oldest first
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        for sock, http in listeners:
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, http)

    def wake(self) -> None:
        """Tick now; may be called from any thread and from signal handlers."""
        try:
            os.write(self._wake_write, b"!")
        except BlockingIOError:
            pass  # it is awake already

    def stop(self) -> None:
        """Leave `run` soon; answers that are on their way are sent."""
        self._stopping = True
        self.wake()

    def close(self) -> None:
        """After `run`: every connection and the loop's own descriptors; the listeners are their owner's."""
        for connection in list(self._connections):
            self._close(connection)
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def run(self) -> None:
        """Until `stop`."""
        while not self._stopping or any(connection.unsent for connection in self._connections):
            pause_s = self._application.tick()
            pause_s = min([pause_s, *(0.05 for connection in self._connections if connection.delayed)])
            for key, _ in self._selector.select(max(pause_s, 0)):
                if isinstance(key.data, _Connection):
                    self._serve(key.data)
                elif key.data is None:
                    os.read(self._wake_read, 4096)
                else:
                    self._accept(key.fileobj, key.data)
            self._overdue()

    def _accept(self, listener: Any, http: bool) -> None:
        try:
            sock, address = listener.accept()
        except OSError:
            return  # gone already, or out of descriptors: the next one tries again
        room = self._make_room(http)
        if not room or not (http or trusted(sock)):
            with contextlib.suppress(OSError):  # it may have left without waiting for this
                sock.send(encode({"ok": False, "error": "only root may talk to the agent" if room else "the agent is busy"}))
            sock.close()
            return
        sock.setblocking(False)
        connection = _Connection(sock, http, address[0] if http else "")
        self._connections[connection] = None
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _make_room(self, http: bool) -> bool:
        """Whether one more connection of this kind may be served. On the admin port the oldest of the client that holds most is cut for it:
        refusing the newcomer would let anybody who holds the limit keep the kubelet's probes out, and the agent down."""
        same = [connection for connection in self._connections if connection.http == http]
        if len(same) < _CONNECTIONS_MAX:
            return True
        if http:
            held = Counter(connection.holder for connection in same)
            greedy = max(held, key=held.__getitem__)
            self._close(next(connection for connection in same if connection.holder == greedy))
        return http

    def _serve(self, connection: _Connection) -> None:
        try:
            if connection.unsent:
                self._send(connection, b"")
            else:
                self._receive(connection)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._close(connection)

    def _receive(self, connection: _Connection) -> None:
        if connection.http:
            data = connection.sock.recv(4096)
        else:
            data, ancillary, _, _ = connection.sock.recvmsg(16384, socket.CMSG_SPACE(_FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC)
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds = array.array("i")
                    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                    connection.fds += fds
        if not data or len(connection.fds) > _FDS_MAX:
            self._close(connection)
            return
        connection.received += data
        if connection.http:  # has its time from accept on, however slowly it speaks
            self._answer_http(connection)
        else:
            connection.deadline = time.monotonic() + _IDLE_S
            self._answer_lines(connection)

    def _answer_lines(self, connection: _Connection) -> None:
        while b"\n" in connection.received and connection.delayed is None:
            line, _, connection.received = connection.received.partition(b"\n")
            try:
                answer = self._application.asked(decode_request_untrusted(line), connection.fds)
            except BadMessage as error:
                answer = {"ok": False, "error": str(error)}
            connection.drop_fds()
            if isinstance(answer, Delayed):
                connection.delayed = answer
            else:
                self._send(connection, encode(answer))
        if len(connection.received) > MAX_LINE_BYTES:
            self._close(connection)

    def _answer_http(self, connection: _Connection) -> None:
        try:
            request = parse_http_untrusted(connection.received)
        except BadRequest as error:
            status, kind, body = str(error), "text/plain", ""
        else:
            if request is None:
                return
            code, kind, body = self._application.got(request)
            status = f"{code} {_REASONS.get(code, 'Status')}"
        payload = body.encode()
        head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(payload)}\r\nconnection: close\r\n\r\n"
        connection.closing = True
        self._send(connection, head.encode() + payload)

    def _send(self, connection: _Connection, data: bytes) -> None:
        data = connection.unsent + data
        try:
            sent = connection.sock.send(data)
        except BlockingIOError:
            sent = 0
        connection.unsent = data[sent:]
        if not connection.unsent and connection.closing:
            self._close(connection)
            return
        events = selectors.EVENT_WRITE if connection.unsent else selectors.EVENT_READ
        self._selector.modify(connection.sock, events, connection)

    def _overdue(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections):
            delayed = connection.delayed
            if delayed is not None:
                answer = delayed.answer() or (delayed.otherwise if now > delayed.deadline else None)
                if answer is None:
                    continue
                connection.delayed, connection.deadline = None, now + _IDLE_S
                try:
                    self._send(connection, encode(answer))
                    self._answer_lines(connection)
                except OSError:
                    self._close(connection)
            elif now > connection.deadline:
                self._close(connection)

    def _close(self, connection: _Connection) -> None:
        if connection in self._connections:
            del self._connections[connection]
            self._selector.unregister(connection.sock)
            connection.close()


_REASONS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


def trusted(sock: socket.socket) -> bool:
    """Is the peer root, or the user that the agent runs as? (uids as our user namespace counts; root of another one is not 0 here)"""
    uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return uid in (0, os.geteuid())
