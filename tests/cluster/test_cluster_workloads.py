"""Every kind of workload gets its sidecar, starts, is called over mutual TLS, and ends as it would without the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.kube import OUTSIDE, Object, Space, client, container, pod, pod_spec, service, until, workload

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
HARDENED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@pytest.fixture(scope="module")
def shop(make_space: Callable[..., Space]) -> Space:
    """A meshed namespace with a server ``web`` (two replicas) and a pod ``client``, shared by tests that only call."""
    made = make_space("shop")
    made.apply(workload("Deployment", "web", replicas=2), service("web"), client())
    made.rolled_out("deployment/web")
    made.ready("client")
    return made


def injected(pod: Object) -> bool:
    return any(each["name"] == "pillion-proxy" for each in pod["spec"].get("initContainers", []) + pod["spec"]["containers"])


def caller(answered: Object) -> str:
    """Whom the sidecar of the called pod says it was called by; the failure shows the whole answer."""
    assert answered.get("status") == 200, answered
    return str(answered["body"]["headers"].get("pillion-client-id", ""))


def identity(space: Space, account: str = "default") -> str:
    return f"spiffe://cluster.local/ns/{space.name}/sa/{account}"


def finished(space: Space, job: str) -> Any:
    status = space.json("get", "job", job)["status"]
    assert not status.get("failed"), (status, space.story())
    return status.get("succeeded")


def calls_web(shop: Space, **more: Any) -> Object:
    """A container that ends well when the meshed Service has answered it, by an identity or not at all."""
    return container("app", "call", f"http://web.{shop.name}/once", "--expect", "200", **more)


def test_a_deployment_is_called_by_its_service_name(shop: Space) -> None:
    answered = shop.call("client", "http://web/hello")
    assert caller(answered) == identity(shop)
    assert answered["body"]["path"] == "/hello"
    assert all(injected(pod) for pod in shop.pods("app=web"))


def test_the_app_sees_the_real_address_of_its_caller_and_its_own(shop: Space) -> None:
    answered = shop.call("client", "http://web/")["body"]
    pods = {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in shop.pods()}
    assert answered["peer"] == pods["client"]
    assert answered["local"] == [pods[answered["pod"]], 8080]


def test_a_stateful_set_is_called_by_the_names_of_its_pods(shop: Space) -> None:
    shop.apply(
        workload("StatefulSet", "db", replicas=2, serviceName="db", podManagementPolicy="Parallel"), service("db", 8080, clusterIP="None")
    )
    shop.rolled_out("statefulset/db")
    for name in ("db-0", "db-1"):
        answered = until(f"{name} has a name", lambda name=name: _ok(shop.call("client", f"http://{name}.db:8080/")))
        assert answered["body"]["pod"] == name
        assert caller(answered) == identity(shop)


def _ok(answered: Object) -> Object | None:
    return answered if answered.get("status") == 200 else None


def test_a_job_calls_a_service_and_ends_by_itself(shop: Space) -> None:
    shop.apply(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "once"},
            "spec": {"backoffLimit": 0, "template": {"spec": pod_spec(calls_web(shop), restartPolicy="Never")}},
        }
    )
    until("the job has ended", lambda: finished(shop, "once"))


def test_a_job_of_a_cron_job_ends_by_itself(shop: Space) -> None:
    template = {"spec": {"backoffLimit": 0, "template": {"spec": pod_spec(calls_web(shop), restartPolicy="Never")}}}
    shop.apply(
        {
            "apiVersion": "batch/v1",
            "kind": "CronJob",
            "metadata": {"name": "nightly"},
            "spec": {"schedule": "0 3 * * *", "jobTemplate": template},
        }
    )
    shop.run("delete", "job", "tonight", "--ignore-not-found")  # of an earlier try of this test
    shop.run("create", "job", "tonight", "--from=cronjob/nightly")
    until("the job has ended", lambda: finished(shop, "tonight"))


def test_a_daemon_set_has_a_meshed_pod_on_every_node(shop: Space) -> None:
    shop.apply(workload("DaemonSet", "everywhere", replicas=None), service("everywhere"))
    shop.rolled_out("daemonset/everywhere")
    pods = shop.pods("app=everywhere")
    assert len({pod["spec"]["nodeName"] for pod in pods}) == len(shop.kube.json("get", "nodes")["items"])
    assert all(injected(pod) for pod in pods)
    assert caller(shop.call("client", "http://everywhere/")) == identity(shop)


def test_a_bare_pod_joins_and_has_the_identity_of_its_service_account(shop: Space) -> None:
    shop.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "guest"}})
    shop.apply(pod("bare", pod_spec(serviceAccountName="guest")))
    shop.ready("bare")
    assert caller(shop.call("bare", "http://web/")) == identity(shop, "guest")


def test_an_init_container_calls_a_meshed_service(shop: Space) -> None:
    shop.apply(pod("prepared", pod_spec(initContainers=[calls_web(shop, name="asks")])))
    shop.ready("prepared")
    assert '"status": 200' in shop.run("logs", "prepared", "-c", "asks")
    assert identity(shop) in shop.run("logs", "prepared", "-c", "asks")


def test_two_containers_and_named_ports_of_a_service(shop: Space) -> None:
    front = container("app", "serve", "--http", "8080", ports=[{"name": "front", "containerPort": 8080}])
    back = container(
        "back", "serve", "--http", "8081,8082", ports=[{"name": "back", "containerPort": 8081}, {"name": "admin", "containerPort": 8082}]
    )
    shop.apply(pod("pair", pod_spec(front, back)))
    ports = [{"name": name, "port": port, "targetPort": name} for name, port in (("front", 80), ("back", 81), ("admin", 82))]
    shop.apply(service("pair", ports=ports))
    shop.ready("pair")
    seen = {port: shop.call("client", f"http://pair:{port}/") for port in (80, 81, 82)}
    assert {port: answered["body"]["local"][1] for port, answered in seen.items()} == {80: 8080, 81: 8081, 82: 8082}
    assert {caller(answered) for answered in seen.values()} == {identity(shop)}


def test_a_pod_of_another_user_with_a_read_only_root_runs(shop: Space) -> None:
    strict = {"readOnlyRootFilesystem": True, "runAsUser": 4711, "runAsGroup": 4711}
    shop.apply(pod("strict", pod_spec(container(securityContext=strict))))
    shop.ready("strict")
    assert caller(shop.call("strict", "http://web/")) == identity(shop)


def test_the_sidecar_passes_the_restricted_pod_security_level(make_space: Callable[..., Space], shop: Space) -> None:
    vault = make_space("vault", labels=RESTRICTED)
    vault.apply(pod("safe", pod_spec(container(securityContext=HARDENED))))
    vault.ready("safe")
    assert caller(vault.call("safe", f"http://web.{shop.name}/")) == identity(vault)


def test_an_opted_out_pod_and_a_pod_in_the_hosts_network_stay_outside(shop: Space) -> None:
    shop.apply(client("stranger", annotations=OUTSIDE))
    shop.apply(pod("hosted", pod_spec(container("app", "serve", "--http", "18080"), hostNetwork=True, dnsPolicy="ClusterFirstWithHostNet")))
    shop.ready("stranger", "hosted")
    assert not injected(shop.json("get", "pod", "stranger"))
    assert not injected(shop.json("get", "pod", "hosted"))
    assert caller(shop.answered("stranger", "http://web/")) == ""


@pytest.fixture(scope="module")
def guarded(make_space: Callable[..., Space]) -> Space:
    """Only meshed callers, by default; one pod whose four containers are probed in the four ways."""
    made = make_space("guarded", {"pillion.dev/inject": "enabled", "config.pillion.dev/default-inbound-policy": "all-authenticated"})
    quick = {"periodSeconds": 1, "failureThreshold": 30}
    http = container("app", "serve", "--http", "8080", readinessProbe={"httpGet": {"path": "/ready", "port": 8080}, **quick})
    tcp = container("tcp", "serve", "--http", "", "--tcp", "9000", readinessProbe={"tcpSocket": {"port": 9000}, **quick})
    command = container("exec", "serve", "--http", "8081", readinessProbe={"exec": {"command": ["python3", "-c", "pass"]}, **quick})
    grpc = container("grpc", "serve", "--http", "", "--grpc", "9090", readinessProbe={"grpc": {"port": 9090}, **quick})
    made.apply(pod("probed", pod_spec(http, tcp, command, grpc)), client("stranger", annotations=OUTSIDE), client())
    made.ready("probed", "stranger", "client")
    return made


def test_pods_become_ready_by_probes_of_every_kind_through_the_sidecar(guarded: Space) -> None:
    shown = guarded.json("get", "pod", "probed")
    probes = {each["name"]: each["readinessProbe"] for each in shown["spec"]["containers"]}
    assert [probes[name]["httpGet"]["port"] for name in ("app", "tcp", "grpc")] == [4191] * 3
    assert "exec" in probes["exec"]
    assert all(status["ready"] for status in shown["status"]["containerStatuses"])


def test_a_probes_path_stays_closed_to_callers_outside_the_mesh(guarded: Space) -> None:
    address = guarded.pod("app=probed")["status"]["podIP"]
    assert guarded.call("stranger", f"http://{address}:8080/ready").get("status") == 403
    assert guarded.call("client", f"http://{address}:8080/ready").get("status") == 200


def test_a_failing_probe_makes_the_pod_unready(guarded: Space) -> None:
    guarded.apply(
        pod(
            "sick",
            pod_spec(container("app", "serve", readinessProbe={"httpGet": {"path": "/status/503", "port": 8080}, "periodSeconds": 1})),
        )
    )
    until("its app runs", lambda: (guarded.pod("app=sick")["status"].get("containerStatuses") or [{}])[0].get("state", {}).get("running"))
    events = until(
        "the kubelet says why",
        lambda: guarded.run("get", "events", "--field-selector=involvedObject.name=sick,reason=Unhealthy", "-o", "name"),
    )
    assert events and not guarded.pod("app=sick")["status"]["containerStatuses"][0]["ready"]
