"""Volumes as folders of the runner, and their mounting into a container. Does I/O only; called by local.pod.

What a container sees is the machine's own file system; a mount path that does not exist there must not be created there. So the nearest
folder that exists is mirrored: an empty one in memory takes its place, with everything of the old one bound into it, for this container.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from local import namespaces
from local.podspec import NotYet, Volume, VolumeMount

_MIRRORED_MAX = 2000  # entries of a folder that is mirrored: each is a mount


def materialise(volume: Volume, folder: Path) -> Path:
    """Write the files of a volume (again, when they changed) and return what to bind. Tokens are written by local.pod."""
    if volume.host_path is not None:
        if not os.path.exists(volume.host_path):
            raise NotYet(f"volume {volume.name}: {volume.host_path} does not exist on this machine")
        return Path(volume.host_path)
    folder.mkdir(parents=True, exist_ok=True)
    if volume.writable:
        folder.chmod(0o777)
        return folder
    folder.chmod(0o755)
    wanted = {folder / path: content for path, content in volume.files.items()}
    kept = wanted.keys() | {folder / token.path for token in volume.tokens}
    for present in list(folder.rglob("*")):
        if present.is_file() and present not in kept and not present.name.startswith("."):
            present.unlink()
    for path, content in wanted.items():
        write_atomically(path, content, 0o644)
    return folder


def write_atomically(path: Path, content: bytes, mode: int, owner: int = -1) -> bool:
    """Replace a file in one step, so that no reader sees half of it; False when it has this content already."""
    try:
        if path.read_bytes() == content:
            return False
    except OSError:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    # exclusively: where the folder is another user's, a link of his must not lead us to a file of ours
    with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
        if owner >= 0:
            os.fchown(file.fileno(), owner, owner)
    temporary.replace(path)
    return True


def write_in_place(path: Path, content: bytes) -> None:
    """Change the content of a file that is bound somewhere by itself (a hosts file): the inode must stay."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(fd, content, 0)
        os.ftruncate(fd, len(content))
        os.fchmod(fd, 0o644)
    finally:
        os.close(fd)


def mount_all(mounts: Iterable[VolumeMount], sources: Mapping[str, Path], scratch: str) -> None:
    """Mount a container's volumes; runs inside its own mount namespace. scratch: an existing empty folder; raises OSError."""
    for mount in sorted(mounts, key=lambda mount: mount.path.count("/")):
        source = sources[mount.volume]
        if mount.sub_path:
            source = source / mount.sub_path
        make_mountpoint(mount.path, scratch, is_folder=source.is_dir())
        namespaces.bind(str(source), mount.path, read_only=mount.read_only)


def make_mountpoint(path: str, scratch: str, *, is_folder: bool) -> None:
    """Make ``path`` exist in this mount namespace only."""
    parts = [part for part in path.split("/") if part]
    if not parts or ".." in parts:
        raise OSError(f"mountPath {path!r}: expected an absolute path below /")
    existing = "/"
    for number, part in enumerate(parts):
        step = os.path.join(existing, part)
        if not os.path.lexists(step):
            mirror(os.path.realpath(existing), scratch)
            rest = os.path.join(existing, *parts[number:])
            os.makedirs(rest if is_folder else os.path.dirname(rest), exist_ok=True)
            if not is_folder:
                Path(rest).touch()
            return
        existing = step


def mirror(folder: str, scratch: str) -> None:
    """Put a writable folder in memory in the place of ``folder``, with all its entries bound into it; raises OSError."""
    entries = list(os.scandir(folder))
    if len(entries) > _MIRRORED_MAX:
        raise OSError(
            f"{folder} has {len(entries)} entries, too many to mount something new into it: create the mount path on this machine"
        )
    status = os.stat(folder)
    namespaces.mount("tmpfs", scratch, "tmpfs", namespaces.MS_NOSUID | namespaces.MS_NODEV, f"mode={status.st_mode & 0o7777:o}")
    for entry in entries:
        target = os.path.join(scratch, entry.name)
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), target)
            continue
        if os.path.samefile(entry.path, scratch):
            continue
        if entry.is_dir():
            os.mkdir(target)
        else:
            Path(target).touch()
        namespaces.bind(entry.path, target)
    if folder == "/":
        _become_root(scratch)
    else:
        namespaces.mount(scratch, folder, flags=namespaces.MS_MOVE)


def _become_root(new_root: str) -> None:
    """The root of this mount namespace (and thread) becomes ``new_root``; the old one is let go."""
    old = os.path.join(new_root, ".old")
    os.mkdir(old)
    namespaces.pivot_root(new_root, old)
    os.chdir("/")
    namespaces.unmount("/.old", namespaces.MNT_DETACH)
    os.rmdir("/.old")


def remove_tree(folder: Path) -> None:
    """Delete a pod's folder; files that the pod still writes do not stop it."""
    shutil.rmtree(folder, ignore_errors=True)
