"""`pillion install --ha` on real nodes: replicas apart, one leads, and the loss of one of each stops nobody from joining.

Two replicas instead of three, because the cluster made here has two nodes and replicas never share one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.conftest import Ground
from tests.cluster.kube import AGENTS, COMPONENTS, CONTROL_PLANE, Kube, Space, client, container, pod_spec, service, until, workload
from tests.cluster.test_cluster_install import checked
from tests.cluster.test_cluster_workloads import caller, identity
from tests.cluster.whole import is_ready

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def spread(ground: Ground, mesh: Space) -> Iterator[Space]:
    """The control plane with two replicas of everything; afterwards as it was."""
    if len(ground.kube.json("get", "nodes")["items"]) < 2:
        pytest.skip("needs two nodes")
    try:
        _without_control_plane(mesh)
        ground.kube.apply(ground.install("--ha", *(f"--set={name}.replicas=2" for name in COMPONENTS)))
        mesh.rolled_out(*CONTROL_PLANE)
        yield mesh
    finally:
        mesh.run("delete", "poddisruptionbudgets", "--all")
        _without_control_plane(mesh)
        ground.kube.apply(ground.install())
        mesh.rolled_out(*CONTROL_PLANE, AGENTS)


def _without_control_plane(mesh: Space) -> None:
    """A pod that parting ones keep away from their nodes may be looked at again only after half a minute, or five."""
    mesh.run("delete", "--ignore-not-found", *CONTROL_PLANE)
    selector = f"--selector=app.kubernetes.io/component in ({', '.join(COMPONENTS)})"
    until("its pods have ended", lambda: not mesh.json("get", "pods", selector)["items"])


@pytest.fixture(scope="module")
def shop(make_space: object, spread: Space) -> Space:
    made: Space = make_space("ha")  # type: ignore[operator]
    made.apply(workload("Deployment", "web", pod_spec(container()), replicas=2), service("web"), client())
    made.rolled_out("deployment/web")
    made.ready("client")
    return made


def _replicas(mesh: Space, component: str) -> dict[str, str]:
    """Names of a component's ready pods, and their nodes."""
    return {
        pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in mesh.pods(f"app.kubernetes.io/component={component}") if is_ready(pod)
    }


def _leader(mesh: Space, component: str) -> str:
    return str(mesh.json("get", "lease", f"pillion-{component}")["spec"].get("holderIdentity") or "")


@pytest.mark.parametrize("component", COMPONENTS)
def test_replicas_are_on_different_nodes_and_one_at_a_time_may_be_evicted(spread: Space, component: str) -> None:
    assert sorted(_replicas(spread, component).values()) == ["node1", "node2"]
    until(
        "the budget has seen both",
        lambda: spread.json("get", "poddisruptionbudget", f"pillion-{component}")["status"]["disruptionsAllowed"] == 1,
    )


def test_check_finds_nothing_wrong_with_it(spread: Space, kube: Kube) -> None:
    code, rows = checked(kube, "--wait", "60")
    assert code == 0, [row for row in rows.values() if row.get("result") == "error"]


@pytest.mark.parametrize("component", ["identity", "policy"])
def test_another_replica_leads_when_the_leader_dies(spread: Space, component: str) -> None:
    leader = until("somebody leads", lambda: _leader(spread, component))
    assert leader in _replicas(spread, component)
    spread.run("delete", "pod", leader, "--grace-period=0", "--force")
    heir = until("another one leads", lambda: (found := _leader(spread, component)) != leader and found)
    assert heir.startswith(f"pillion-{component}-")
    spread.rolled_out(f"deployment/pillion-{component}")


def test_pods_join_while_one_of_each_is_lost_and_no_request_fails(spread: Space, shop: Space) -> None:
    """The webhook's failurePolicy is Fail with `--ha`: without an injector that answers no pod would be created at all."""
    for component in COMPONENTS:
        until(f"both replicas of {component} are ready", lambda component=component: len(_replicas(spread, component)) == 2)  # type: ignore[misc]
    with shop.load("client", "http://web/", "--fresh", "--pause=50") as load:
        lost = [sorted(_replicas(spread, component))[0] for component in COMPONENTS]
        spread.run("delete", "pod", *lost, "--wait=false")
        shop.apply(client("joins"))
        shop.ready("joins")
        assert caller(shop.call("joins", "http://web/")) == identity(shop)
        spread.rolled_out(*CONTROL_PLANE)
    assert load.calls > 20 and not load.failed, (load.calls, load.failed, load.failures)
