"""A mesh ends whatever still runs in it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_lab import COMMAND, PATIENCE_S, LocalMesh, processes, wait_until

pytestmark = pytest.mark.netns

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: one, namespace: shop}\nspec: {containers: [{name: a, command: [sleep, '9999']}]}\n"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[LocalMesh]:
    (tmp_path / "app.yaml").write_text(POD)
    found = LocalMesh(f"end-{os.getpid()}", tmp_path)
    started = found.up()
    try:
        assert started.returncode == 0, started.stderr
        yield found
    finally:
        found.run("down")


@pytest.mark.parametrize("how", ["down", "sigterm"])
def test_a_command_that_still_runs_in_a_pod_does_not_keep_the_mesh(mesh: LocalMesh, how: str) -> None:
    """The pod's PID namespace ends only when the runner has reaped the command, which lies beside the pod's containers."""
    words = [*COMMAND, "exec", "--name", mesh.name, "-n", "shop", "one", "--", "sh", "-c", "echo runs; exec sleep 98766"]
    command = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert command.stdout is not None and command.stdout.readline() == b"runs\n"
    runner = os.pidfd_open(mesh.runner_pid())
    try:
        if how == "down":
            assert mesh.run("down", timeout=PATIENCE_S).returncode == 0
        else:
            os.kill(mesh.runner_pid(), signal.SIGTERM)
        assert select.select([runner], [], [], PATIENCE_S)[0], "the runner waits for ever"
    finally:
        os.close(runner)
        command.kill()
        command.wait()
        command.stdout.close()


def runners(name: str) -> list[int]:
    """Processes of the runner of this name: two for a moment while it starts."""
    return [pid for pid, words in processes() if "local.supervisor" in words and f'"name": "{name}"' in words]


def test_an_interrupted_start_leaves_no_mesh(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "app.yaml").write_text(POD)
    mesh = LocalMesh(f"interrupted-{os.getpid()}", tmp_path)
    request.addfinalizer(lambda: mesh.run("down"))
    command = subprocess.Popen([*COMMAND, "up", "--name", mesh.name, "-f", str(tmp_path)])
    wait_until(lambda: runners(mesh.name), "the runner starts")
    command.send_signal(signal.SIGINT)  # as Ctrl-C: the runner has a session of its own and hears nothing of it
    assert command.wait(timeout=PATIENCE_S) == 130
    wait_until(lambda: not runners(mesh.name), "the runner is gone")
    assert not mesh.state.exists()


def test_waiting_for_pods_that_is_interrupted_is_not_done_and_leaves_no_mesh(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "app.yaml").write_text(POD.replace("containers: [{", "containers: [{readinessProbe: {exec: {command: ['false']}}, ", 1))
    mesh = LocalMesh(f"waiting-{os.getpid()}", tmp_path)
    request.addfinalizer(lambda: mesh.run("down"))
    command = subprocess.Popen([*COMMAND, "up", "--name", mesh.name, "-f", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: mesh.run("status").stdout.count("Running"), "the pod runs, and is not ready")
    command.send_signal(signal.SIGINT)
    assert "error: interrupted; the mesh is ended" in command.communicate(timeout=PATIENCE_S)[1]
    assert command.returncode == 130
    wait_until(lambda: not runners(mesh.name), "the runner is gone")


def test_of_two_commands_that_start_one_mesh_at_once_one_is_refused(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "app.yaml").write_text(POD)
    mesh = LocalMesh(f"twice-{os.getpid()}", tmp_path)
    request.addfinalizer(lambda: mesh.run("down"))
    words = [*COMMAND, "up", "--name", mesh.name, "-f", str(tmp_path), "--detach"]
    commands = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = {command.returncode: told for command in commands for _, told in [command.communicate(timeout=120)]}
    assert sorted(said) == [0, 1], said
    assert f"a mesh named '{mesh.name}' is" in said[1]
    assert len(runners(mesh.name)) == 1 and mesh.status()["ready"]
