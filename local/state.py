"""Where the runner keeps its folder and how a command finds it. Called by both sides: local.supervisor and local.client."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


class BadName(ValueError):
    """A mesh name that cannot be a folder's."""


def state_folder(name: str) -> Path:
    """``/run/pillion/<name>`` for root, ``$XDG_RUNTIME_DIR/pillion/<name>`` otherwise; raises BadName."""
    if not _NAME.fullmatch(name):
        raise BadName(f"--name {name!r}: expected at most 31 of a-z 0-9 -, starting with a letter or digit")
    if os.geteuid() == 0:
        return Path("/run/pillion") / name
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/pillion-{os.geteuid()}"  # noqa: S108 -- the folder is made 0700 and its owner checked
    return Path(runtime) / "pillion" / name


def control_socket(state: Path) -> Path:
    """The runner's control socket."""
    return state / "control.sock"
