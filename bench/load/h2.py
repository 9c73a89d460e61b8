"""HTTP/2 load whose requests do not repeat: `python -m bench.load.h2 HOST PORT KIND CONNECTIONS STREAMS SECONDS`.

h2load can vary the path but no header, so a proxy that remembers whole header blocks would look better than it is. This generator keeps
CONNECTIONS connections with STREAMS requests in flight each (closed loop, prior knowledge, in the clear). Each request has a path
(KIND ``http2``) or method (``grpc``; ``denied`` asks for what no rule allows) and three header values of its own; what does not vary is
referenced from the dynamic table where the peer allows one, and what varies is a literal without indexing, as gRPC's C core writes it.
Blocks are encoded before the clock starts, so that the generator spends some 5 us a request. Prints one line of JSON.
"""

from __future__ import annotations

import functools
import json
import select
import socket
import struct
import sys
import time

from bench.measure import Outcome

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_HEADER_TABLE_SIZE, _MAX_CONCURRENT_STREAMS = 1, 3
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_STATIC = {":authority": 1, ":path": 4, "user-agent": 58, "content-type": 31, "accept": 19}
_BLOCKS = 8192
# :status 200 as an entry of the static table is 0x88; these are the literals: indexed, not, never; plain and Huffman coded.
_LITERAL_200 = tuple(bytes([first]) + value for first in (0x48, 0x08, 0x18) for value in (b"\x03200", b"\x82\x10\x01"))
_WINDOW = 1 << 30
_LAST_STREAM = (1 << 31) - 1
PATIENCE_S = 20.0
"""How long after its end a round waits for answers: slower than this is no answer, however busy the machine."""
_MESSAGE = b"\x00\x00\x00\x00\x14" + b"\x0a\x12" + b"i" * 18  # one gRPC message of 20 bytes
_METHODS = [f"/shop.{service}/{verb}" for service in ("Catalog", "Cart", "Orders") for verb in ("Get", "List", "Watch", "Find")]


def integer(value: int, prefix_bits: int, flags: int) -> bytes:
    """RFC 7541 section 5.1."""
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes([flags | value])
    out = bytearray([flags | limit])
    value -= limit
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def text(value: str) -> bytes:
    """A string without Huffman coding (RFC 7541 section 5.2)."""
    return integer(len(value), 7, 0) + value.encode()


def constants(kind: str) -> list[tuple[str, str]]:
    """The five headers that are the same in every request."""
    shared = [(":authority", "service.bench.svc"), ("user-agent", "bench/1.0"), ("x-tenant", "tenant-3")]
    if kind == "grpc":
        return [*shared, ("content-type", "application/grpc"), ("te", "trailers")]
    return [*shared, ("accept", "application/json"), ("x-client", "web")]


VARYING = ("x-request-id", "traceparent", "x-timestamp")


def varying(number: int, kind: str) -> tuple[str, list[tuple[str, str]]]:
    """Path and the three values of request ``number``."""
    if kind == "denied":
        return "/admin/users", list(zip(VARYING, ("0" * 8,) * 3, strict=True))
    ids = f"{number * 2654435761 % (1 << 32):08x}"
    kinds = ("users", "orders", "carts", "items", "search")
    path = _METHODS[number % 12] if kind == "grpc" else f"/api/{kinds[number % 5]}/{number % 50}/detail?v={ids}"
    values = (f"{ids}-4a1b-4c2d-8e3f-{number:012x}", f"00-{number * 7919:032x}-{number:016x}-01", f"17{number:011d}")
    return path, list(zip(VARYING, values, strict=True))


def _start(kind: str, path: str) -> bytes:
    return (b"\x83\x86" if kind == "grpc" else b"\x82\x86") + integer(_STATIC[":path"], 4, 0) + text(path)


def _literal(name: str, value: str, prefix_bits: int, flags: int) -> bytes:
    index = _STATIC.get(name, 0)
    return integer(index, prefix_bits, flags) + (b"" if index else text(name)) + text(value)


def table_block(kind: str, number: int) -> bytes:
    """Request 0 inserts every constant and the varying names into the dynamic table; the others use it and do not change it."""
    path, values = varying(number, kind)
    fixed = constants(kind)
    if number == 0:
        return _start(kind, path) + b"".join(_literal(name, value, 6, 0x40) for name, value in [*fixed, *values])
    newest = 61 + len(fixed) + len(values)
    references = (integer(newest - place, 7, 0x80) for place in range(len(fixed)))
    names = (integer(61 + len(values) - place, 4, 0) + text(value) for place, (_, value) in enumerate(values))
    return _start(kind, path) + b"".join(references) + b"".join(names)


