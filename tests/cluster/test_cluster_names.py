"""The app's own view stays as it was: every way of naming a destination in Kubernetes leads where it leads without the mesh."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cluster.conftest import Ground
from tests.cluster.kube import OUTSIDE, Space, client, container, pod, pod_spec, service, until, workload
from tests.cluster.test_cluster_workloads import caller, identity

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def town(make_space: Callable[..., Space]) -> Space:
    """Servers in several shapes, a meshed client, and one outside of the mesh."""
    made = make_space("town")
    made.apply(
        workload("Deployment", "web", replicas=2),
        service("web"),
        service("web-each", 8080, selector={"app": "web"}, clusterIP="None"),
        service("web-node", selector={"app": "web"}, type="NodePort"),
        service("self", selector={"app": "client"}),
        client(),
        client("stranger", annotations=OUTSIDE),
        pod("outside", pod_spec(container("app", "serve", "--http", "8080", "--tcp", "2525")), annotations=OUTSIDE),
        service("outside", selector={"app": "outside"}),
        pod(
            "talker",
            pod_spec(container("app", "serve", "--http", "8080", "--tcp", "2525")),
            annotations={"config.pillion.dev/opaque-ports": "2525"},
        ),
        service("talker", ports=[{"name": "talk", "port": 2525, "targetPort": 2525}]),
    )
    made.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "alias"},
            "spec": {"type": "ExternalName", "externalName": f"web.{made.name}.svc.cluster.local"},
        }
    )
    made.rolled_out("deployment/web")
    made.ready("client", "stranger", "outside", "talker")
    return made


@pytest.mark.parametrize("host", ["web", "web.{0}", "web.{0}.svc", "web.{0}.svc.cluster.local", "web.{0}.svc.cluster.local."])
def test_a_service_answers_by_all_its_names(town: Space, host: str) -> None:
    assert caller(town.call("client", f"http://{host.format(town.name)}/")) == identity(town)


def test_a_service_spreads_requests_over_its_pods(town: Space) -> None:
    def asked() -> bool:
        # answers that take longer than an endpoint is assumed to take before it was asked, or the first one may go on being the better
        seen = town.app("client", "load", "http://web/delay/50", "--seconds=1", "--workers=2", "--pause=1")
        assert seen["failed"] == 0, seen
        return len(seen["pods"]) == 2

    town.answered("client", "http://web/")
    until("both pods answer", asked)


def test_a_headless_service_resolves_to_pods_which_are_dialled_meshed(town: Space) -> None:
    assert caller(town.call("client", "http://web-each:8080/")) == identity(town)


def test_a_pods_own_address_is_dialled_meshed(town: Space) -> None:
    target = town.pods("app=web")[0]
    answered = town.call("client", f"http://{target['status']['podIP']}:8080/")
    assert caller(answered) == identity(town)
    assert answered["body"]["pod"] == target["metadata"]["name"]


def test_an_external_name_leads_to_the_service_it_names(town: Space) -> None:
    assert caller(town.call("client", "http://alias/")) == identity(town)


def test_a_pod_reaches_itself_through_its_own_service(town: Space) -> None:
    answered = town.call("client", "http://self/")
    assert answered.get("status") == 200, answered
    assert answered["body"]["pod"] == "client"


def test_a_pod_reaches_itself_by_its_own_address_and_by_loopback(town: Space) -> None:
    own = town.json("get", "pod", "client")["status"]["podIP"]
    for host in (own, "127.0.0.1", "localhost"):
        answered = town.call("client", f"http://{host}:8080/")
        assert answered.get("status") == 200, (host, answered)
        assert answered["body"]["pod"] == "client"


def test_a_node_port_answers_from_inside_and_from_a_node(town: Space, ground: Ground) -> None:
    port = town.json("get", "service", "web-node")["spec"]["ports"][0]["nodePort"]
    for node in ground.kube.json("get", "nodes")["items"]:
        address = next(each["address"] for each in node["status"]["addresses"] if each["type"] == "InternalIP")
        for who in ("client", "stranger"):
            town.answered(who, f"http://{address}:{port}/")


def test_a_destination_outside_of_the_mesh_answers_in_plaintext(town: Space) -> None:
    answered = town.call("client", "http://outside/")
    assert caller(answered) == ""
    address = town.json("get", "pod", "outside")["status"]["podIP"]
    assert town.call("client", f"http://{address}:8080/").get("status") == 200


def test_a_destination_beyond_the_cluster_is_reached(town: Space, ground: Ground) -> None:
    """The API server's own address stands for the internet: no pod, no Service, TLS of its own."""
    host, port = ground.kube.server().removeprefix("https://").split(":")
    connect = f"socket.create_connection(('{host}', {port}), 5)"
    fetch = f"import ssl, socket; print(ssl._create_unverified_context().wrap_socket({connect}).version())"
    assert town.exec("client", "python3", "-c", fetch).startswith("TLSv1")


def test_a_server_that_speaks_first_is_heard(town: Space) -> None:
    heard = town.app("client", "tcp", "talker", "2525", "--say", "hello")
    assert heard.get("greeting", "").startswith("220 talker"), heard
    assert heard["echo"] == "hello"


def test_a_port_nobody_listens_on_is_refused_soon(town: Space) -> None:
    address = town.pods("app=web")[0]["status"]["podIP"]
    answered = town.call("client", f"http://{address}:7/", "--timeout", "10")
    assert answered.get("status") in (502, 503, 504) or "error" in answered, answered


def test_a_caller_outside_of_the_mesh_reaches_a_meshed_service(town: Space) -> None:
    assert caller(town.answered("stranger", "http://web/")) == ""
