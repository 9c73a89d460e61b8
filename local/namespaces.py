"""System calls for namespaces and mounts, and threads that live in other namespaces than the rest of the process.

Namespaces belong to threads, not to processes: a thread that nobody reuses can enter a pod, set something up or start a process there,
and end. That is how the local runner works inside pods without a second process per container. Linux only.
Called by local.sandbox, local.process and local.supervisor; decides nothing.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

T = TypeVar("T")

# sched.h
CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# sys/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 4096, 8192, 16384, 1 << 18
MNT_DETACH = 2
# statvfs(3) bit -> mount(2) flag: nosuid, nodev, noexec, noatime, nodiratime, relatime
_STATVFS_FLAGS = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}

_libc = ctypes.CDLL(None, use_errno=True)
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """unshare(2) for the calling thread; raises OSError."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int) -> None:
    """setns(2) for the calling thread; raises OSError."""
    _check(_libc.setns(fd, 0), "setns")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); raises OSError naming both ends."""
    arguments = (source.encode(), target.encode(), fstype.encode() or None, ctypes.c_ulong(flags), data.encode() or None)
    _check(_libc.mount(*arguments), f"mount {source} on {target}")


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2); raises OSError."""
    _check(_libc.umount2(target.encode(), flags), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2), which glibc does not wrap; raises OSError."""
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root: no system call number known for {os.uname().machine}")
    _check(_libc.syscall(number, new_root.encode(), put_old.encode()), f"pivot_root to {new_root}")


def bind(source: str, target: str, *, read_only: bool = False) -> None:
    """Show the file or tree ``source`` at ``target`` too; read-only needs a second call because bind(2) ignores the flag."""
    mount(source, target, flags=MS_BIND | MS_REC)
    if read_only:
        # in a user namespace, flags that the source came with are locked: leaving one out is refused
        kept = sum(flag for bit, flag in _STATVFS_FLAGS.items() if os.statvfs(target).f_flag & bit)
        mount("", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


@contextmanager
def namespace_fds(pid: int, names: Iterable[str]) -> Iterator[list[int]]:
    """Open namespaces of a process (``net``, ``mnt`` ...) as seen from our own /proc, in the given order."""
    fds: list[int] = []
    try:
        for name in names:
            fds.append(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401 -- those before a failure are closed
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def enter(pid: int, names: Iterable[str] = ("pid", "net", "uts", "ipc", "mnt")) -> None:
    """Bring the calling thread into the namespaces of ``pid``. Only for a thread that `in_own_thread` made; cannot be undone.

    The PID namespace holds for children of the thread only; after ``mnt`` every path means the pod's.
    """
    with namespace_fds(pid, names) as fds:
        unshare(CLONE_FS)  # setns(mnt) refuses a thread that shares its root and working directory
        for fd in fds:
            setns(fd)


async def in_own_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread that is never used again, so that it may change its namespaces. Not cancellable: keep it short."""
    token = trio.lowlevel.current_trio_token()
    done = trio.Event()
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # carried over to the caller, whatever it is
            failure.append(error)
        token.run_sync_soon(done.set)

    threading.Thread(target=body, daemon=True).start()
    with trio.CancelScope(shield=True):
        await done.wait()
    if failure:
        raise failure[0]
    return outcome[0]
