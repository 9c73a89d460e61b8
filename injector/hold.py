"""``python -m injector.hold``: holds the start of the other containers until the sidecar is ready, as its postStart hook.

Only for classic sidecars: a native one is waited for by the kubelet. The kubelet starts the next container when this ends.
"""

from __future__ import annotations

import socket
import sys
import time

from injector.fixed import ADMIN_PORT

_PAUSE_S = 0.1
_WITHIN_S = 120.0  # Linkerd's linkerd-await


def main(arguments: list[str]) -> int:
    """Exit codes: 0 ready, 1 not ready in time (the kubelet then restarts the sidecar), 2 usage."""
    if arguments:
        print("usage: python -m injector.hold", file=sys.stderr)
        return 2
    deadline = time.monotonic() + _WITHIN_S
    said = "no answer"
    while time.monotonic() < deadline:
        status, said = ask()
        if status == 200:
            return 0
        time.sleep(_PAUSE_S)
    print(f"the sidecar was not ready within {_WITHIN_S:g} s: {said}", file=sys.stderr)
    return 1


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
