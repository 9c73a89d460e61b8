"""From the previous commit's installation to this one's, with running traffic: not one request fails, and old and new sidecars talk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import PILLION, Ground
from tests.cluster.kube import AGENTS, CONTROL_PLANE, Space, lingering, pod, pod_spec, service, until, workload
from tests.cluster.test_cluster_workloads import caller, identity
from tools import image

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

OLD, OLD_AGENT = "localhost/pillion:previous", "localhost/pillion-agent:previous"


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    """The tree of the commit before this one: what changed in the work tree, if anything did, else in the last commit."""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *image.CODE], cwd=image.ROOT, check=False).returncode
    commit = "HEAD" if changed else "HEAD~1"
    done = subprocess.run(["git", "archive", commit, *image.CODE, "setup.cfg", "LICENSE"], cwd=image.ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"the previous commit is not here: {done.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", tmp_path], input=done.stdout, check=True)
    return tmp_path


@pytest.fixture
def old_images(ground: Ground, previous: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    if ground.nodes is None:
        pytest.skip("the machines of this cluster are out of reach, and with them its images")
    layer = image.code_layer(previous)
    archive = tmp_path_factory.mktemp("old") / "old.tar"
    for of_agent, name in ((False, OLD), (True, OLD_AGENT)):
        image.derive(archive, name, image.layout(of_agent), layer, {}, replace=True)
        ground.nodes.load(archive)


def printed(command: list[str], folder: Path) -> str:
    """What the `pillion` of the code in ``folder`` prints."""
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def version(space: Space, app: str) -> set[str]:
    """Images of the sidecars of an app's pods."""
    pods = space.pods(f"app={app}")
    return {each["image"] for pod in pods for each in pod["spec"]["initContainers"] if each["name"] == "pillion-proxy"}


def _injectors(mesh: Space) -> set[str]:
    """Images of the injector's pods, ending ones included: they may still be asked."""
    pods = mesh.json("get", "pods", "--selector=app.kubernetes.io/component=injector")["items"]
    return {container["image"] for pod in pods for container in pod["spec"]["containers"]}


def test_an_upgrade_from_the_previous_commit_fails_no_request(
    ground: Ground, mesh: Space, space: Space, previous: Path, old_images: None
) -> None:
    old = [sys.executable, "-m", "cli.main", "install", "--image", OLD, "--agent-image", OLD_AGENT]
    try:
        ground.kube.apply(printed(old, previous))
        mesh.rolled_out(*CONTROL_PLANE, AGENTS)
        until("only the old injector is there", lambda: _injectors(mesh) == {OLD})
        space.apply(workload("Deployment", "web", pod_spec(lingering()), replicas=2), service("web"), pod("client"))
        space.rolled_out("deployment/web")
        space.ready("client")
        assert version(space, "web") == {OLD}
        with (
            space.load("client", "http://web/", "--workers=2") as kept,
            space.load("client", "http://web/", "--fresh", "--pause=50") as fresh,
        ):
            new = [*PILLION, "upgrade", "--image", ground.image, "--agent-image", ground.agent_image]
            ground.kube.apply(printed([*new, "--kubeconfig", ground.kube.kubeconfig], image.ROOT))
            mesh.rolled_out(*CONTROL_PLANE, AGENTS)
            until("the old injector is gone", lambda: _injectors(mesh) == {ground.image})
            space.run("rollout", "restart", "deployment/web")
            space.rolled_out("deployment/web")
        for load in (kept, fresh):
            assert load.calls > 20 and not load.failed, (load.calls, load.failed, load.failures)
        assert version(space, "web") == {ground.image} and version(space, "client") == {OLD}
        assert caller(space.call("client", "http://web/")) == identity(space)
    finally:
        ground.kube.apply(ground.install())
        mesh.rolled_out(*CONTROL_PLANE, AGENTS)
