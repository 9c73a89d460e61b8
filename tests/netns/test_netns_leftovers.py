"""A meshed mesh that ends, in whatever way, takes everything with it: processes, namespaces, mounts, links, rules, files."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from local_lab import PATIENCE_S, LocalMesh, descriptors, mounts, namespaces, wait_until

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.needs("lsns")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "hello"


def machine() -> dict[str, object]:
    """What could be left on this machine, but for what other programs do meanwhile: they make no links and no rules."""
    run = lambda *words: subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return {
        "mounts": mounts(),
        "links": sorted(link["ifname"] for link in json.loads(run("ip", "-j", "link")) if link["ifname"].startswith("pod")),
        "routes": run("ip", "route"),
        "rules": run("nft", "list", "tables"),
        "named namespaces": [line for line in run("ip", "netns").splitlines() if line.startswith(("left-", "pod"))],
    }


def namespaces_of(pids: list[int]) -> set[str]:
    """Namespaces of any kind that these processes are in and we are not."""
    kinds = ("net", "mnt", "uts", "ipc", "pid")
    return {link.partition("[")[2].rstrip("]") for link in namespaces(pids, *kinds) - namespaces([os.getpid()], *kinds)}


def alive(until: float = math.inf) -> set[str]:
    """Every namespace of this machine that some mount or descriptor holds, or a process that began ``until`` then (seconds since boot).

    The kernel gives the numbers of namespaces again: what a younger process has is another one.
    """
    found = subprocess.run(["lsns", "-n", "-o", "NS,PID"], capture_output=True, text=True, check=False).stdout
    rows = [line.split() for line in found.splitlines()]
    return {number for number, *pid in rows if not pid or began(pid[0]) <= until}


def began(pid: str) -> float:
    """When a process did, in seconds since boot; never for one that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return math.inf


@pytest.mark.parametrize("how", ["down", "kill the runner", "end the runner"])
def test_nothing_of_a_meshed_mesh_is_left(how: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for file in EXAMPLE.iterdir():
        shutil.copy(file, tmp_path)
    mesh = LocalMesh(f"left-{how.split()[0]}-{os.getpid()}", tmp_path)
    before = machine()
    request.addfinalizer(lambda: shutil.rmtree(mesh.state, ignore_errors=True))  # a killed runner leaves files; the next `up` empties them
    request.addfinalizer(lambda: mesh.run("down"))
    up = mesh.up()
    assert up.returncode == 0, up.stderr
    assert machine() == before, "not even while it runs does anything show outside"
    members = mesh.members()
    held = namespaces_of(members)
    assert len(held) > 15 and held <= alive()
    fds, ends = descriptors(members), time.clock_gettime(time.CLOCK_BOOTTIME)
    if how == "down":
        assert mesh.run("down").returncode == 0
    elif how == "kill the runner":
        os.kill(mesh.runner_pid(), signal.SIGKILL)
    else:
        os.kill(mesh.runner_pid(), signal.SIGTERM)
    for fd in fds:
        assert select.select([fd], [], [], PATIENCE_S)[0], "a process survived"
        os.close(fd)
    wait_until(lambda: not held & alive(ends), "no namespace is left")
    assert machine() == before
    if how != "kill the runner":
        wait_until(lambda: not mesh.state.exists(), "no file is left")
