"""Large bodies, up and down: the server (`serve PORT`) and the load (`load HOST PORT down|up BYTES CONNECTIONS SECONDS`).

One thread and one body in flight for each connection; the same plain HTTP/1.1 exchange serves for HTTP/1.1 and, through proxies that do
not look inside, for opaque TCP. Neither end looks at the bytes, so that a core moves several GB/s of them.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

_CHUNK = 1 << 18
_NOISE = memoryview(bytes(range(256)) * (_CHUNK // 256))


def read_head(link: socket.socket, early: bytes = b"") -> tuple[bytes, int]:
    """The head of a message and how many bytes of its body came with it; empty when the peer closed first."""
    data = early
    while b"\r\n\r\n" not in data:
        more = link.recv(65_536)
        if not more:
            return b"", 0
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, len(rest)


def body_length(head: bytes) -> int:
    """Content-Length of a head, 0 without one."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


def send_body(link: socket.socket, size: int) -> None:
    """``size`` bytes of anything."""
    while size > 0:
        size -= link.send(_NOISE[: min(size, _CHUNK)])


def drain(link: socket.socket, size: int, buffer: bytearray) -> None:
    """Read ``size`` bytes and forget them; raises OSError when the peer closes before."""
    while size > 0:
        count = link.recv_into(buffer, min(size, len(buffer)))
        if not count:
            raise OSError(f"closed {size} bytes before the end of a body")
        size -= count


def answer(link: socket.socket) -> None:
    """Serve one connection: GET /blob/<bytes> is answered with so many bytes, other methods when their body is read."""
    buffer = bytearray(_CHUNK)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        while True:
            head, early = read_head(link)
            if not head:
                return
            if head.startswith(b"GET /blob/"):
                size = int(head.split(b" ", 2)[1].rpartition(b"/")[2])
                link.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n" % size)
                send_body(link, size)
            else:
                drain(link, body_length(head) - early, buffer)
                link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    except (OSError, ValueError):
        return
    finally:
        link.close()


def serve(port: int) -> None:
    """Accept for ever."""
    listener = socket.create_server(("0.0.0.0", port), backlog=1024)
    while True:
        link, _ = listener.accept()
        threading.Thread(target=answer, args=(link,), daemon=True).start()


def exchange(dial: tuple[str, int], up: bool, size: int, stop: float, done: list[int], failed: list[str]) -> None:
    """One connection's loop until ``stop`` (perf_counter)."""
    buffer = bytearray(_CHUNK)
    try:
        with socket.create_connection(dial, timeout=30) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not done or time.perf_counter() < stop:
                verb = f"PUT /blob/{size}" if up else f"GET /blob/{size}"
                length = f"Content-Length: {size}\r\n" if up else ""
                link.sendall(f"{verb} HTTP/1.1\r\nHost: service.bench.svc\r\nUser-Agent: bench/1.0\r\n{length}\r\n".encode())
                if up:
                    send_body(link, size)
                head, early = read_head(link)
                if not head.startswith(b"HTTP/1.1 200"):
                    failed.append(f"answer {head[:30]!r}")
                    return
                drain(link, body_length(head) - early, buffer)
                done.append(size)
    except OSError as error:
        failed.append(str(error))


def load(dial: tuple[str, int], up: bool, size: int, connections: int, seconds: float) -> dict[str, object]:
    """Run all connections; every body begun is finished, and counted over the time until the last one ended."""
    done: list[int] = []
    failed: list[str] = []
    start = time.perf_counter()
    threads = [threading.Thread(target=exchange, args=(dial, up, size, start + seconds, done, failed)) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"bytes": sum(done), "failed": len(failed), "why": "; ".join(sorted(set(failed))[:3]), "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        host, port, way, size, connections, seconds = sys.argv[2:]
        print(json.dumps(load((host, int(port)), way == "up", int(size), int(connections), float(seconds))))
