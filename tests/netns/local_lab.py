"""A mesh of `pillion local` for tests: real namespaces, real processes, the commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.demo import evidence
from local import client, protocol
from tests import traces

PATIENCE_S = 30.0
"""How long something may take that should come at once: on a machine with more to do than processors, seconds pass before one's turn
comes. Nothing is lost by it where it comes at once."""
COMMAND = (sys.executable, "-P", "-c", "from local.commands import local; local(prog_name='pillion local')")


@dataclass
class LocalMesh:
    """One mesh, by name. folder: its manifests."""

    name: str
    folder: Path

    def run(self, command: str, *words: str, timeout: float = 120, **more: Any) -> subprocess.CompletedProcess[str]:
        """``pillion local <command> --name <name> <words>``"""
        argv = [*COMMAND, command, "--name", self.name, *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, **more)

    def up(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Start and wait until ready."""
        done = self.run("up", "-f", str(self.folder), "--detach", "--timeout", "90", *words)
        if done.returncode == 0:
            traces.note(pins=Path(f"/proc/{self.runner_pid()}/root{self.state}/bpf/pillion"))  # mounted in the runner's own namespace
        return done

    def sh(self, pod: str, script: str, *options: str) -> subprocess.CompletedProcess[str]:
        """A shell script in a pod of the namespace ``shop``."""
        return self.run("exec", "-n", "shop", *options, pod, "--", "sh", "-c", script)

    def status(self) -> dict[str, Any]:
        """As ``status -o json``, without a process for each question."""
        found: dict[str, Any] = json.loads(protocol.as_json(client.ask(self.name, protocol.Status())))
        return found

    def pods(self) -> dict[str, dict[str, Any]]:
        """Pods by name."""
        return {pod["name"]: pod for pod in self.status()["pods"]}

    @property
    def state(self) -> Path:
        """The runner's folder."""
        return Path("/run/pillion") / self.name

    def runner_pid(self) -> int:
        """The runner's pid on this machine: who listens, for what the runner starts has its command line until it executes its own."""
        return evidence.runner_pid(self.name)

    def parts(self, name: str) -> list[int]:
        """The process of ``identity`` or ``policy``, none while it is away."""
        return [pid for pid in self.members() if command_line(pid)[-2:] == ["-m", name]]

    def members(self) -> list[int]:
        """Every process of the mesh: the runner and all its descendants. Some may be gone already: probes come and go."""
        pids = [self.runner_pid()]
        for pid in pids:
            with suppress(FileNotFoundError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    with suppress(FileNotFoundError, ProcessLookupError):  # a thread of the runner's pool may end meanwhile
                        pids += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
        return pids


def command_line(pid: int) -> list[str]:
    """The words of a process on this machine, none when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def processes() -> list[tuple[int, str]]:
    """(pid, command line) of every process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")))
            except OSError:
                continue
    return found


def namespaces(pids: Sequence[int], *kinds: str) -> set[str]:
    """The namespaces of these kinds that those of the processes which still run are in, as the kernel names them."""
    found = set()
    for pid in pids:
        for kind in kinds:
            with suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
    return found


def descriptors(pids: Sequence[int]) -> list[int]:
    """A descriptor of each process that still runs, which says when it ends."""
    found = []
    for pid in pids:
        with suppress(ProcessLookupError):
            found.append(os.pidfd_open(pid))
    return found


def mounts() -> list[str]:
    """What is mounted on this machine, but for what other tests mount in folders of their own meanwhile."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line for line in lines if not line.split()[1].startswith(("/tmp/", "/run/netns/"))]


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Real processes have no virtual clock: ask again every 50 ms, fail with ``what`` after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
