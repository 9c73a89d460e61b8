"""Lets processes of other users reach this checkout when it lies in a closed home. Called inside a new mount namespace only.

A sidecar runs as its own uid; a checkout under ``/root`` or a home with mode 0700 would be out of its reach. Such a folder is replaced, in
that namespace, by an empty one through which only the needed paths can be seen.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import core
from local import namespaces


def own_paths() -> tuple[str, ...]:
    """What every Pillion process reads: the code, the virtual environment, the interpreter."""
    paths = (str(Path(core.__file__).resolve().parents[1]), sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)))
    return tuple(dict.fromkeys(os.path.realpath(path) for path in paths))


def closed_folders(paths: Iterable[str], mode_of: Callable[[str], int]) -> Mapping[str, list[str]]:
    """Outermost folder that others may not pass -> paths below it that they need. mode_of: path -> st_mode; raises OSError from it."""
    closed: dict[str, list[str]] = {}
    for path in sorted(set(paths)):
        for parent in list(reversed(Path(path).parents))[1:]:  # "/" itself can always be passed
            if not mode_of(str(parent)) & stat.S_IXOTH:
                inside = closed.setdefault(str(parent), [])
                if not any(Path(path).is_relative_to(other) for other in inside):
                    inside.append(path)
                break
    return closed


def expose(paths: Iterable[str], scratch: str) -> None:
    """Make ``paths`` reachable for everybody in this mount namespace. scratch: an existing empty folder; raises OSError."""
    found = closed_folders((path for path in paths if os.path.exists(path)), lambda path: os.stat(path).st_mode)
    for folder, inside in found.items():
        namespaces.mount("tmpfs", scratch, "tmpfs", namespaces.MS_NOSUID | namespaces.MS_NODEV, "mode=0755,size=1m")
        for path in inside:
            target = os.path.join(scratch, os.path.relpath(path, folder))
            if os.path.isdir(path):
                os.makedirs(target, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                Path(target).touch()
            namespaces.bind(path, target)
        namespaces.mount(scratch, folder, flags=namespaces.MS_MOVE)


def unreadable(paths: Iterable[str], mode_of: Callable[[str], int]) -> list[str]:
    """Those of ``paths`` that others cannot read even when they can get there."""
    return [path for path in paths if mode_of(path) & (stat.S_IROTH | stat.S_IXOTH) != stat.S_IROTH | stat.S_IXOTH]
