"""A meshed mesh that ends, in whatever way, takes everything with it: processes, namespaces, mounts, links, rules, files."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from local_lab import LocalMesh, mounts, wait_until

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
    found = set()
    for pid in pids:
        for kind in ("net", "mnt", "uts", "ipc", "pid"):
            link = os.readlink(f"/proc/{pid}/ns/{kind}")
            if link != os.readlink(f"/proc/self/ns/{kind}"):
                found.add(link.partition("[")[2].rstrip("]"))
    return found


def alive() -> set[str]:
    """Every namespace of this machine that some process, mount or descriptor holds."""
    found = subprocess.run(["lsns", "-n", "-o", "NS"], capture_output=True, text=True, check=False).stdout
    return set(found.split())


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
    fds = [os.pidfd_open(pid) for pid in members]
    if how == "down":
        assert mesh.run("down").returncode == 0
    elif how == "kill the runner":
        os.kill(mesh.runner_pid(), signal.SIGKILL)
    else:
        os.kill(mesh.runner_pid(), signal.SIGTERM)
    for fd in fds:
        assert select.select([fd], [], [], 20)[0], "a process survived"
        os.close(fd)
    wait_until(lambda: not held & alive(), "no namespace is left")
    assert machine() == before
    if how != "kill the runner":
        wait_until(lambda: not mesh.state.exists(), "no file is left")
