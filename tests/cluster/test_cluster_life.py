"""Whatever is restarted, drained or away, running traffic goes on: every test holds a load and counts its failures.

The load's server is not ready for some seconds before it ends, as an app does that lets its callers go elsewhere: longer than a single
policy controller needs to come back when it is drained from the same node.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.cluster.conftest import Ground
from tests.cluster.kube import (
    AGENTS,
    COMPONENTS,
    CONTROL_PLANE,
    Load,
    Space,
    client,
    container,
    lingering,
    pod,
    pod_spec,
    service,
    until,
    workload,
)
from tests.cluster.nodes import Cluster
from tests.cluster.test_cluster_workloads import caller, identity
from tests.cluster.whole import no_api_server, restart_kubelet, whole

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

AWAY_S = float(os.environ.get("PILLION_AWAY", "10"))
"""How long the API server is away in its test. 600 is what is promised, and too long for every run: clients of Kubernetes ask at
intervals that double, with as much again by chance, so that it takes them about as long to hear that it is back, one after the other.
That nobody leads once a lease is over, and somebody does again, is tests/identity/test_identity_cluster.py's.
"""


@pytest.fixture(scope="module")
def life(make_space: Callable[..., Space]) -> Space:
    """``web``, a replica on each node where there are two, and the client that loads it, on the first node.

    Those that end in a rolling restart do not count for the spread, nor does a node that is drained.
    """
    made = make_space("life")
    spread = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"app": "web"}},
            "matchLabelKeys": ["pod-template-hash"],
            "nodeTaintsPolicy": "Honor",
        }
    ]
    made.apply(workload("Deployment", "web", pod_spec(lingering(), topologySpreadConstraints=spread), replicas=2), service("web"))
    made.apply(
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": "web"},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}},
        }
    )
    first = made.kube.json("get", "nodes")["items"][0]["metadata"]["name"]
    made.apply(pod("client", pod_spec(container("app", "serve", "--http", "8080"), nodeName=first)))
    made.rolled_out("deployment/web")
    made.ready("client")
    return made


@contextmanager
def nothing_fails(space: Space) -> Iterator[None]:
    """Kept connections and a new one for each request, from before the body to after it; not one request may fail.

    The Service is dialled by its address: the cluster's DNS is restarted and drained as well, and is not what is tested.
    """
    url = f"http://{space.json('get', 'service', 'web')['spec']['clusterIP']}/"
    with ExitStack() as stack:
        loads = [stack.enter_context(space.load("client", url, "--workers=2", *more)) for more in ((), ("--fresh", "--pause=50"))]
        time.sleep(1)
        yield
        time.sleep(1)
    _check(loads)


def _check(loads: list[Load]) -> None:
    for load in loads:
        assert load.calls > 20, "the load has hardly asked anything"
        assert not load.failed, (load.calls, load.failed, load.failures)


def test_a_rolling_restart_of_the_server_fails_no_request(life: Space) -> None:
    with nothing_fails(life):
        life.run("rollout", "restart", "deployment/web")
        life.rolled_out("deployment/web")
        until("the old pods are gone", lambda: len(life.json("get", "pods", "--selector=app=web")["items"]) == 2)


@pytest.mark.parametrize("component", [*CONTROL_PLANE, AGENTS])
def test_a_restart_of_a_component_fails_no_request_and_pods_go_on_joining(life: Space, mesh: Space, component: str) -> None:
    with nothing_fails(life):
        mesh.run("rollout", "restart", component)
        mesh.rolled_out(component)
    name = "after-" + component.rpartition("-")[2]
    life.apply(client(name))
    life.ready(name)
    assert caller(life.call(name, "http://web/")) == identity(life)
    life.run("delete", "pod", name, "--wait=false")


def test_the_loss_of_the_whole_control_plane_fails_no_request(life: Space, mesh: Space) -> None:
    replicas = {name: mesh.json("get", name)["spec"]["replicas"] for name in CONTROL_PLANE}
    try:
        with nothing_fails(life):
            mesh.run("scale", "--replicas=0", *CONTROL_PLANE)
            gone = f"--selector=app.kubernetes.io/component in ({', '.join(COMPONENTS)})"
            until("it is gone", lambda: not mesh.json("get", "pods", gone)["items"])
            time.sleep(5)
    finally:
        for name, count in replicas.items():
            mesh.run("scale", f"--replicas={count}", name)
        mesh.rolled_out(*CONTROL_PLANE)


@pytest.fixture(scope="module")
def machines(ground: Ground) -> Cluster:
    if ground.nodes is None:
        pytest.skip("the machines of this cluster are out of reach")
    return ground.nodes


@pytest.fixture
def recovered(life: Space, mesh: Space) -> Iterator[None]:
    """The tests after this one find the cluster as this one did, also when it fails."""
    yield
    whole(life, mesh)


def test_restarts_of_the_kubelets_one_after_the_other_fail_no_request(life: Space, machines: Cluster, recovered: None) -> None:
    """One after the other, because a kubelet of this version calls its pods not ready until it has probed them again."""
    if len(machines.nodes) < 2:
        pytest.skip("needs two nodes")
    assert len({each["spec"]["nodeName"] for each in life.pods("app=web")}) == 2
    with nothing_fails(life):
        for number in range(len(machines.nodes)):
            restart_kubelet(machines, number, life)


def test_a_drained_node_fails_no_request(life: Space, mesh: Space, machines: Cluster, recovered: None) -> None:
    if len(machines.nodes) < 2:
        pytest.skip("needs two nodes")
    node = "node2"
    try:
        with nothing_fails(life):
            life.kube.run("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=150s", timeout=160)
            until("web has moved", lambda: {each["spec"]["nodeName"] for each in life.pods("app=web")} == {"node1"})
            life.rolled_out("deployment/web")
    finally:
        life.kube.run("uncordon", node)


def test_an_absent_api_server_fails_no_request(life: Space, mesh: Space, machines: Cluster) -> None:
    """Neither while it is away nor while everybody learns that it is back."""
    with nothing_fails(life):
        with no_api_server(machines):
            time.sleep(AWAY_S)
        whole(life, mesh)
    life.apply(client("afterwards"))
    life.ready("afterwards")
    assert caller(life.call("afterwards", "http://web/")) == identity(life)