def plain_block(kind: str, number: int) -> bytes:
    """For a peer that allows no dynamic table: everything literal; request 0 says so (RFC 7541 section 4.2)."""
    path, values = varying(number, kind)
    literals = (_literal(name, value, 4, 0) for name, value in [*constants(kind), *values])
    return (b"" if number else b"\x20") + _start(kind, path) + b"".join(literals)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame (RFC 9113 section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


class Requests:
    """Encoded requests of one connection, split where the stream id goes. table: whether the peer allows a dynamic table."""

    def __init__(self, kind: str, *, table: bool) -> None:
        grpc = kind == "grpc"
        flags = _END_HEADERS if grpc else _END_HEADERS | _END_STREAM
        block = table_block if table else plain_block
        self.first = frame(_HEADERS, flags, 0, block(kind, 0))
        self.later = [frame(_HEADERS, flags, 0, block(kind, number)) for number in range(1, _BLOCKS)]
        data = frame(_DATA, _END_STREAM, 0, _MESSAGE) if grpc else b""
        self.tail, self.body = data[:5], data[9:]

    def make(self, number: int, stream: int) -> bytes:
        """Request ``number`` of a connection on stream ``stream``."""
        head = self.later[(number - 1) % len(self.later)] if number else self.first
        sid = stream.to_bytes(4, "big")
        if self.tail:
            return b"".join((head[:5], sid, head[9:], self.tail, sid, self.body))
        return b"".join((head[:5], sid, head[9:]))


requests_for = functools.cache(Requests)


class Connection:
    """One HTTP/2 connection that keeps ``streams`` requests in flight until told to stop."""

    def __init__(self, dial: tuple[str, int], kind: str, streams: int, offset: int) -> None:
        self.socket = socket.create_connection(dial, timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.kind, self.streams = kind, streams
        self.requests: Requests | None = None
        self.began: dict[int, float] = {}
        self.answered: dict[int, str] = {}
        self.number, self.next_stream, self.offset = 0, 1, offset
        self.pending = bytearray()
        self.unread = b""
        self.credit_used = 0
        self.latencies: list[float] = []
        self.failed: list[str] = []
        self.open = True
        self.sending = True
        settings = struct.pack(">HIHI", 4, _WINDOW, 2, 0)
        self.out = [_PREFACE, frame(_SETTINGS, 0, 0, settings), frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _WINDOW - 65535))]

    def fill(self, now: float) -> None:
        """Queue requests up to the number that may be in flight; none before the peer's settings are known."""
        while self.requests and self.sending and len(self.began) < self.streams and self.open:
            number = self.number + self.offset if self.number else 0
            self.out.append(self.requests.make(number, self.next_stream))
            self.began[self.next_stream] = now
            self.number += 1
            self.next_stream += 2
            if self.next_stream >= _LAST_STREAM:
                self.sending = False

    def flush(self) -> None:
        """Write what is queued; the rest waits in ``pending``."""
        data = bytes(self.pending) + b"".join(self.out)
        self.out.clear()
        self.pending.clear()
        if data and self.open:
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.broke(f"send: {error}")
                return
            self.pending += data[sent:]

    def broke(self, why: str) -> None:
        """The connection is lost with everything in flight."""
        self.open = False
        self.failed += [why] * max(1, len(self.began))
        self.began.clear()

    def readable(self, now: float) -> None:
        """Read once and account for every whole frame."""
        try:
            data = self.socket.recv(262_144)
        except BlockingIOError:
            return
        except OSError as error:
            self.broke(f"recv: {error}")
            return
        if not data:
            self.broke("closed by peer")
            return
        if self.unread:
            data = self.unread + data
        at, end = 0, len(data)
        while end - at >= 9:
            stop = at + 9 + (data[at] << 16 | data[at + 1] << 8 | data[at + 2])
            if stop > end:
                break
            self.frame(data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), data, at + 9, stop, now)
            at = stop
        self.unread = data[at:]

    def frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, stop: int, now: float) -> None:
        """One frame of an answer."""
        if kind == _DATA:
            self.credit_used += stop - start
            if self.credit_used > _WINDOW // 2:
                self.out.append(frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", self.credit_used)))
                self.credit_used = 0
            if flags & _END_STREAM:
                self.done(stream, now, "gRPC answer without trailers" if self.kind == "grpc" else "")
        elif kind == _HEADERS:
            if stream not in self.answered:
                while data[start] & 0xE0 == 0x20:  # table size update
                    start += 1
                good = data[start] == 0x88 or data[start : start + 5].startswith(_LITERAL_200)
                self.answered[stream] = "" if good else f"status is not 200 (block starts {data[start : start + 5].hex()})"
                if flags & _END_STREAM:
                    self.done(stream, now, "answer without a body")
            elif flags & _END_STREAM:
                self.done(stream, now, "")
        elif kind == _SETTINGS and not flags & _ACK:
            self.out.append(frame(_SETTINGS, _ACK, 0, b""))
            said = dict(struct.iter_unpack(">HI", data[start:stop]))
            self.streams = min(self.streams, said.get(_MAX_CONCURRENT_STREAMS, self.streams))
            if self.requests is None:
                self.requests = requests_for(self.kind, table=said.get(_HEADER_TABLE_SIZE, 4096) >= 4096)
        elif kind == _PING and not flags & _ACK:
            self.out.append(frame(_PING, _ACK, 0, data[start:stop]))
        elif kind == _RST:
            self.done(stream, now, f"reset with code {int.from_bytes(data[start:stop], 'big')}")
        elif kind == _GOAWAY:
            self.broke(f"GOAWAY with code {int.from_bytes(data[start + 4 : start + 8], 'big')}")

    def done(self, stream: int, now: float, problem: str) -> None:
        """An answer is complete."""
        began = self.began.pop(stream, None)
        problem = self.answered.pop(stream, "") or problem
        if began is None:
            return
        if problem:
            self.failed.append(problem)
        else:
            self.latencies.append(now - began)


def run(dial: tuple[str, int], kind: str, connections: int, streams: int, seconds: float) -> dict[str, object]:
    """Generate load and return what is printed."""
    links = [Connection(dial, kind, streams, index * 131) for index in range(connections)]
    poll = select.epoll()
    by_fd = {link.socket.fileno(): link for link in links}
    for fd, link in by_fd.items():
        link.flush()
        poll.register(fd, select.EPOLLIN)
    # The clock starts when every peer has sent its settings and its blocks are encoded.
    give_up = time.perf_counter() + PATIENCE_S
    while any(link.requests is None and link.open for link in links) and time.perf_counter() < give_up:
        for fd, _ in poll.poll(0.2):
            by_fd[fd].readable(time.perf_counter())
    start = now = time.perf_counter()
    for link in links:
        if link.requests is None:
            link.broke("no SETTINGS from the peer")
        link.fill(now)
        link.flush()
    stop = start + seconds
    while now < stop + PATIENCE_S and any(link.began for link in links):
        for fd, event in poll.poll(0.2):
            link = by_fd[fd]
            now = time.perf_counter()
            link.sending = link.sending and now < stop
            if event & ~select.EPOLLOUT:
                link.readable(now)
                link.fill(now)
            link.flush()
            if not link.open:
                poll.unregister(fd)
            else:
                poll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if link.pending else 0))
        now = time.perf_counter()
    failed = [why for link in links for why in link.failed] + ["no answer"] * sum(len(link.began) for link in links)
    latencies = sorted(value for link in links for value in link.latencies)
    return summary(latencies, failed, now - start)  # until the last answer: all of them are counted


