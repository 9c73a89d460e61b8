"""Every kind of workload gets its sidecar, starts, is called over mutual TLS, and ends as it would without the mesh."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cluster.kube import Object, Space, client, service, workload

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


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


def client_id(answered: Object) -> str:
    """Whom the sidecar of the called pod says it was called by."""
    return str(answered["body"]["headers"].get("pillion-client-id", ""))


def test_a_deployment_is_called_by_its_service_name(shop: Space) -> None:
    answered = shop.call("client", "http://web/hello")
    assert answered.get("status") == 200, answered
    assert answered["body"]["path"] == "/hello"
    assert all(injected(pod) for pod in shop.pods("app=web"))
