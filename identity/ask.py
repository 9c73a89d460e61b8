"""``python -m identity.ask '{"verb": "status"}'``: one request to the operator's socket of this container, the answer on stdout.

What `pillion identity status|rotate` runs inside the pod that leads: whoever may exec there may rotate, and nobody else.
"""

from __future__ import annotations

import os
import sys

from identity.admin_client import exchange_line


def main(arguments: list[str]) -> int:
    """Exit codes: 0 with an answer (which may be a refusal), 1 without, 2 for usage."""
    path = os.environ.get("PILLION_IDENTITY_ADMIN_SOCKET", "")
    if len(arguments) != 1 or not path:
        print("usage: PILLION_IDENTITY_ADMIN_SOCKET=PATH python -m identity.ask REQUEST", file=sys.stderr)
        return 2
    try:
        answer = exchange_line(path, arguments[0].encode())
    except OSError as error:
        print(f"{path}: {error.strerror or error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(answer)
    return 0 if answer.endswith(b"\n") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
