"""Which manifests the runner takes, and where it points when it refuses one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.k8s.fields import InvalidObject
from core.refs import Ref
from local.objects import read_manifest
from local.workloads import pods_of

KEYS = ["template", "selector", "matchLabels", "metadata", "labels", "spec", "containers", "name", "command", "env", "replicas", "volumes"]


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
    others = [("networking.k8s.io/v1", "Ingress"), ("batch/v1", "CronJob"), ("v1", "Endpoints"), ("serving.knative.dev/v1", "Service")]
    for version, kind in others:
        assert read_manifest({"apiVersion": version, "kind": kind, "metadata": {"name": "x"}}) is None


@pytest.mark.parametrize(("version", "kind"), [("apps/v1", "Deploymnet"), ("v1", "Sevice"), ("v1", "Deployment"), ("batch/v1", "job")])
def test_a_kind_that_does_not_exist_is_refused(version: str, kind: str) -> None:
    """Nobody sees that a workload is left out silently."""
    assert refusal({"apiVersion": version, "kind": kind, "metadata": {"name": "x"}}) == "kind"


@pytest.mark.parametrize(
    ("container", "path"),
    [
        ({"command": None}, ".command"),
        ({"command": "sleep 1"}, ".command"),
        ({"args": [1]}, ".args[0]"),
        ({"name": "../escape"}, ".name"),
        ({"securityContext": {"runAsUser": 0}}, ".securityContext.runAsUser"),
        ({"env": ["A=1"]}, ".env[0]"),
        ({"env": [{"name": "A", "value": 1}]}, ".env[0].value"),
        ({"ports": [{"containerPort": 0}]}, ".ports[0].containerPort"),
        ({"livenessProbe": {"periodSeconds": "1s"}}, ".livenessProbe.periodSeconds"),
        ({"volumeMounts": [{"name": "gone", "mountPath": "/x"}]}, ".volumeMounts[0].name"),
        ({"volumeMounts": [{"name": "gone", "mountPath": "x"}]}, ".volumeMounts[0].mountPath"),
    ],
)
def test_a_container_that_cannot_run_is_refused_at_its_path(container: dict[str, Any], path: str) -> None:
    assert refusal(deployment(**container)) == "spec.template.spec.containers[0]" + path


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"template": None}, "spec.template"),
        ({"template": {"metadata": {"labels": ["a"]}, "spec": {}}}, "spec.template.metadata.labels"),
        ({"template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": []}}}, "spec.template.spec.containers"),
        ({"template": {"metadata": {"labels": {"app": "web"}}, "spec": []}}, "spec.template.spec"),
        ({"selector": {"matchLabels": "app"}}, "spec.selector.matchLabels"),
    ],
)
def test_a_template_of_the_wrong_shape_is_refused_at_its_path(spec: dict[str, Any], path: str) -> None:
    raw = deployment()
    raw["spec"] |= spec
    assert refusal(raw) == path


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(["Deployment", "StatefulSet", "Job", "Pod"]), JSON)
def test_any_spec_is_taken_or_refused(kind: str, spec: object) -> None:
    group = {"Job": "batch/v1", "Pod": "v1"}.get(kind, "apps/v1")
    try:
        found = read_manifest({"apiVersion": group, "kind": kind, "metadata": {"name": "x"}, "spec": spec})
    except InvalidObject:
        return
    assert found is not None
    try:
        pods_of(found)
    except InvalidObject as error:
        assert error.path in ("spec.replicas", "spec.completions")


def test_a_pod_is_its_own_template() -> None:
    raw = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"name": "a"}]}}
    assert refusal(raw) == "spec.containers[0].command"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"hostNetwork": True}, "spec.template.spec.hostNetwork"),
        ({"hostAliases": [{"ip": "10.0.0.1\n1", "hostnames": ["a"]}]}, "spec.template.spec.hostAliases[0].ip"),
        ({"hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a\n"]}]}, "spec.template.spec.hostAliases[0].hostnames[0]"),
    ],
)
def test_what_a_pod_cannot_have_of_its_host_is_refused(fields: dict[str, Any], path: str) -> None:
    raw = deployment()
    raw["spec"]["template"]["spec"] |= fields
    assert refusal(raw) == path


def test_a_selector_must_select_the_template() -> None:
    raw = deployment()
    raw["spec"]["selector"]["matchLabels"]["app"] = "other"
    assert refusal(raw) == "spec.selector.matchLabels"


@pytest.mark.parametrize("uid", [2102, 2103, 2104])
def test_no_app_gets_a_uid_of_the_mesh(uid: int) -> None:
    container = {"name": "a", "command": ["sleep"]}
    for spec, path in (
        ({"containers": [container], "securityContext": {"runAsUser": uid}}, "spec.securityContext.runAsUser"),
        ({"containers": [container | {"securityContext": {"runAsUser": uid}}]}, "spec.containers[0].securityContext.runAsUser"),
    ):
        with pytest.raises(InvalidObject) as refused:
            read_manifest({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec})
        assert refused.value.path == path


def test_two_containers_need_two_names() -> None:
    raw = deployment()
    raw["spec"]["template"]["spec"]["initContainers"] = [{"name": "app", "command": ["true"]}]
    assert refusal(raw) == "spec.template.spec.containers[0].name"


def test_a_policy_of_linkerd_is_refused_and_not_left_out() -> None:
    spec = {"podSelector": {"matchLabels": {"app": "web"}}, "port": 8080}
    with pytest.raises(InvalidObject) as refused:
        read_manifest({"apiVersion": "policy.linkerd.io/v1beta3", "kind": "Server", "metadata": {"name": "web"}, "spec": spec})
    assert refused.value.path == "apiVersion" and "policy.pillion.dev/v1alpha1" in str(refused.value)


def test_a_wrong_policy_is_refused_where_its_author_sees_the_file() -> None:
    raw = {
        "apiVersion": "policy.pillion.dev/v1alpha1",
        "kind": "Server",
        "metadata": {"name": "x", "namespace": "shop"},
        "spec": {"podSelector": {}, "port": 80, "proxyProtocol": "SPDY"},
    }
    assert refusal(raw) == "spec.proxyProtocol"
