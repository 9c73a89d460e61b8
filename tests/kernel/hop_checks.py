"""What two ends of one connection must see, whatever carries their bytes: each check is run by plain TCP and by the accelerated hop.

A check runs inside a pod, as the app: ``Hop.pair`` connects to an address that nobody has and accepts at the sidecar's port, so that the
first socket is captured. Blocking reads retry on BlockingIOError: a FIN's acknowledgement, room for a writer or a reset may wake a reader
of an accelerated socket for nothing (docs/ebpf.md). Checks raise AssertionError.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import sys
import tempfile
import termios
import threading
import time
import zlib
from collections.abc import Callable

from lab import OUT_PORT, PATIENCE_S, SCALE, TARGET, rounds

MIB = 1 << 20
HELD_MAX = 8 * MIB
"""What a reader that does not read may make its writer's kernel keep."""
_NOISE = random.Random(7).randbytes(MIB)
_SO_MEMINFO = 55
_TCP_DEFER_ACCEPT, _TCP_FASTOPEN = 9, 23
_MSG_FASTOPEN, _MSG_ZEROCOPY, _SO_ZEROCOPY = 0x20000000, 0x4000000, 60


class Hop:
    """Connections between an app's socket and the sidecar's."""

    def __init__(self) -> None:
        self.listener = listen()

    def connect(self) -> socket.socket:
        """The app's end."""
        return socket.create_connection((TARGET, 80), PATIENCE_S)

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """(the app's end, the sidecar's end), both blocking, without Nagle."""
        c = self.connect()
        s, _ = self.listener.accept()
        for end in (c, s):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return c, s


def listen(options: tuple[tuple[int, int, int], ...] = (), backlog: int = 128) -> socket.socket:
    """Where the sidecar would."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for option in options:
        listener.setsockopt(*option)
    listener.bind(("127.0.0.1", OUT_PORT))
    listener.listen(backlog)
    return listener


def receive(sock: socket.socket, most: int = 65536) -> bytes:
    """recv(2) of a blocking socket."""
    while True:
        try:
            return sock.recv(most)
        except BlockingIOError:
            continue


def read_all(sock: socket.socket) -> bytes:
    """Up to the end of the stream."""
    pieces = []
    while piece := receive(sock):
        pieces.append(piece)
    return b"".join(pieces)


def read_exactly(sock: socket.socket, number: int) -> bytes:
    """Bytes that must come."""
    data = b""
    while len(data) < number:
        piece = receive(sock, number - len(data))
        assert piece, f"the stream ended after {len(data)} of {number} bytes"
        data += piece
    return data


def held(sock: socket.socket) -> int:
    """Bytes of kernel memory that wait to be read (SK_MEMINFO_RMEM_ALLOC)."""
    found: int = struct.unpack_from("=I", sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[0]
    return found


def unread(sock: socket.socket) -> int:
    """What FIONREAD says."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


def _close(*socks: socket.socket) -> None:
    for sock in socks:
        sock.close()


def _noise(number: int) -> bytes:
    at = random.randrange(0, MIB - number) if number < MIB else 0
    return _NOISE[at : at + number]


# --- order ----------------------------------------------------------------------------------------------------------------------------


def check_half_close(hop: Hop) -> None:
    """The last bytes arrive before the end, both directions."""
    number = rounds(800)

    def serve() -> None:
        for _ in range(number):
            s, _ = hop.listener.accept()
            s.settimeout(None)
            got = read_all(s)
            s.sendall(struct.pack("=Q16s", len(got), hashlib.blake2b(got, digest_size=16).digest()) + _NOISE[: len(got) % 5000])
            s.shutdown(socket.SHUT_WR)
            s.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    for _ in range(number):
        c = hop.connect()
        c.settimeout(None)
        data = _noise(random.choice([1, random.randrange(1, 2000), random.randrange(1, 300000)]))
        cut = random.randrange(len(data) + 1)
        c.sendall(data[:cut])
        c.sendall(data[cut:])
        c.shutdown(socket.SHUT_WR)
        expected = struct.pack("=Q16s", len(data), hashlib.blake2b(data, digest_size=16).digest()) + _NOISE[: len(data) % 5000]
        assert read_all(c) == expected
        c.close()
    thread.join(PATIENCE_S)


