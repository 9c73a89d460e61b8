"""What the leader makes of what replicas and the API server's pods say."""

from __future__ import annotations

import re

import pytest

from core.names import WorkloadId
from identity.bundle import Anchor, IssuerRef, TrustState
from identity.cluster.census import SETTLED_S, PodFact, Replica, merged, obstacles
from identity.cluster.pods import is_replica, pod_fact
from identity.ledger import Holding, Leaf

OLD, NEW = IssuerRef("old", "a1", 1e10), IssuerRef("new", "a2", 1e10)
ANCHORS = (Anchor("a1", b"1", 1, 1e10), Anchor("a2", b"2", 2, 1e10))
ADDED = TrustState(2, ANCHORS, OLD, NEW)
QUIET = TrustState(1, ANCHORS[:1], OLD)


def holding(instance: str, heard_at: float, generation: int = 2, issuer: str = "old") -> Holding:
    return Holding(
        instance, "spiffe://cluster.local/ns/shop/sa/cart", f"shop/{instance}", generation, (Leaf(issuer, "a1", 1000.0),), heard_at
    )


def replica(*holdings: Holding, name: str = "one", generation: int = 2, up_s: float = 100.0, error: str = "") -> Replica:
    return Replica(name, generation, "old", up_s, holdings, error)


def pod(uid: str, *, meshed: bool = True, running: bool = True) -> PodFact:
    return PodFact(uid, f"shop/{uid}", meshed, running)


def in_the_way(
    *replicas: Replica, pods: list[PodFact] | None = None, ignore_absent: bool = False, **more: tuple[str, ...]
) -> tuple[str, ...]:
    ledger = merged(replicas, pods)
    return obstacles(ADDED, replicas, ledger, pods, ignore_absent=ignore_absent, now=500.0, **more)


def test_of_two_replicas_the_one_that_heard_last_is_believed() -> None:
    ledger = merged([replica(holding("a", 10, 1)), replica(holding("a", 20, 2))], None)
    assert [found.generation for found in ledger.live(0)] == [2]
    ledger = merged([replica(holding("a", 30, 1)), replica(holding("a", 20, 2))], None)
    assert [found.generation for found in ledger.live(0)] == [1]


def test_a_pod_that_exists_no_more_does_not_count() -> None:
    ledger = merged([replica(holding("a", 10), holding("gone", 10))], [pod("a")])
    assert [found.instance for found in ledger.live(0)] == ["a"]


def test_nothing_is_in_the_way_when_all_replicas_are_current_and_every_pod_was_heard() -> None:
    assert in_the_way(replica(holding("a", 10)), replica(name="two"), pods=[pod("a"), pod("plain", meshed=False)]) == ()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        pytest.param(replica(name="two", generation=1), "has not picked up generation 2", id="lags"),
        pytest.param(replica(name="two", error="no answer"), r"cannot be asked \(no answer\)", id="silent"),
        pytest.param(replica(name="two", up_s=SETTLED_S - 1), "started 44 s ago", id="young"),
    ],
)
def test_a_replica_that_may_know_more_is_waited_for(other: Replica, expected: str) -> None:
    [found] = in_the_way(replica(), other, pods=[])
    assert re.search(f"replica two {expected}", found)


def test_a_meshed_pod_that_runs_unheard_is_waited_for_unless_the_absent_are_ignored() -> None:
    pods = [pod("silent"), pod("pending", running=False), pod("plain", meshed=False)]
    assert in_the_way(replica(), pods=pods) == ("shop/silent runs and has not been heard of by any replica",)
    assert in_the_way(replica(), pods=pods, ignore_absent=True) == ()


def test_namespaces_without_the_bundle_and_unknown_pods_are_waited_for() -> None:
    assert in_the_way(replica(), pods=[], unpublished=("shop",)) == ("namespace shop: its trust bundle is not written yet",)
    assert in_the_way(replica(), pods=None) == ("the pods of the cluster are not known",)


def test_without_a_rotation_nothing_is_in_the_way() -> None:
    assert obstacles(QUIET, [replica(error="away")], merged([], None), None, now=0.0) == ()


def api_pod(phase: str = "Running", audience: str = "identity.pillion.dev", account: str = "cart") -> dict[str, object]:
    token = {"serviceAccountToken": {"audience": audience, "path": "token"}}
    volumes = [{"name": "x"}, {"name": "token", "projected": {"sources": [{"configMap": {}}, token]}}]
    metadata = {"uid": "u", "name": "p", "namespace": "shop"}
    return {"metadata": metadata, "spec": {"volumes": volumes, "serviceAccountName": account}, "status": {"phase": phase}}


def test_a_pod_is_meshed_when_it_has_a_token_for_us() -> None:
    assert pod_fact(api_pod()) == PodFact("u", "shop/p", meshed=True, running=True)
    assert pod_fact(api_pod(phase="Pending")) == PodFact("u", "shop/p", meshed=True, running=False)
    assert pod_fact(api_pod(audience="vault")) == PodFact("u", "shop/p", meshed=False, running=True)
    assert pod_fact({"metadata": {"uid": "u"}, "spec": None}) == PodFact("u", "/", meshed=False, running=False)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended_is_no_pod(phase: str) -> None:
    assert pod_fact(api_pod(phase=phase)) is None


def test_a_replica_is_known_by_namespace_and_service_account() -> None:
    assert is_replica(api_pod(account="pillion-identity"), WorkloadId("cluster.local", "shop", "pillion-identity"))
    assert not is_replica(api_pod(account="pillion-identity"), WorkloadId("cluster.local", "pillion", "pillion-identity"))
