"""A sidecar without a mesh: takes what is captured and dials the port that was meant, in the same pod. recv and send, nothing else."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from lab import OUT_PORT

from proxy.transport.original_dst import original_dst


def relay(tell: Callable[..., None]) -> None:
    """Run for ever; tells once it listens."""
    listener = socket.create_server(("::", OUT_PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    tell(None)
    while True:
        down, _ = listener.accept()
        threading.Thread(target=_serve, args=(down,), daemon=True).start()


def _serve(down: socket.socket) -> None:
    try:
        up = socket.create_connection(("127.0.0.1", original_dst(down).port), 10)
    except OSError:
        down.close()
        return
    for sock in (down, up):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    back = threading.Thread(target=_pump, args=(up, down), daemon=True)
    back.start()
    _pump(down, up)
    back.join()
    down.close()
    up.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            try:
                data = source.recv(1 << 17)
            except BlockingIOError:
                continue
            if not data:
                break
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
