"""Which manifests the runner takes, and where it points when it refuses one."""

from __future__ import annotations

from typing import Any

import pytest

from core.k8s.fields import InvalidObject
from core.refs import Ref
from local.objects import read_manifest


def deployment(**container: Any) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "app", "command": ["true"]} | container]},
            },
        },
    }


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(InvalidObject) as caught:
        read_manifest(raw)
    return caught.value.path


def test_a_workload_is_taken_with_its_default_namespace() -> None:
    found = read_manifest(deployment())
    assert found is not None and found.ref == Ref("apps", "Deployment", "default", "web")


def test_kinds_that_mean_nothing_here_are_left_out() -> None:
    assert read_manifest({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "x"}}) is None


@pytest.mark.parametrize(
    ("container", "path"),
    [
        ({"command": None}, ".command"),
        ({"command": "sleep 1"}, ".command"),
        ({"args": [1]}, ".args"),
        ({"name": "../escape"}, ".name"),
        ({"securityContext": {"runAsUser": 0}}, ".securityContext.runAsUser"),
        ({"env": ["A=1"]}, ".env"),
    ],
)
def test_a_container_that_cannot_run_is_refused_at_its_path(container: dict[str, Any], path: str) -> None:
    assert refusal(deployment(**container)) == "spec.template.spec.containers[0]" + path


def test_a_pod_is_its_own_template() -> None:
    raw = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"name": "a"}]}}
    assert refusal(raw) == "spec.containers[0].command"


def test_a_selector_must_select_the_template() -> None:
    raw = deployment()
    raw["spec"]["selector"]["matchLabels"]["app"] = "other"
    assert refusal(raw) == "spec.selector.matchLabels"


def test_two_containers_need_two_names() -> None:
    raw = deployment()
    raw["spec"]["template"]["spec"]["initContainers"] = [{"name": "app", "command": ["true"]}]
    assert refusal(raw) == "spec.template.spec.containers[0].name"


def test_a_wrong_policy_is_refused_where_its_author_sees_the_file() -> None:
    raw = {
        "apiVersion": "policy.pillion.dev/v1alpha1",
        "kind": "Server",
        "metadata": {"name": "x", "namespace": "shop"},
        "spec": {"podSelector": {}, "port": 80, "proxyProtocol": "SPDY"},
    }
    assert refusal(raw) == "spec.proxyProtocol"
