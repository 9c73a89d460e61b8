"""HTTP/1.1 requests at times fixed beforehand: `python -m bench.load.openloop HOST PORT RATE SECONDS`.

Open loop: arrivals are a Poisson process with a fixed seed, the same for every contestant, and latency counts from the time a request
was due, not from when a connection was free to send it; so a slow answer cannot hide the wait of those behind it (no coordinated
omission). Requests are those of varied.lua. Up to 64 connections, opened when needed and kept.

`python -m bench.load.openloop --new HOST PORT CONNECTIONS SECONDS` is a closed loop instead, with a new connection for each request.
"""

from __future__ import annotations

import collections
import ctypes
import json
import random
import select
import socket
import sys
import threading
import time

from bench.load.h2 import PATIENCE_S, summary

_PR_SET_TIMERSLACK = 29
_MAX_CONNECTIONS = 64
_KINDS = ("users", "orders", "carts", "items", "search")


def request(number: int) -> bytes:
    """A request with one of 50 paths and 8 headers, of which 3 are its own."""
    return (
        f"GET /api/{_KINDS[number % 5]}/{100_000 + 7919 * (number % 50)}/detail HTTP/1.1\r\nHost: service.bench.svc\r\n"
        f"User-Agent: bench/1.0\r\nAccept: application/json\r\nAccept-Encoding: identity\r\nX-Tenant: tenant-{number % 7}\r\n"
        f"X-Request-Id: {number * 2654435761 % (1 << 32):08x}-4a1b-4c2d-8e3f-{number:012x}\r\n"
        f"Traceparent: 00-{number * 7919:032x}-{number:016x}-01\r\nX-Timestamp: 17{number:011d}\r\n\r\n"
    ).encode()


def arrivals(rate: float, seconds: float, seed: int = 7) -> list[float]:
    """Due times in seconds from the start, ascending."""
    dice = random.Random(seed)
    due, at = [], 0.0
    while (at := at + dice.expovariate(rate)) < seconds:
        due.append(at)
    return due


class Connection:
    """One keep-alive connection with at most one request in flight."""

    def __init__(self, dial: tuple[str, int]) -> None:
        self.socket = socket.create_connection(dial, timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        self.data = b""

    def answered(self) -> str | None:
        """Read once. None: not complete; empty: complete and 200; else what was wrong."""
        data = self.socket.recv(65_536)
        if not data:
            return "closed by peer"
        self.data += data
        head, blank, body = self.data.partition(b"\r\n\r\n")
        if not blank:
            return None
        if not head.startswith(b"HTTP/1.1 200"):
            return f"answer {head[:30]!r}"
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
        return "" if len(body) >= int(length.partition(b":")[2]) else None


def run(dial: tuple[str, int], rate: float, seconds: float) -> dict[str, object]:
    """Generate load and return what is printed."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    due = arrivals(rate, seconds)
    idle: list[Connection] = [Connection(dial) for _ in range(8)]
    busy: dict[int, Connection] = {}
    waiting: collections.deque[tuple[int, float]] = collections.deque()
    latencies: list[float] = []
    failed: list[str] = []
    number, opened = 0, len(idle)
    start = time.perf_counter()
    while number < len(due) or busy or waiting:
        now = time.perf_counter() - start
        if now > seconds + PATIENCE_S:
            break
        while number < len(due) and due[number] <= now:
            waiting.append((number, due[number]))
            number += 1
        while waiting and (idle or opened < _MAX_CONNECTIONS):
            link = idle.pop() if idle else Connection(dial)
            opened += link.socket.fileno() not in busy and not link.due
            which, link.due = waiting.popleft()
            link.data = b""
            link.socket.sendall(request(which))
            busy[link.socket.fileno()] = link
        # select(2) and not epoll: its timeout has microseconds, and there are few descriptors.
        pause = max(0.0, due[number] - (time.perf_counter() - start)) if number < len(due) else 0.5
        for fd in select.select(list(busy), [], [], pause)[0]:
            link = busy[fd]
            try:
                said = link.answered()
            except OSError as error:
                said = f"recv: {error}"
            if said is None:
                continue
            del busy[fd]
            if said:
                failed.append(said)
                link.socket.close()
                opened -= 1
            else:
                latencies.append(time.perf_counter() - start - link.due)
                idle.append(link)
    failed += ["no answer"] * (len(busy) + len(waiting))
    return summary(sorted(latencies), failed, seconds)


def run_new(dial: tuple[str, int], connections: int, seconds: float) -> dict[str, object]:
    """Connect, ask once, close, again: ``connections`` at a time."""
    latencies: list[float] = []
    failed: list[str] = []
    start = time.perf_counter()

    def loop() -> None:
        number = 0
        while number == 0 or (time.perf_counter() < start + seconds and len(failed) < 100):
            began = time.perf_counter()
            number += 1
            try:
                link = Connection(dial)
                link.socket.sendall(request(number))
                while (said := link.answered()) is None:
                    pass
                link.socket.close()
            except OSError as error:
                said = str(error)
            if said:
                failed.append(said)
            else:
                latencies.append(time.perf_counter() - began)

    workers = [threading.Thread(target=loop) for _ in range(connections)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return summary(sorted(latencies), failed, time.perf_counter() - start)


if __name__ == "__main__":
    if sys.argv[1] == "--new":
        host, port, connections, seconds = sys.argv[2:]
        print(json.dumps(run_new((host, int(port)), int(connections), float(seconds))))
        sys.exit(0)
    host, port, rate, seconds = sys.argv[1:]
    print(json.dumps(run((host, int(port)), float(rate), float(seconds))))
