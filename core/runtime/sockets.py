"""A trio stream directly on a non-blocking standard-library socket: what a connection is before the relay loop takes it over.

trio's own SocketStream would do, but its socket cannot be handed over directly, and a sidecar does that with every connection.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable

import trio

from core.addrs import Addr

_READ_BYTES = 65536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 10, 10, 3  # Linkerd's 10 s; a dead peer is noticed within 40 s
_USER_TIMEOUT_MS = 30_000  # Linkerd: unacknowledged bytes this old mean a dead peer


class RawStream(trio.abc.HalfCloseableStream):
    """A connected TCP socket as a stream; `release` gives the socket to somebody else."""

    def __init__(self, sock: socket.socket) -> None:
        if sock.gettimeout() != 0:
            sock.setblocking(False)
        self.sock = sock
        self._released = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything; on cancellation an unknown part was sent. A checkpoint only when the socket is full."""
        view = memoryview(data)
        while view:
            try:
                n = self.sock.send(view)
                if n == len(view):
                    return
                view = view[n:]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
            except OSError as error:
                raise self._broken(error) from error

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel has room."""
        await trio.lowlevel.wait_writable(self.sock)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Up to ``max_bytes`` bytes, ``b""`` at the peer's FIN; raises BrokenResourceError on reset."""
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            try:
                return self.sock.recv(max_bytes or _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._broken(error) from error

    async def send_eof(self) -> None:
        """FIN."""
        await trio.lowlevel.checkpoint()
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise self._broken(error) from error

    async def aclose(self) -> None:
        """Close; does not wait."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close in order (FIN) and wake whoever waits on the socket."""
        if not self._released and self.sock.fileno() != -1:
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    def abort(self) -> None:
        """Close by RST."""
        if not self._released and self.sock.fileno() != -1:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.close()

    def release(self) -> socket.socket:
        """The socket, which is the caller's from now on: closing this stream does nothing any more."""
        self._released = True
        return self.sock

    def _broken(self, error: OSError) -> trio.BrokenResourceError | trio.ClosedResourceError:
        if error.errno == errno.EBADF:
            return trio.ClosedResourceError("this end closed the connection")
        return trio.BrokenResourceError(str(error))


def tune(sock: socket.socket) -> None:
    """No Nagle (we send whole messages), keep-alive probes, and a bound on unacknowledged data.

    What is accepted from a listening socket has all of this from it.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


def tune_within_pod(sock: socket.socket) -> None:
    """No pacing, for connections that never leave the pod: Reno, which every kernel has, whatever the node uses on its network.

    Where that is BBR, a timer for every 64 KiB would pace bodies towards a client that is on the same machine, for a tenth of the sidecar's
    CPU. Where the kernel offers no choice, nothing changes. What is accepted from a listening socket has this from it.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


class Connecting:
    """A connection on its way to an IP address; raises OSError with the kernel's errno at once when there is none. Close it or `wait`.

    prepare: what to do with the socket before it connects.
    """

    __slots__ = ("done", "sock")

    def __init__(self, addr: Addr, prepare: Callable[[socket.socket], None] | None = None) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in addr.ip else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.done = False
        """Whether `stream` may be called without `wait`."""
        try:
            tune(self.sock)
            if prepare is not None:
                prepare(self.sock)
            code = self.sock.connect_ex((addr.ip, addr.port))
            if code == errno.EINPROGRESS:  # within one machine it is over already, and the second call says so
                code = self.sock.connect_ex((addr.ip, addr.port))
            if code != errno.EALREADY:
                self._settle(code)
        except BaseException:
            self.sock.close()
            raise

    async def wait(self) -> None:
        """Until it is made; raises OSError and closes it otherwise. The caller bounds the time."""
        try:
            await trio.lowlevel.wait_writable(self.sock)
            self._settle(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        except BaseException:
            self.sock.close()
            raise

    def stream(self) -> RawStream:
        """The connection, once it is made."""
        return RawStream(self.sock)

    def _settle(self, code: int) -> None:
        if code not in (0, errno.EISCONN):
            raise OSError(code, errno.errorcode.get(code, "connect failed"))
        self.done = True