def summary(latencies: list[float], failed: list[str], duration_s: float) -> dict[str, object]:
    """The JSON object that load programs print; ``latencies`` in seconds, sorted."""
    count = len(latencies)

    def percentile(share: float) -> float:
        return latencies[min(count - 1, int(count * share))] * 1e6 if count else 0.0

    return {
        "requests": count,
        "failed": len(failed),
        "why": "; ".join(sorted(set(failed))[:3]),
        "duration_us": duration_s * 1e6,
        "mean_us": sum(latencies) / count * 1e6 if count else 0.0,
        "p50_us": percentile(0.5),
        "p99_us": percentile(0.99),
    }


def parse(code: int, out: str, err: str) -> Outcome:
    """Read what `summary` printed in another process."""
    line = next((line for line in out.splitlines() if line.startswith("{")), None)
    if code != 0 or line is None:
        return Outcome(0, 1, {}, f"load generator: exit {code}: {(err or out).strip()[-300:]}")
    said = json.loads(line)
    metrics = {
        "throughput": said["requests"] / (said["duration_us"] / 1e6) if said["duration_us"] else 0.0,
        "latency_mean": said["mean_us"],
        "latency_p50": said["p50_us"],
        "latency_p99": said["p99_us"],
    }
    return Outcome(said["requests"], said["failed"], metrics, said["why"])


if __name__ == "__main__":
    host, port, kind, connections, streams, seconds = sys.argv[1:]
    print(json.dumps(run((host, int(port)), kind, int(connections), int(streams), float(seconds))))
