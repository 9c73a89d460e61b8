"""``python -m local.trial [PROGRAM...]``: make a node's namespaces, run a program in them with our input, end. Called by local.check."""

from __future__ import annotations

import os
import subprocess
import sys

from local import namespaces, userns
from local.search import search_path


def main(command: list[str]) -> int:
    """0 when everything worked; else the reason is the last line on stderr."""
    os.environ["PATH"] = search_path()
    try:
        if os.geteuid():
            userns.become_root_inside()
        new = namespaces
        new.unshare(new.CLONE_NEWNS | new.CLONE_NEWNET | new.CLONE_NEWUTS | new.CLONE_NEWIPC | new.CLONE_NEWPID)
    except (OSError, userns.NoUserNamespace) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        print(f"namespaces cannot be made here: {text}", file=sys.stderr)
        return 1
    # one child for both steps: with the first process of a PID namespace, the namespace ends
    script = 'mount --make-rprivate / && mount -t proc proc /proc || exit 70; [ $# -eq 0 ] || exec "$@"'
    done = subprocess.run(["sh", "-c", script, "sh", *command], stdin=sys.stdin, capture_output=True, text=True, check=False)
    if done.returncode == 70:
        print(f"mounts cannot be made in a namespace (a container without full /proc?): {done.stderr.strip()}", file=sys.stderr)
    elif done.returncode:
        print(f"{command[0]} cannot redirect here, the kernel may lack nf_tables or nft_redir: {done.stderr.strip()}", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
