"""Workloads as they are written for clusters without a mesh: databases of several members, servers that speak first, odd Services.

Everything here runs with the defaults, as its manifest would say it anywhere; what a port speaks is said nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.cluster import images
from tests.cluster.conftest import Ground
from tests.cluster.kube import Object, Refused, Space, client, container, pod, pod_spec, service, until, workload
from tests.cluster.test_cluster_workloads import caller, identity

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MEMBERS = ("etcd-0", "etcd-1", "etcd-2")
CLIENT, PEER = 2379, 2380
QUOTA: Object = {
    "apiVersion": "v1",
    "kind": "ResourceQuota",
    "metadata": {"name": "share"},
    "spec": {"hard": {"requests.cpu": "2", "limits.memory": "2Gi"}},
}


def member() -> Object:
    """One of three that find one another by the names of their pods, and are ready when they have elected a leader."""
    me, listen = "$(NAME)", "http://0.0.0.0"
    peers = ",".join(f"{name}=http://{name}.etcd:{PEER}" for name in MEMBERS)
    words = {
        "name": me,
        "data-dir": "/data/etcd",
        "listen-peer-urls": f"{listen}:{PEER}",
        "listen-client-urls": f"{listen}:{CLIENT}",
        "initial-advertise-peer-urls": f"http://{me}.etcd:{PEER}",
        "advertise-client-urls": f"http://{me}.etcd:{CLIENT}",
        "initial-cluster": peers,
        "unsafe-no-fsync": "true",
    }
    return {
        "name": "etcd",
        "image": images.ETCD_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "args": [f"--{name}={value}" for name, value in words.items()],
        "env": [{"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        "ports": [{"name": "client", "containerPort": CLIENT}, {"name": "peer", "containerPort": PEER}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "client"}, "periodSeconds": 1, "timeoutSeconds": 5},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }


@pytest.fixture(scope="module")
def store(make_space: Callable[..., Space], ground: Ground) -> Space:
    """Everything of this file starts at once."""
    if ground.nodes is None:
        pytest.skip("the nodes of this cluster have no image of etcd")
    ground.nodes.load(images.etcd())
    made = make_space("store")
    spec = pod_spec(member(), volumes=[{"name": "data", "emptyDir": {}}])
    ports = [{"name": "client", "port": CLIENT}, {"name": "peer", "port": PEER}]
    made.apply(
        workload("StatefulSet", "etcd", spec, replicas=3, serviceName="etcd", podManagementPolicy="Parallel"),
        service("etcd", ports=ports, clusterIP="None", publishNotReadyAddresses=True),
        pod("talker", pod_spec(container("app", "serve", "--http", "8080", "--tcp", "2525"))),
        service(
            "talker",
            ports=[
                {"name": "mail", "port": 25000, "targetPort": 2525},
                {"name": "web", "port": 80, "targetPort": 8080, "appProtocol": "tcp"},
            ],
        ),
        failing_job(made),
        client(),
    )
    made.ready("talker", "client")
    return made


def failing_job(space: Space) -> Object:
    asks = container("app", "call", f"http://talker.{space.name}/", "--expect", "418")
    spec = pod_spec(asks, restartPolicy="Never")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "fails"},
        "spec": {"backoffLimit": 1, "template": {"spec": spec}},
    }


def ask(space: Space, name: str, path: str, body: Object) -> Object:
    """etcd's API in JSON, of one member, from the client's pod."""
    url = f"http://{name}.etcd:{CLIENT}/v3/{path}"
    fetch = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], sys.argv[2].encode(), 20).read().decode())"
    answer: Object = json.loads(space.exec("client", "python3", "-c", fetch, url, json.dumps(body)))
    return answer


def inbound(space: Space, name: str, port: int) -> set[str]:
    """How callers came to a port of a pod: values of the label ``tls``, by the connections that were opened."""
    opened = [series for series in space.metrics(name) if series.startswith("pillion_tcp_open_total{") and f'srv_port="{port}"' in series]
    return {series.partition('tls="')[2].partition('"')[0] for series in opened}


def test_three_members_of_etcd_elect_a_leader_and_agree_over_mutual_tls(store: Space) -> None:
    store.rolled_out("statefulset/etcd")
    for name in MEMBERS:  # the cluster's DNS may have said a moment ago that there is no such name
        assert store.call("client", f"http://{name}.etcd:{CLIENT}/health").get("status") == 200
    ask(store, "etcd-0", "kv/put", {"key": "a2V5", "value": "dmFsdWU="})
    for name in MEMBERS:
        found = ask(store, name, "kv/range", {"key": "a2V5"})["kvs"]
        assert [pair["value"] for pair in found] == ["dmFsdWU="], (name, found)
        assert inbound(store, name, PEER) == {"true"}


def test_a_server_that_speaks_first_is_heard_on_any_port(store: Space) -> None:
    """Its port is in no list; so is it with the port that its Service gives it."""
    heard = until("it has been heard", lambda: _greeted(store.app("client", "tcp", "talker", "25000", "--say", "hello")))
    assert heard["echo"] == "hello"
    assert inbound(store, "talker", 2525) == {"true"}


def _greeted(outcome: Object) -> Object | None:
    return outcome if outcome.get("greeting", "").startswith("220 talker") else None


def test_an_app_finds_its_pods_address_at_its_end_of_a_connection(store: Space) -> None:
    """By it Redis Sentinel and others tell where they are."""
    own = store.json("get", "pod", "client")["status"]["podIP"]
    address = store.json("get", "pod", "talker")["status"]["podIP"]
    for host, port in (("talker", "25000"), (address, "2525")):
        assert _greeted(found := store.app("client", "tcp", host, port)), found
        assert found["own"] == own


def test_http_behind_a_port_whose_app_protocol_is_tcp_is_answered(store: Space) -> None:
    assert caller(store.call("client", "http://talker/")) == identity(store)


def test_a_job_whose_pods_fail_ends_as_failed(store: Space) -> None:
    """Each sidecar ends with its app, and the exit code that counts is the app's."""

    def over() -> list[str]:
        return [each["type"] for each in store.json("get", "job", "fails")["status"].get("conditions", [])]

    until("the job has failed", lambda: "Failed" in over())
    assert store.json("get", "job", "fails")["status"]["failed"] == 2


def test_a_quota_is_met_by_what_the_namespace_says_of_its_sidecars(make_space: Callable[..., Space]) -> None:
    """A quota refuses every pod with a container that does not say what it takes; nothing has to run to see it."""
    space = make_space("quota")
    space.apply(QUOTA)
    until("the quota counts", lambda: space.json("get", "resourcequota", "share").get("status", {}).get("used"))
    wanted = {"requests": {"cpu": "100m"}, "limits": {"memory": "64Mi"}}
    tried = json.dumps(pod("tried", pod_spec(container(resources=wanted))))
    with pytest.raises(Refused, match=r"must specify limits\.memory for: pillion-proxy; requests\.cpu for: pillion-proxy"):
        space.run("create", "--dry-run=server", "-f", "-", input=tried)
    space.run("annotate", "namespace", space.name, "config.pillion.dev/cpu-request=50m", "config.pillion.dev/memory-limit=256Mi")
    until("the injector has seen it", lambda: _taken(space, tried))


def _taken(space: Space, tried: str) -> bool:
    try:
        return "pillion-proxy" in space.run("create", "--dry-run=server", "-o", "yaml", "-f", "-", input=tried)
    except Refused:
        return False
