"""What the test cluster takes from this machine, and how it gives it back: cgroups and mounts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class CannotStart(Exception):
    """A program of the cluster did not come up; says which and where its log is."""


def wait_for(what: str, test: Callable[[], object], seconds: float) -> None:
    """Ask again until ``test`` is true; raises CannotStart naming ``what``."""
    end = time.monotonic() + seconds
    while not test():
        if time.monotonic() > end:
            raise CannotStart(f"{what}: not after {seconds:.0f} s")
        time.sleep(0.1)


def ip(*commands: str) -> None:
    for command in commands:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotStart(f"ip {command}: {done.stderr.strip()}")


def unified() -> Path:
    """Where this machine has cgroup v2: alone, or beside the v1 controllers."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise CannotStart("this machine has no cgroup v2 hierarchy mounted")


def hierarchies() -> list[Path]:
    """Every mounted hierarchy: one on a machine with v2 alone, one for each controller beside it on a hybrid."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return [Path(where) for _, where, kind, *_ in mounts if kind in ("cgroup", "cgroup2")]


def make_cgroups(name: str) -> None:
    wanted = "+cpu +cpuset +memory +pids"
    for top in hierarchies():
        (top / name).mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # v1 gives a new folder none
            if (top / file).exists() and not (top / "cgroup.controllers").exists():
                (top / name / file).write_text((top / file).read_text())
    if (unified() / "cgroup.controllers").read_text().split():
        for folder in (unified(), unified() / name):
            with contextlib.suppress(OSError):
                (folder / "cgroup.subtree_control").write_text(wanted)


def alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _folders(cgroup: Path) -> list[Path]:
    """It and all below, parents first. os.walk, because containers that end meanwhile take their folders along."""
    return [Path(folder) for folder, _, _ in os.walk(cgroup)]


def _members(cgroup: Path) -> Iterator[int]:
    for folder in _folders(cgroup):
        with contextlib.suppress(OSError):
            yield from map(int, (folder / "cgroup.procs").read_text().split())


def end_all(cgroup: Path) -> None:
    """Kill what lives below; programs that start others need several rounds."""
    for _ in range(200):
        pids = [pid for pid in _members(cgroup) if alive(pid)]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def remove_cgroup(cgroup: Path) -> None:
    for folder in reversed(_folders(cgroup)):
        for _ in range(20):
            try:
                folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.05)


def unmount_below(folder: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for where in sorted((where for where in mounts if where.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "-l", where], capture_output=True, check=False)


# what the programs of a node keep in places that all nodes of this machine would share: each node has its own, gone with its processes
_OWN = ("/run/pillion", "/run/containerd", "/run/netns", "/var/lib/cni", "/var/log/containers")


def make_mounts(file: Path) -> None:
    """A mount namespace for a node, held by ``file``: the machine's files, but shared folders of its own and a BPF file system."""
    for folder in _OWN:
        Path(folder).mkdir(parents=True, exist_ok=True)
    file.touch()
    subprocess.run(["unshare", f"--mount={file}", "--propagation=private", "true"], check=True)
    own = [f"mount -t tmpfs -o mode=755 own {folder}" for folder in _OWN]
    # shared, as on a machine that systemd started: kubelet hands mounts on to pods that ask for them (mountPropagation)
    commands = ["mount --make-rshared /", *own, "mount -t bpf bpf /sys/fs/bpf", "mount --make-shared /sys/fs/bpf"]
    subprocess.run(["nsenter", f"--mount={file}", "sh", "-ec", "\n".join(commands)], check=True)


def make_private(folder: Path) -> None:
    """A mount point whose own mounts stay here: files that hold mount namespaces must lie in one."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "--make-private", str(folder)], check=True)
