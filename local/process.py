"""Processes inside pods: started from a thread that is in the pod's namespaces, waited for by pidfd. Called by local.pod, local.control.

The process is a direct child of the runner and a member of the pod's PID namespace: no shim in between, so its exit code and signals are
exactly its own. It keeps no capability, cannot gain any, and owns its session, so that everything it started can be ended with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from local import namespaces


@dataclass(frozen=True)
class Stdio:
    """File descriptors (or subprocess.DEVNULL) of a new process."""

    stdin: int
    stdout: int
    stderr: int


class Process:
    """A running process. pid is ours, not the pod's."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid = popen.pid
        self._pidfd = os.pidfd_open(popen.pid)

    async def wait(self) -> int:
        """The exit code, 128 + number after a signal (as shells and Kubernetes report it). Only one task may call it, once."""
        try:
            await trio.lowlevel.wait_readable(self._pidfd)
        finally:
            if (code := self._popen.poll()) is not None:
                os.close(self._pidfd)
                self._pidfd = -1
        assert code is not None
        self._end_session()
        return 128 - code if code < 0 else code

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._popen.returncode

    def signal(self, number: int) -> None:
        """Tell the process itself; nothing happens when it has ended."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass  # it ended by itself a moment ago

    def kill(self) -> None:
        """End the process and what it started."""
        if self._pidfd >= 0:
            self._end_session()
            self.signal(signal.SIGKILL)

    async def end(self) -> None:
        """Kill and reap, for a process whose `wait` was cancelled; not cancellable.

        Whoever gives up waiting calls this: as long as a member of a pod's PID namespace is not reaped, the kernel does not let the
        namespace end, and ending the pod would wait for us.
        """
        self.kill()
        if self._pidfd >= 0:
            with trio.CancelScope(shield=True):
                await self.wait()

    def _end_session(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nothing left of it


def unprivileged(argv: Sequence[str], uid: int, gid: int) -> list[str]:
    """The command line that becomes ``argv`` as this user, without any capability or a way to get one (setuid programs included)."""
    drop = ["--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", *drop, "--", *argv]


async def start_in(
    pod_pid: int,
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    stdio: Stdio,
    prepare: Callable[[], None] | None = None,
) -> Process:
    """Start ``argv`` (see `unprivileged`) in the namespaces of ``pod_pid``.

    prepare: runs inside, in a mount namespace of the process's own, before it starts: what it mounts only this container sees.
    Raises OSError naming what could not be done.
    """

    def work() -> subprocess.Popen[bytes]:
        namespaces.enter(pod_pid)
        if prepare is not None:
            namespaces.unshare(namespaces.CLONE_NEWNS)
            prepare()
        return subprocess.Popen(
            argv, env=dict(env), cwd=cwd, stdin=stdio.stdin, stdout=stdio.stdout, stderr=stdio.stderr, start_new_session=True
        )

    return Process(await namespaces.in_own_thread(work))


async def start_here(argv: Sequence[str], env: Mapping[str, str], stdio: Stdio, prepare: Callable[[], None]) -> Process:
    """Start a process on the node, in a mount namespace of its own that ``prepare`` sets up; raises OSError."""

    def work() -> subprocess.Popen[bytes]:
        namespaces.unshare(namespaces.CLONE_FS | namespaces.CLONE_NEWNS)
        prepare()
        return subprocess.Popen(
            argv, env=dict(env), cwd="/", stdin=stdio.stdin, stdout=stdio.stdout, stderr=stdio.stderr, start_new_session=True
        )

    return Process(await namespaces.in_own_thread(work))
