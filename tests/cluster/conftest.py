"""One cluster for the session, with Pillion installed by the commands of the README; a namespace for each test.

Without KUBECONFIG a cluster is made on this machine (nodes.py) and gone afterwards; PILLION_KEEP=1 leaves it. With KUBECONFIG the tests run
on that one, whose nodes must be able to get the images named by --image and --agent-image, and have the tests' own (images.APP_IMAGE).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import kit
from tests.cluster.kube import AGENTS, CONTROL_PLANE, Kube, Refused, Space, until
from tests.cluster.nodes import Cluster

STATE = Path("/run/pillion-test-cluster")
PILLION = [sys.executable, "-m", "cli.main"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cluster", "tests on a Kubernetes cluster")
    group.addoption("--image", help="Pillion's image on the cluster of KUBECONFIG")
    group.addoption("--agent-image", help="the agent's image there")


@pytest.fixture(scope="session", autouse=True)
def _progress(pytestconfig: pytest.Config) -> None:
    """What the cluster says about itself is shown while tests run, although pytest captures what tests print."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    plain = kit.say

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            plain(text)

    kit.say = say


@dataclass(frozen=True)
class Ground:
    """The cluster under the tests; ``nodes`` is None where somebody else made it and its machines are out of reach. stays: after us."""

    kube: Kube
    image: str
    agent_image: str
    nodes: Cluster | None
    stays: bool

    def install(self, *settings: str) -> str:
        """The manifests of an installation, as `pillion install` prints them."""
        command = [*PILLION, "install", "--image", self.image, "--agent-image", self.agent_image, *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def ground(pytestconfig: pytest.Config) -> Iterator[Ground]:
    from tools import image

    kubeconfig = os.environ.get("KUBECONFIG", "")
    names = (
        pytestconfig.getoption("--image", None) or image.image(),
        pytestconfig.getoption("--agent-image", None) or image.image(agent=True),
    )
    if kubeconfig:
        kubectl = shutil.which("kubectl") or str(kit.have("kubernetes") / "kubectl")
        state = Path(kubeconfig).parent / "state"
        yield Ground(Kube(kubectl, kubeconfig), *names, Cluster.opened(state) or Cluster.opened(Path(kubeconfig).parent), stays=True)
        return
    from tests.cluster.__main__ import bring_up

    made = Cluster(STATE, "ptest", 2, "10.97.0")
    stays = bool(os.environ.get("PILLION_KEEP"))
    try:
        bring_up(made)
        yield Ground(Kube(str(made.binaries / "kubectl"), str(made.kubeconfig)), *names, made, stays)
    finally:
        if not stays:
            made.down()


@pytest.fixture(scope="session")
def kube(ground: Ground) -> Kube:
    return ground.kube


@pytest.fixture(scope="session")
def mesh(ground: Ground) -> Space:
    """Pillion, installed and up: the namespace of its control plane."""
    started = time.monotonic()
    ground.kube.apply(ground.install())
    pillion = Space(ground.kube, "pillion")
    pillion.rolled_out(*CONTROL_PLANE, AGENTS)
    kit.say(f"Pillion is up {time.monotonic() - started:.0f} s after `pillion install | kubectl apply`")
    return pillion


_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def make_space(kube: Kube, mesh: Space) -> Iterator[Callable[..., Space]]:
    """Namespaces of one file: ``make_space("name", annotations, labels)``; deleted at its end, or their probes slow the rest."""
    made: list[str] = []

    def make(name: str, annotations: dict[str, str] | None = None, labels: dict[str, str] | None = None) -> Space:
        full = f"{name}-{os.getpid() % 10000}-{next(_NUMBERS)}"
        wanted = {"pillion.dev/inject": "enabled"} if annotations is None else annotations
        kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": full, "annotations": wanted, "labels": labels or {}}})
        made.append(full)
        found = Space(kube, full)
        until("the namespace's service account", lambda: found.json("get", "serviceaccounts")["items"])  # bare pods need it to be there
        return found

    yield make
    for name in made:
        try:
            kube.run("delete", "namespace", name, "--wait=false")
        except Refused:  # the cluster may be broken by then; what failed has been reported
            break


@pytest.fixture
def space(make_space: Callable[..., Space], request: pytest.FixtureRequest) -> Space:
    """A namespace of this test alone, annotated for injection."""
    return make_space(request.node.name.removeprefix("test_").replace("_", "-").split("[")[0][:30].strip("-"))
