"""Where the runner keeps its folder and how a command finds it. Called by both sides: local.supervisor and local.client."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


class BadName(ValueError):
    """A mesh name that cannot be a folder's, or no safe place for the folder."""


def state_folder(name: str) -> Path:
    """``/run/pillion/<name>`` for root, ``$XDG_RUNTIME_DIR/pillion/<name>`` otherwise; raises BadName."""
    if not _NAME.fullmatch(name):
        raise BadName(f"--name {name!r}: expected at most 31 of a-z 0-9 -, starting with a letter or digit")
    if os.geteuid() == 0:
        return Path("/run/pillion") / name
    runtime = os.environ.get("XDG_RUNTIME_DIR") or own_folder(f"/tmp/pillion-{os.geteuid()}")  # noqa: S108 -- nobody else can enter it
    return Path(runtime) / "pillion" / name


def own_folder(path: str) -> str:
    """``path`` as a folder that only we can enter, in a place where everybody may make folders: whoever made this one first could lead us
    to a control socket of his own, or have us empty another folder. Raises BadName."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise BadName(f"{path} is not a folder that only you can write to: remove it, or set XDG_RUNTIME_DIR") from None
    return path


def control_socket(state: Path) -> Path:
    """The runner's control socket."""
    return state / "control.sock"