def _twenty_writes(
    accept: Callable[[], socket.socket], connect: Callable[[], socket.socket], number: int, reader: bool = True, first: int = 0
) -> None:
    for turn in range(number):
        c = connect()
        for word in range(first, 20):
            c.send(struct.pack("=I", word))
        s = accept()
        s.settimeout(PATIENCE_S)
        if reader:
            s.sendall(b"early")
        c.shutdown(socket.SHUT_WR)
        words = list(array.array("I", read_all(s)))
        assert words == list(range(20)), f"round {turn}: {words}"
        s.close()
        if reader:
            c.settimeout(PATIENCE_S)
            assert read_all(c) == b"early"
        c.close()


def check_slow_accept(hop: Hop) -> None:
    """Written before anybody accepted."""
    _twenty_writes(lambda: hop.listener.accept()[0], hop.connect, rounds(500))


def check_full_backlog(hop: Hop) -> None:
    """Connections that the listener's queue has no room for, with data already sent."""
    hop.listener.close()
    hop.listener = listen(backlog=1)
    for _ in range(rounds(100) // 20):
        socks = []
        for _ in range(4):
            c = socket.socket()
            c.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                c.connect((TARGET, 80))
            socks.append(c)
        time.sleep(0.01)
        for c in socks:
            for word in range(20):
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    c.send(struct.pack("=I", word))
        time.sleep(0.01)
        for _ in range(2):
            s, _ = hop.listener.accept()
            s.settimeout(PATIENCE_S)
            words = list(array.array("I", s.recv(80)))
            assert words == list(range(len(words))), words
            s.close()
        _close(*socks)
        hop.listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                hop.listener.accept()[0].close()
        hop.listener.setblocking(True)


def check_defer_accept(hop: Hop) -> None:
    """TCP_DEFER_ACCEPT: the data that makes the server's socket travels by TCP, what follows could overtake it."""
    hop.listener.close()
    hop.listener = listen(((socket.IPPROTO_TCP, _TCP_DEFER_ACCEPT, 30),))
    _twenty_writes(lambda: hop.listener.accept()[0], hop.connect, rounds(300), reader=False)


def check_fast_open(hop: Hop) -> None:
    """TCP Fast Open: the first word travels in the SYN (the pod's sysctl allows it)."""
    hop.listener.close()
    hop.listener = listen(((socket.IPPROTO_TCP, _TCP_FASTOPEN, 16),))

    def connect() -> socket.socket:
        c = socket.socket()
        c.sendto(struct.pack("=I", 0), _MSG_FASTOPEN, (TARGET, 80))
        return c

    _twenty_writes(lambda: hop.listener.accept()[0], connect, rounds(300), first=1)


def check_syn_cookies(hop: Hop) -> None:
    """SYN cookies forced on by the pod's sysctl: the server's socket is made from the last packet of the handshake alone."""
    _twenty_writes(lambda: hop.listener.accept()[0], hop.connect, rounds(300))


def check_bulk(hop: Hop) -> None:
    """1.5 GB each way at once, checksummed."""
    total = int(1.5e9 * min(SCALE, 1))
    c, s = hop.pair()
    sums: dict[str, int] = {}

    def write(sock: socket.socket, name: str) -> None:
        left, check = total, 0
        while left:
            data = _noise(min(left, random.randrange(1, 200000)))
            sock.sendall(data)
            check = zlib.crc32(data, check)
            left -= len(data)
        sock.shutdown(socket.SHUT_WR)
        sums[f"{name} sent"] = check

    def read(sock: socket.socket, name: str) -> None:
        got = check = 0
        while data := receive(sock, 1 << 18):
            check = zlib.crc32(data, check)
            got += len(data)
        sums[f"{name} read"], sums[f"{name} bytes"] = check, got

    threads = [
        threading.Thread(target=f, args=a) for f, a in ((write, (c, "out")), (read, (s, "out")), (write, (s, "back")), (read, (c, "back")))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _close(c, s)
    for way in ("out", "back"):
        assert sums[f"{way} bytes"] == total
        assert sums[f"{way} read"] == sums[f"{way} sent"]


def check_reader_in_bursts(hop: Hop) -> None:
    """Falling back to TCP and returning, again and again, in the middle of a stream."""
    c, s = hop.pair()
    total = int(60 * MIB * min(SCALE * 2, 1))
    sent: list[int] = []

    def write() -> None:
        left, check = total, 0
        while left:
            data = _noise(min(left, random.randrange(1, 65536)))
            c.sendall(data)
            check = zlib.crc32(data, check)
            left -= len(data)
        c.shutdown(socket.SHUT_WR)
        sent.append(check)

    thread = threading.Thread(target=write)
    thread.start()
    got = check = 0
    while True:
        for _ in range(random.randrange(1, 40)):
            data = receive(s, random.randrange(1, 200000))
            check = zlib.crc32(data, check)
            got += len(data)
        if not data:
            break
        time.sleep(0.002)
    thread.join()
    _close(c, s)
    assert (got, check) == (total, sent[0])


# --- memory ---------------------------------------------------------------------------------------------------------------------------


def _unread(writer: socket.socket, reader: socket.socket) -> None:
    writer.setblocking(False)
    accepted = 0
    with contextlib.suppress(BlockingIOError):
        while accepted < 64 * MIB:
            accepted += writer.send(_NOISE[:65536])
    assert accepted <= HELD_MAX, f"{accepted} bytes taken from a writer whose reader reads nothing"
    assert held(reader) <= HELD_MAX
    writer.setblocking(True)
    writer.shutdown(socket.SHUT_WR)
    assert len(read_all(reader)) == accepted


def check_unread_receiver_to_sidecar(hop: Hop) -> None:
    """A sidecar that reads nothing stops its app, and everything taken arrives."""
    c, s = hop.pair()
    _unread(c, s)
    _close(c, s)


def check_unread_receiver_to_app(hop: Hop) -> None:
    """An app that reads nothing stops its sidecar."""
    c, s = hop.pair()
    _unread(s, c)
    _close(c, s)


def _until_full(reader: socket.socket) -> None:
    """Until nothing more comes for a reader that does not read: a fast writer is ahead of it then, on a slow kernel too."""
    before, unchanged = -1, 0
    while unchanged < 3:
        now = held(reader)
        unchanged = unchanged + 1 if now == before > 0 else 0
        before = now
        time.sleep(0.1)


def check_slow_reader(hop: Hop) -> None:
    """The memory of a slow reader stays within bounds, and its bytes are right."""
    c, s = hop.pair()
    total = 48 * MIB
    sent: list[int] = []

    def write() -> None:
        left, check = total, 0
        while left:
            data = _noise(min(left, 65536))
            c.sendall(data)
            check = zlib.crc32(data, check)
            left -= len(data)
        c.shutdown(socket.SHUT_WR)
        sent.append(check)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    _until_full(s)
    got = check = 0
    peak = held(s)
    while data := receive(s, 131072):
        check = zlib.crc32(data, check)
        got += len(data)
        peak = max(peak, held(s))
        if got % MIB < 131072:
            time.sleep(0.01)
    thread.join()
    _close(c, s)
    assert (got, check) == (total, sent[0])
    assert peak <= HELD_MAX, f"{peak} bytes held"


# --- ways to read and write -----------------------------------------------------------------------------------------------------------


def check_peek(hop: Hop) -> None:
    """MSG_PEEK sees what recv then returns."""
    for _ in range(rounds(400) // 20):
        c, s = hop.pair()
        s.settimeout(PATIENCE_S)
        for _ in range(20):
            data = _noise(random.randrange(1, 20000))
            c.sendall(data)
            peeked = b""
            while len(peeked) < len(data):
                peeked = s.recv(len(data) + 1, socket.MSG_PEEK)
            assert peeked == data
            assert s.recv(5, socket.MSG_PEEK) == data[:5]
            assert read_exactly(s, len(data)) == data
        _close(c, s)


def _epoll(hop: Hop, flags: int) -> None:
    c, s = hop.pair()
    s.setblocking(False)
    with select.epoll() as poll:
        poll.register(s, flags)
        for turn in range(rounds(500)):
            size = 1 + turn % 3000
            c.send(b"q" * size)
            got = 0
            end = time.monotonic() + PATIENCE_S
            while got < size and time.monotonic() < end:
                assert poll.poll(PATIENCE_S), f"round {turn}: no event for {size - got} bytes"
                with contextlib.suppress(BlockingIOError):
                    while True:
                        got += len(s.recv(700))
            assert got == size
    _close(c, s)


def check_epoll_level(hop: Hop) -> None:
    """Level-triggered readiness."""
    _epoll(hop, select.EPOLLIN)


def check_epoll_edge(hop: Hop) -> None:
    """Edge-triggered readiness: a missed edge would hang."""
    _epoll(hop, select.EPOLLIN | select.EPOLLET)


def check_epoll_edge_far_behind(hop: Hop) -> None:
    """One edge may stand for bytes past TCP and for those that went by TCP behind them: who reads until EAGAIN gets all, both ways."""
    ends = hop.pair()
    for writer, reader in (ends, ends[::-1]):
        writer.setblocking(False)
        reader.setblocking(False)
        left = 0
        with select.epoll() as poll:
            poll.register(reader, select.EPOLLIN | select.EPOLLET)
            with contextlib.suppress(BlockingIOError):
                while True:
                    left += writer.send(_NOISE[:65536])
            while left:
                assert poll.poll(PATIENCE_S), f"no event for the last {left} bytes"
                with contextlib.suppress(BlockingIOError):
                    while True:
                        left -= len(reader.recv(100_000))
    _close(*ends)


def check_epoll_edge_believing_fionread(hop: Hop) -> None:
    """An app that waits edge-triggered, as nginx does: after a full buffer FIONREAD says whether to read on or to wait for an edge."""
    c, s = hop.pair()
    c.setblocking(False)
    with select.epoll() as poll:
        poll.register(c, select.EPOLLIN | select.EPOLLET)
        for _ in range(rounds(100) // 20):
            left = 0
            for _ in range(3):  # all of it before the reader looks: no edge comes after the first
                left += s.send(_NOISE[:15_000])
            while left:
                assert poll.poll(PATIENCE_S / 10), f"no event for the last {left} bytes"
                more = True
                while more:
                    left -= (got := len(c.recv(8192)))
                    more = got == 8192 and unread(c) > 0
    _close(c, s)


def check_end_of_stream_events(hop: Hop) -> None:
    """EPOLLRDHUP comes with the last bytes, EPOLLOUT on an idle connection, SO_RCVTIMEO and MSG_DONTWAIT end a read."""
    c, s = hop.pair()
    with select.epoll() as poll:
        poll.register(s, select.EPOLLIN | select.EPOLLRDHUP)
        c.send(b"last")
        c.shutdown(socket.SHUT_WR)
        end = time.monotonic() + PATIENCE_S
        while not (events := poll.poll(1)) or not events[0][1] & select.EPOLLRDHUP:
            assert time.monotonic() < end
        assert events[0][1] & select.EPOLLIN
        assert read_all(s) == b"last"
    _close(c, s)
    c, s = hop.pair()
    with select.epoll() as poll:
        poll.register(c, select.EPOLLOUT)
        assert poll.poll(PATIENCE_S)
    for flags, option in ((socket.MSG_DONTWAIT, 0), (0, 50000)):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 0, option))
        try:
            s.recv(1, flags)
            raise AssertionError("read something")
        except BlockingIOError:
            pass
    _close(c, s)


def check_sendfile(hop: Hop) -> None:
    """sendfile(2) between a header and a trailer."""
    with tempfile.TemporaryFile() as file:
        file.write(_NOISE * 4)
        file.flush()
        for _ in range(rounds(40)):
            c, s = hop.pair()
            got: list[bytes] = []
            thread = threading.Thread(target=lambda got=got, s=s: got.append(read_all(s)))  # type: ignore[misc]
            thread.start()
            c.sendall(b"head")
            at = 0
            while at < 4 * MIB:
                at += os.sendfile(c.fileno(), file.fileno(), at, 4 * MIB - at)
            c.sendall(b"tail")
            c.shutdown(socket.SHUT_WR)
            thread.join()
            assert got[0] == b"head" + _NOISE * 4 + b"tail"
            _close(c, s)


def check_splice_in(hop: Hop) -> None:
    """splice(2) from a pipe into the socket."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.splice.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    libc.splice.restype = ctypes.c_ssize_t
    for _ in range(rounds(100)):
        c, s = hop.pair()
        reader, writer = os.pipe()
        data = _noise(30000)
        os.write(writer, data)
        moved = 0
        while moved < len(data):
            more = libc.splice(reader, None, c.fileno(), None, len(data) - moved, 0)
            assert more > 0, os.strerror(ctypes.get_errno())
            moved += more
        c.shutdown(socket.SHUT_WR)
        assert read_all(s) == data
        os.close(reader)
        os.close(writer)
        _close(c, s)


def check_more_and_zerocopy(hop: Hop) -> None:
    """MSG_MORE keeps nothing back for good, MSG_ZEROCOPY sends what was in the buffer."""
    c, s = hop.pair()
    s.settimeout(PATIENCE_S)
    for _ in range(rounds(200)):
        c.send(b"a", socket.MSG_MORE)
        c.send(b"b", socket.MSG_MORE)
        c.send(b"c")
        assert read_exactly(s, 3) == b"abc"
    c.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
    for _ in range(rounds(50)):
        data = _noise(50000)
        moved = 0
        while moved < len(data):
            moved += c.send(data[moved:], _MSG_ZEROCOPY)
        assert read_exactly(s, len(data)) == data
    _close(c, s)


# --- ends -----------------------------------------------------------------------------------------------------------------------------


def check_reset(hop: Hop) -> None:
    """SO_LINGER 0: the other side sees a reset, never an orderly end."""
    for _ in range(rounds(300)):
        c, s = hop.pair()
        c.sendall(b"data")
        c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        c.close()
        s.settimeout(PATIENCE_S)
        seen: list[bytes | int | None] = []
        for _ in range(2):
            try:
                seen.append(s.recv(10))
            except OSError as error:
                seen.append(error.errno)
        assert errno.ECONNRESET in seen, seen
        s.close()


def check_reset_amid_a_body(hop: Hop) -> None:
    """Who reads to the end learns that it was cut off, whether it waits when the reset comes or looks later; never an orderly end."""
    for turn in range(rounds(100)):
        ends = hop.pair()
        writer, reader = ends if turn % 2 else ends[::-1]
        writer.sendall(_NOISE[:1000])
        got: list[bytes | int | None] = []

        def read(reader: socket.socket = reader, got: list[bytes | int | None] = got) -> None:
            try:
                while piece := receive(reader, 400):
                    got.append(piece)
                got.append(b"")
            except OSError as error:
                got.append(error.errno)

        thread = threading.Thread(target=read, daemon=True)
        if turn % 4 < 2:
            thread.start()
            while held(reader):
                time.sleep(0.001)
        writer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        writer.close()
        if turn % 4 >= 2:
            thread.start()
        thread.join(PATIENCE_S)
        assert got and got[-1] == errno.ECONNRESET, got[-1:]
        reader.close()


def check_peer_closes_while_sending(hop: Hop) -> None:
    """A blocked writer whose reader closes gets an error, and does not hang."""
    for _ in range(rounds(150)):
        c, s = hop.pair()
        errors: list[int | None] = []

        def write(c: socket.socket = c, errors: list[int | None] = errors) -> None:
            try:
                while True:
                    c.send(_NOISE[:20000])
            except OSError as error:
                errors.append(error.errno)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        read_exactly(s, 50000)
        s.close()
        thread.join(PATIENCE_S)
        assert errors and errors[0] in (errno.EPIPE, errno.ECONNRESET), errors
        c.close()


def check_shutdown_while_sending(hop: Hop) -> None:
    """Ending a stream from another thread: the reader gets an unbroken prefix."""
    for _ in range(rounds(60)):
        c, s = hop.pair()

        def write(c: socket.socket = c) -> None:
            with contextlib.suppress(OSError):
                for word in range(400):
                    c.sendall(struct.pack("=I", word) * 1000)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        time.sleep(0.001)
        c.shutdown(socket.SHUT_RDWR)
        s.settimeout(PATIENCE_S)
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := s.recv(65536):
                got += piece
        words = array.array("I", got[: len(got) // 4 * 4])
        assert all(word == at // 1000 for at, word in enumerate(words))
        thread.join(PATIENCE_S)
        _close(c, s)


def check_reuseport(hop: Hop) -> None:
    """Four listeners at one port."""
    hop.listener.close()
    listeners = [listen(((socket.SOL_SOCKET, socket.SO_REUSEPORT, 1),)) for _ in range(4)]
    hop.listener = listeners[0]
    used = set()
    for turn in range(rounds(300)):
        c = hop.connect()
        ready = select.select(listeners, [], [], PATIENCE_S)[0]
        used.add(listeners.index(ready[0]))
        s, _ = ready[0].accept()
        c.sendall(b"ping%d" % turn)
        assert receive(s) == b"ping%d" % turn
        s.sendall(b"pong")
        assert receive(c) == b"pong"
        _close(c, s)
    assert len(used) > 1
    _close(*listeners)


CHECKS = {name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")}


def run_check(name: str) -> None:
    """Inside a pod."""
    CHECKS[name](Hop())
