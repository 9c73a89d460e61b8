"""Becoming root of a user namespace, for people who are not root of the machine. Called by local.supervisor before anything else.

Uid 0 inside is the caller; 1 to 65535 are the caller's subordinate range (/etc/subuid), so that apps and sidecars are different users here
too. newuidmap and newgidmap (package uidmap) write the maps, which the kernel lets only root do.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterable
from pathlib import Path

from local import namespaces

IDS = 65536  # what a distribution gives a user by default, and what our uids (up to 65532) need


class NoUserNamespace(RuntimeError):
    """Something that rootless needs is missing; the text says what, and what to do."""


def subordinate_start(lines: Iterable[str], names: Iterable[str]) -> int | None:
    """First id of a range of at least `IDS` - 1 for one of ``names`` (login name or uid) in a subuid(5) file."""
    wanted = set(names)
    for line in lines:
        name, _, rest = line.strip().partition(":")
        start, _, count = rest.partition(":")
        if name in wanted and start.isdigit() and count.isdigit() and int(count) >= IDS - 1:
            return int(start)
    return None


def own_ranges() -> tuple[int, int]:
    """First subordinate uid and gid of the caller; raises NoUserNamespace."""
    uid = os.getuid()
    try:
        names = [pwd.getpwuid(uid).pw_name, str(uid)]
    except KeyError:
        names = [str(uid)]
    found = []
    for file in ("/etc/subuid", "/etc/subgid"):
        try:
            start = subordinate_start(Path(file).read_text(encoding="utf-8", errors="replace").splitlines(), names)
        except OSError:
            start = None
        if start is None:
            option = file.removeprefix("/etc/sub").replace("uid", "--add-subuids").replace("gid", "--add-subgids")
            raise NoUserNamespace(
                f"{file} gives {names[0]} no range of {IDS} ids; ask root for: usermod {option} 100000-{100000 + IDS - 1} {names[0]}"
            )
        found.append(start)
    return found[0], found[1]


def become_root_inside() -> None:
    """Enter a new user namespace as its root; the process must have one thread. Raises NoUserNamespace."""
    uid, gid = os.getuid(), os.getgid()
    first_uid, first_gid = own_ranges()
    ready_read, ready_write = os.pipe()
    target = os.getpid()
    mapper = os.fork()
    if not mapper:
        os._exit(_map(target, ready_read, ready_write, uid, gid, first_uid, first_gid))
    os.close(ready_read)
    try:
        namespaces.unshare(namespaces.CLONE_NEWUSER)
    except OSError as error:
        os.close(ready_write)
        os.waitpid(mapper, 0)
        raise NoUserNamespace(
            f"the kernel refuses user namespaces ({error.strerror}); see /proc/sys/user/max_user_namespaces,"
            " kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns"
        ) from None
    os.write(ready_write, b"1")
    os.close(ready_write)
    if os.waitstatus_to_exitcode(os.waitpid(mapper, 0)[1]):
        raise NoUserNamespace("newuidmap or newgidmap refused the map; its words are in the log; is the package uidmap installed?")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _map(target: int, ready_read: int, ready_write: int, uid: int, gid: int, first_uid: int, first_gid: int) -> int:
    """In the child, outside the new namespace: wait until it exists, then write both maps."""
    os.close(ready_write)
    if not os.read(ready_read, 1):
        return 1
    for program, own, first in (("newuidmap", uid, first_uid), ("newgidmap", gid, first_gid)):
        words = [program, str(target), "0", str(own), "1", "1", str(first), str(IDS - 1)]
        try:
            if subprocess.run(words, check=False).returncode:
                return 1
        except OSError:
            return 1
    return 0
