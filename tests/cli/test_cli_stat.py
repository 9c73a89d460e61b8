"""`pillion stat`: what two looks at the metrics of sidecars come to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import stat, traffic
from cli.main import cli
from cli.pods import ClusterMesh, FoundPod
from cli.traffic import Traffic
from local import client, protocol

IN = 'direction="inbound",client_id="spiffe://c/ns/shop/sa/web",srv_kind="server",srv_namespace="shop",srv_name="cart",srv_port="80"'
PLAIN = 'direction="inbound",client_id="",srv_kind="default",srv_name="deny",srv_port="80"'
ROUTE = f'{IN},route_kind="httproute",route_namespace="shop",route_name="basket"'
OUT = 'direction="outbound",server_id="x",dst_kind="service",dst_namespace="shop",dst_name="stock",dst_port="50051"'


def metrics(good: int, bad: int = 0, denied: int = 0, asked: int = 0, slow: int = 0) -> str:
    return f"""
# TYPE pillion_response_total counter
pillion_response_total{{{ROUTE},status_code="200",classification="success"}} {good}
pillion_response_total{{{IN},status_code="503",classification="failure"}} {bad}
pillion_response_total{{{OUT},status_code="200",classification="success"}} {asked}
# TYPE pillion_response_latency_ms histogram
pillion_response_latency_ms_bucket{{{ROUTE},le="1"}} 0
pillion_response_latency_ms_bucket{{{ROUTE},le="5"}} {good}
pillion_response_latency_ms_bucket{{{ROUTE},le="10"}} {good + slow}
pillion_response_latency_ms_bucket{{{ROUTE},le="+Inf"}} {good + slow}
# TYPE pillion_inbound_tcp_authz_deny_total counter
pillion_inbound_tcp_authz_deny_total{{{PLAIN}}} {denied}
# TYPE pillion_tcp_open_connections gauge
pillion_tcp_open_connections{{direction="inbound",client_id="spiffe://c/ns/shop/sa/web",srv_port="80"}} 3
pillion_tcp_open_connections{{direction="outbound",dst_kind="service",dst_namespace="shop",dst_name="stock",dst_port="50051"}} 2
"""


def between(first: str, second: str, by: traffic.Group | None = None) -> dict[str, Traffic]:
    groups: dict[str, Traffic] = {}
    traffic.add(groups, traffic.read(first), traffic.read(second), 10.0, by)
    return groups


def test_rates_and_shares_are_of_the_time_between_the_looks() -> None:
    found = between(metrics(100, 5, 1), metrics(190, 15, 21, asked=70))[""]
    assert (found.rate, found.denied, found.success, found.connections) == (10.0, 2.0, 0.9, 3)


@pytest.mark.parametrize(
    ("said", "instead"),
    [("} 3", "} NaN"), ("} 3", "} +Inf"), ('le="5"', 'le="NaN"'), ('le="5"', 'le="five"'), ('le="5"', 'at="5"')],
)
def test_metrics_that_no_sidecar_has_are_refused_as_a_whole(said: str, instead: str) -> None:
    assert said in metrics(1)
    with pytest.raises(ValueError, match=r"no number|convert string to float"):
        traffic.read(metrics(1).replace(said, instead))


def test_a_count_that_began_anew_counts_from_nothing() -> None:
    assert between(metrics(100), metrics(30))[""].rate == 3.0


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("client", ["spiffe://c/ns/shop/sa/web", "without identity"]),
        ("route", ["default deny", "httproute shop/basket", "server shop/cart"]),
        ("destination", ["service shop/stock:50051"]),
    ],
)
def test_traffic_is_told_apart_by_who_asks_what_is_asked_for_and_of_whom(by: traffic.Group, names: list[str]) -> None:
    found = between(metrics(0), metrics(10, 20, 30, 40), by)
    assert sorted(found) == names
    rates = {"client": [3.0, 0.0], "route": [0.0, 1.0, 2.0], "destination": [4.0]}
    assert [found[name].rate for name in names] == rates[by]


def test_quantiles_lie_within_their_bucket() -> None:
    found = between(metrics(0), metrics(80, slow=20))[""]
    assert (found.quantile(0.5), found.quantile(0.9)) == (3.5, 7.5)
    assert Traffic(buckets={5.0: 1.0, math.inf: 10.0}).quantile(0.99) == 5.0
    assert Traffic(buckets={5.0: 0.0, math.inf: 0.0}).quantile(0.5) is None is Traffic().quantile(0.5)
    assert Traffic().success is None


class Sidecars:
    """Stands for the runner: each sidecar gives its next answer to each look; None is one that does not answer."""

    def __init__(self) -> None:
        self.answers: dict[str, list[str | None]] = {"cart-1": [metrics(0), metrics(5)], "cart-2": [metrics(0), metrics(15, denied=10)]}
        self.pods = (self._pod("cart-1"), self._pod("cart-2"), self._pod("done-1", "Succeeded"), self._pod("old-1", meshed=False))

    def _pod(self, name: str, phase: str = "Running", *, meshed: bool = True) -> protocol.PodStatus:
        owner = f"Deployment/{name.partition('-')[0]}"
        return protocol.PodStatus("shop", name, owner, phase, True, meshed, "", "", ("10.0.0.1",), ())

    def ask(self, name: str, request: protocol.Request, fds: tuple[int, ...] = ()) -> protocol.Answer:
        if isinstance(request, protocol.Status):
            return protocol.MeshStatus("default", True, True, (), (), self.pods, (), {}, 1, "/run")
        assert isinstance(request, protocol.Exec)
        answer = self.answers[request.pod].pop(0)
        os.write(fds[1], b"200\n" + (answer or "").encode())
        return protocol.Exited(1 if answer is None else 0)


@pytest.fixture
def sidecars(monkeypatch: pytest.MonkeyPatch) -> Sidecars:
    """Between the looks ten seconds go by for each of them."""
    found, clock = Sidecars(), [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(client, "ask", found.ask)
    monkeypatch.setattr(stat, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    return found


@pytest.fixture
def run(sidecars: Sidecars) -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(cli, ["stat", "-n", "shop", "--name", "default", "--window", "10", *words])


def test_pods_of_a_workload_are_one_line(run: Callable[..., Result]) -> None:
    shown = run()
    assert shown.exit_code == 0, shown.output
    header, line = shown.stdout.splitlines()
    assert header.split() == ["WORKLOAD", "PODS", "SUCCESS", "RPS", "DENIED", "P50", "P95", "P99", "CONNECTIONS"]
    assert line.split() == ["deployment/cart", "2", "100.00%", "2.0", "1.0", "3ms", "5ms", "5ms", "6"]


def test_json_has_numbers_and_nulls(run: Callable[..., Result]) -> None:
    shown = json.loads(run("cart", "--by", "route", "-o", "json").stdout)
    assert [(row["workload"], row["route"], row["pods"], row["requests_per_second"], row["success"]) for row in shown] == [
        ("cart", "default deny", 2, 0.0, None),
        ("cart", "httproute shop/basket", 2, 2.0, 1.0),
        ("cart", "server shop/cart", 2, 0.0, None),
    ]
    assert shown[1]["latency_ms"]["p50"] == 3.0 and shown[0]["latency_ms"]["p50"] is None


def test_a_sidecar_that_does_not_answer_is_named_and_the_others_count(run: Callable[..., Result], sidecars: Sidecars) -> None:
    sidecars.answers["cart-1"][1] = None
    shown = run()
    assert shown.exit_code == 0 and "deployment/cart  1 " in shown.stdout
    assert "left out: the sidecar of shop/cart-1 does not answer" in shown.stderr
    sidecars.answers = {"cart-1": [None, None], "cart-2": [None, "what is this {"]}
    shown = run()
    assert shown.exit_code == 1 and "error: no sidecar answered\n  try: pillion check" in shown.stderr


def test_a_namespace_without_anything_meshed_is_told_with_those_that_have(sidecars: Sidecars) -> None:
    shown = CliRunner().invoke(cli, ["stat", "--name", "default"])
    assert shown.exit_code == 1
    assert shown.stderr == "error: nothing in namespace default is meshed and runs\n  try: -n with one of: shop\n"


def cluster_pod(name: str, owner: tuple[str, str] | None, *, phase: str = "Running", ends: bool = False, meshed: bool = True) -> Any:
    owners = [SimpleNamespace(kind=owner[0], name=owner[1], controller=True)] if owner else None
    labels = {"pod-template-hash": "abc"} if owner and owner[1].endswith("-abc") else None
    return SimpleNamespace(
        metadata=SimpleNamespace(name=name, owner_references=owners, labels=labels, deletion_timestamp="now" if ends else None),
        spec=SimpleNamespace(containers=[SimpleNamespace(name="pillion-proxy" if meshed else "app")], init_containers=None),
        status=SimpleNamespace(phase=phase),
    )


def test_on_a_cluster_pods_are_found_by_what_people_call_their_workload() -> None:
    pods = [
        cluster_pod("cart-abc-1", ("ReplicaSet", "cart-abc")),
        cluster_pod("cart-abc-2", ("ReplicaSet", "cart-abc")),
        cluster_pod("alone-1", ("ReplicaSet", "alone")),
        cluster_pod("db-0", ("StatefulSet", "db")),
        cluster_pod("shell", None),
        cluster_pod("cart-abc-3", ("ReplicaSet", "cart-abc"), ends=True),
        cluster_pod("job-1", ("Job", "job"), phase="Succeeded"),
        cluster_pod("plain", None, meshed=False),
    ]
    mesh = object.__new__(ClusterMesh)
    mesh._core = SimpleNamespace(list_namespaced_pod=lambda namespace: SimpleNamespace(items=pods))
    assert mesh.workloads("shop") == {
        "deployment/cart": [FoundPod("shop", "cart-abc-1"), FoundPod("shop", "cart-abc-2")],
        "replicaset/alone": [FoundPod("shop", "alone-1")],
        "statefulset/db": [FoundPod("shop", "db-0")],
        "pod/shell": [FoundPod("shop", "shell")],
    }
