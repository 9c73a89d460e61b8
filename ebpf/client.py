"""Talking to the node's agent: one request, one answer, blocking. Called by local.sandbox (in a thread), `--remove` and tests."""

from __future__ import annotations

import array
import socket
from pathlib import Path
from typing import Any

from ebpf.wire import BadMessage, Request, decode_untrusted, request_line

_TIMEOUT_S = 30.0


class NoAgent(RuntimeError):
    """Nobody answers on the socket."""


def ask(path: Path, request: Request, fds: tuple[int, ...] = (), timeout_s: float = _TIMEOUT_S) -> dict[str, Any]:
    """The answer; ``ok`` says whether it was done, ``error`` why not. Raises NoAgent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            line = request_line(request)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sent = connection.sendmsg([line], ancillary)
            connection.sendall(line[sent:])
            received = b""
            while not received.endswith(b"\n"):
                chunk = connection.recv(1 << 16)
                if not chunk:
                    raise NoAgent(f"the agent at {path} ended before it answered")
                received += chunk
            return decode_untrusted(received)
        except (OSError, BadMessage) as error:
            raise NoAgent(f"no agent answers at {path}: {error}") from None
