"""What tests put into the kernel: noted while it is there, so that the end of the session can show that all of it is gone.

Only what is noted is looked for: other programs of this machine come and go meanwhile, with programs and cgroups of their own. Noted by
whatever starts programs for tests (a lab, an agent's lab, a local mesh), looked for by a fixture of the whole session in tests.conftest.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from ebpf import attach, bpfsys

Ids = dict[str, set[int]]

_KINDS = {"maps": "map", "programs": "prog", "cgroups": "link", "pods": "link"}
_ids: Ids = {"map": set(), "prog": set(), "link": set()}
_paths: set[Path] = set()


def pinned(root: Path) -> Ids:
    """The kernel's ids of everything that is pinned under an agent's or a loader's folder."""
    found: Ids = {kind: set() for kind in _ids}
    for folder, kind in _KINDS.items():
        for path in (attach.Pins(root).folder / folder).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # an agent at work takes pins away
                if path.is_file():
                    fd = bpfsys.pinned(path)
                    found[kind].add(bpfsys.object_id(fd))
                    os.close(fd)
    return found


def note(*paths: Path, pins: Path | None = None) -> None:
    """Files and folders that must be gone at the end; everything that is pinned under ``pins`` now, and that folder."""
    _paths.update(paths)
    if pins is not None:
        _paths.add(pins)
        for kind, ids in pinned(pins).items():
            _ids[kind] |= ids


def left(patience_s: float) -> dict[str, set[int] | set[str]]:
    """What is still there, by kind, after waiting for the kernel, which frees programs a grace period later."""
    end = time.monotonic() + patience_s
    while (found := _still_there()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _still_there() -> dict[str, set[int] | set[str]]:
    found: dict[str, set[int] | set[str]] = {kind: ids & bpfsys.ids(kind) for kind, ids in _ids.items() if ids}
    found["path"] = {str(path) for path in _paths if path.exists()}
    return {kind: those for kind, those in found.items() if those}
