"""Namespaces and processes of a stage: they work, and they die with the benchmark however it ends."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.stage import APP_PORT, Pinning, Stage, StageError, wait_until

pytestmark = pytest.mark.netns


def test_pods_reach_each_other_and_every_endpoint(tmp_path: Path) -> None:
    with contextlib.closing(Stage("t", tmp_path, Pinning(), endpoints=300)) as stage:
        server = stage.server.spawn("server", [sys.executable, "-m", "http.server", str(APP_PORT), "--bind", "0.0.0.0"], cwd=tmp_path)
        code = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
        for ip in (stage.endpoints[0], stage.endpoints[-1]):

            def reached(ip: str = ip) -> bool:
                return stage.client.output([sys.executable, "-c", code, ip, str(APP_PORT)], 10)[0] == 0

            wait_until(reached, f"{ip} answers", 10, [server])
        assert server.alive()
    assert not server.alive()


def test_a_process_that_ends_early_is_named_with_its_last_words(tmp_path: Path) -> None:
    with contextlib.closing(Stage("t", tmp_path, Pinning())) as stage:
        proc = stage.client.spawn("broken", [sys.executable, "-c", "raise SystemExit('no such port')"])
        with pytest.raises(StageError, match="broken ended with exit code 1:\nno such port"):
            wait_until(lambda: False, "never", 10, [proc])


def test_nothing_outlives_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from bench.stage import Pinning, Stage
stage = Stage("t", Path({str(tmp_path)!r}), Pinning())
proc = stage.server.spawn("app", ["sleep", "600"], uid=2102)
print(stage.client.holder.pid, stage.server.holder.pid, proc.pid, stage.cgroup or "", flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bench:
        assert bench.stdout is not None
        *numbers, cgroup = bench.stdout.readline().decode().rstrip("\n").split(" ")
        pids = [int(number) for number in numbers]
        assert len(pids) == 3
        assert all(alive(pid) for pid in pids)
        bench.send_signal(signal.SIGKILL)
        bench.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids), "the children end", 5)
    if cgroup:
        Path(cgroup).rmdir()  # an empty folder is all that is left, and it can be removed


def test_every_process_of_a_stage_is_in_its_cgroup_and_the_cgroup_goes_with_it(tmp_path: Path) -> None:
    with contextlib.closing(Stage("t", tmp_path, Pinning())) as stage:
        if stage.cgroup is None:
            pytest.skip("no cgroup2 hierarchy is mounted")
        cgroup, before = stage.cgroup, Path("/proc/self/cgroup").read_text()
        proc = stage.server.spawn("app", ["sleep", "60"], uid=2102)
        assert str(proc.pid) in (cgroup / "cgroup.procs").read_text().split()
        code, out, _ = stage.client.output(["cat", "/proc/self/cgroup"], 10)
        assert code == 0
        assert f"/{cgroup.name}" in out
        with stage.client.inside():
            assert f"/{cgroup.name}" in Path("/proc/self/cgroup").read_text()
        assert Path("/proc/self/cgroup").read_text() == before
    assert not cgroup.exists()


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
