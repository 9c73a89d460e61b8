"""What a container's spec means as a process."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from local.podspec import APP_UID, Base, ContainerPlan, NotYet, container_plans, expand, volume_plans

BASE = Base({"PATH": "/bin"}, ("python", "-m", "proxy"))
OBJECTS = {
    ("ConfigMap", "cfg"): {"data": {"mode": "fast", "a.txt": "A"}, "binaryData": {"b.bin": base64.b64encode(b"\x00").decode()}},
    ("Secret", "key"): {"data": {"password": base64.b64encode(b"s3").decode()}, "stringData": {"user": "me"}},
}


def pod(containers: list[dict[str, Any]], **spec: Any) -> dict[str, Any]:
    meta = {"name": "web-0", "namespace": "shop", "uid": "u-1", "labels": {"app": "web"}, "annotations": {"team": "x"}}
    status = {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "hostIP": "10.0.0.254"}
    return {"metadata": meta, "spec": {"containers": containers, **spec}, "status": status}


def plan(container: dict[str, Any], **spec: Any) -> ContainerPlan:
    return plans([{"name": "app", "command": ["run"]} | container], **spec)[-1]


def plans(containers: list[dict[str, Any]], **spec: Any) -> list[ContainerPlan]:
    return container_plans(pod(containers, **spec), lambda kind, name: OBJECTS.get((kind, name)), BASE)


def test_command_and_args_expand_variables_and_keep_unknown_ones() -> None:
    found = plan({"args": ["--port=$(PORT)", "$$(PORT)", "$(NOPE)"], "env": [{"name": "PORT", "value": "80"}]})
    assert found.argv == ("run", "--port=80", "$(PORT)", "$(NOPE)")


def test_a_variable_sees_those_before_it_only() -> None:
    env = plan({"env": [{"name": "A", "value": "$(B)"}, {"name": "B", "value": "1"}, {"name": "C", "value": "$(B)2"}]}).env
    assert (env["A"], env["C"]) == ("$(B)", "12")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "web-0"),
        ("metadata.uid", "u-1"),
        ("metadata.labels['app']", "web"),
        ("metadata.annotations['team']", "x"),
        ("status.podIPs", "10.0.0.1,fd00::1"),
        ("status.hostIP", "10.0.0.254"),
        ("spec.serviceAccountName", "default"),
    ],
)
def test_the_downward_api_tells_a_pod_about_itself(path: str, value: str) -> None:
    assert plan({"env": [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": path}}}]}).env["X"] == value


def test_config_maps_and_secrets_become_variables() -> None:
    found = plan(
        {
            "envFrom": [{"prefix": "CFG_", "configMapRef": {"name": "cfg"}}, {"secretRef": {"name": "key"}}],
            "env": [
                {"name": "PW", "valueFrom": {"secretKeyRef": {"name": "key", "key": "password"}}},
                {"name": "OPT", "valueFrom": {"configMapKeyRef": {"name": "gone", "key": "k", "optional": True}}},
            ],
        }
    )
    assert (found.env["CFG_mode"], found.env["user"], found.env["PW"]) == ("fast", "me", "s3")
    assert "OPT" not in found.env


@pytest.mark.parametrize(
    "env",
    [
        {"valueFrom": {"configMapKeyRef": {"name": "gone", "key": "k"}}},
        {"valueFrom": {"configMapKeyRef": {"name": "cfg", "key": "gone"}}},
        {"valueFrom": {"fieldRef": {"fieldPath": "spec.gone"}}},
    ],
)
def test_a_pod_waits_for_what_its_variables_name(env: dict[str, Any]) -> None:
    with pytest.raises(NotYet, match="gone"):
        plan({"env": [{"name": "X"} | env]})


def test_an_app_runs_as_nobody_unless_told() -> None:
    assert (plan({}).uid, plan({}).gid) == (APP_UID, APP_UID)
    assert plan({}, securityContext={"runAsUser": 7, "runAsGroup": 8}).gid == 8
    assert plan({"securityContext": {"runAsUser": 9}}, securityContext={"runAsUser": 7}).uid == 9


def test_containers_start_in_the_order_of_the_api() -> None:
    found = plans(
        [{"name": "app", "command": ["a"]}],
        initContainers=[{"name": "pillion-proxy", "restartPolicy": "Always"}, {"name": "migrate", "command": ["m"]}],
    )
    assert [(entry.name, entry.kind) for entry in found] == [("pillion-proxy", "sidecar"), ("migrate", "init"), ("app", "app")]
    assert found[0].argv == ("python", "-m", "proxy")


def test_volumes_hold_files_tokens_and_nothing_outside_themselves() -> None:
    volumes = [
        {"name": "cfg", "configMap": {"name": "cfg", "items": [{"key": "a.txt", "path": "sub/a"}]}},
        {"name": "all", "projected": {"sources": [{"secret": {"name": "key"}}, {"serviceAccountToken": {"path": "t", "audience": "x"}}]}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "host", "hostPath": {"path": "/etc"}},
    ]
    cfg, everything, tmp, host = volume_plans(pod([], volumes=volumes), lambda kind, name: OBJECTS.get((kind, name)))
    assert cfg.files == {"sub/a": b"A"}
    assert everything.files == {"password": b"s3", "user": b"me"}
    assert [(token.path, token.audience) for token in everything.tokens] == [("t", "x")]
    assert tmp.writable and host.host_path == "/etc"


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", ""])
def test_a_volume_cannot_write_outside_itself(path: str) -> None:
    volume = {"name": "v", "configMap": {"name": "cfg", "items": [{"key": "mode", "path": path}]}}
    with pytest.raises(NotYet, match="leads out"):
        volume_plans(pod([], volumes=[volume]), lambda kind, name: OBJECTS.get((kind, name)))


def test_a_volume_that_needs_a_cluster_says_so() -> None:
    with pytest.raises(NotYet, match="emptyDir"):
        volume_plans(pod([], volumes=[{"name": "v", "nfs": {}}]), lambda kind, name: None)


def test_expansion_leaves_plain_text_alone() -> None:
    assert expand("a $HOME $(", {"HOME": "x"}) == "a $HOME $("
