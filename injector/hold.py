"""``python -m injector.hold [proven]``: holds the start of the other containers until the sidecar is ready, as its postStart hook.

The kubelet starts the next container when this ends. ``proven``: the sidecar itself proves capture, and answers at a socket that tells it
when this hook is gone (proxy.hold); without the word `/ready` is asked.
"""

from __future__ import annotations

import socket
import sys
import time

from injector.fixed import ADMIN_PORT

HOLD_SOCKET = "\0pillion-hold"
_PAUSE_S = 0.02
_ASK_AGAIN_S = 0.1
_WITHIN_S = 120.0  # Linkerd's linkerd-await


def main(arguments: list[str]) -> int:
    """Exit codes: 0 ready, 1 not ready in time (the kubelet then restarts the sidecar), 2 usage."""
    if arguments not in ([], ["proven"]):
        print("usage: python -m injector.hold [proven]", file=sys.stderr)
        return 2
    said = wait_proven(_WITHIN_S) if arguments else wait_ready(_WITHIN_S)
    if said:
        print(f"the sidecar was not ready within {_WITHIN_S:g} s: {said}", file=sys.stderr)
    return 1 if said else 0


def wait_proven(within_s: float, path: str = HOLD_SOCKET) -> str:
    """Until the sidecar says that it is ready, with capture proven; else why not. It ends when it cannot."""
    deadline = time.monotonic() + within_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        while True:
            try:
                sock.connect(path)
                break
            except OSError as error:  # it is not that far yet
                if time.monotonic() > deadline:
                    return f"it does not answer ({error.strerror})"
                time.sleep(_PAUSE_S)
        sock.settimeout(max(deadline - time.monotonic(), _PAUSE_S))
        try:
            return "" if sock.recv(64) == b"ready\n" else "it ended"
        except OSError as error:
            return str(error)


def wait_ready(within_s: float) -> str:
    """Until `/ready` says so; else what it said last."""
    deadline = time.monotonic() + within_s
    said = "no answer"
    while time.monotonic() < deadline:
        status, said = ask()
        if status == 200:
            return ""
        time.sleep(_ASK_AGAIN_S)
    return said


def ask(port: int = ADMIN_PORT) -> tuple[int, str]:
    """The status of ``/ready`` (0 without an answer) and what was said. A socket: urllib would be most of what this program loads."""
    try:
        with socket.create_connection(("localhost", port), timeout=1) as sock:
            sock.sendall(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            answer = b""
            while len(answer) < 4096 and (read := sock.recv(4096)):
                answer += read
    except OSError as error:
        return 0, str(error)
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), body.decode("utf-8", "replace").strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
