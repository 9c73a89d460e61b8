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

COMMAND = (sys.executable, "-P", "-c", "from local.commands import local; local(prog_name='pillion local')")


@dataclass
class LocalMesh:
    """One mesh, by name. folder: its manifests."""

    name: str
    folder: Path

    def run(self, command: str, *words: str, timeout: float = 60, **more: Any) -> subprocess.CompletedProcess[str]:
        """``pillion local <command> --name <name> <words>``"""
        argv = [*COMMAND, command, "--name", self.name, *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, **more)

    def up(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Start and wait until ready."""
        return self.run("up", "-f", str(self.folder), "--detach", "--timeout", "40", *words)

    def sh(self, pod: str, script: str, *options: str) -> subprocess.CompletedProcess[str]:
        """A shell script in a pod of the namespace ``shop``."""
        return self.run("exec", "-n", "shop", *options, pod, "--", "sh", "-c", script)

    def status(self) -> dict[str, Any]:
        """``status -o json``"""
        found: dict[str, Any] = json.loads(self.run("status", "-o", "json").stdout)
        return found

    def pods(self) -> dict[str, dict[str, Any]]:
        """Pods by name."""
        return {pod["name"]: pod for pod in self.status()["pods"]}

    @property
    def state(self) -> Path:
        """The runner's folder."""
        return Path("/run/pillion") / self.name

    def runner_pid(self) -> int:
        """The runner's pid on this machine."""
        found = [pid for pid, words in processes() if "local.supervisor" in words and f'"name": "{self.name}"' in words]
        assert len(found) == 1, found
        return found[0]

    def members(self) -> list[int]:
        """Every process of the mesh: the runner and all its descendants."""
        pids = [self.runner_pid()]
        for pid in pids:
            for task in Path(f"/proc/{pid}/task").glob("*"):
                with suppress(FileNotFoundError, ProcessLookupError):  # a thread of the runner's pool may end meanwhile
                    pids += [int(child) for child in (task / "children").read_text().split()]
        return pids


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


def network_namespaces(pids: Sequence[int]) -> set[str]:
    """The network namespaces of these processes."""
    return {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}


def mounts() -> list[str]:
    """What is mounted on this machine, but for what other tests mount in folders of their own meanwhile."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line for line in lines if not line.split()[1].startswith(("/tmp/", "/run/netns/"))]


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20) -> None:
    """Real processes have no virtual clock: ask again every 50 ms, fail with ``what`` after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
