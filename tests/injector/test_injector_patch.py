"""What injection adds to a pod: container, volumes, probes; and the patch language it is said in."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from injector.decide import Inject, Refuse, Skip
from injector.mesh import DEFAULT_MESH, LOCAL_MESH, Mesh
from injector.patch import PatchFailed, apply_patch, escape, review
from injector.undo import uninject
from proxy.config import load_config

ENABLED = {"pillion.dev/inject": "enabled"}
WORDS = (
    *("metadata", "annotations", "spec", "containers", "initContainers", "volumes", "name", "ports", "containerPort", "protocol"),
    *("livenessProbe", "httpGet", "tcpSocket", "port", "path", "securityContext", "runAsUser", "hostNetwork", "os", "env", "value"),
    *("pillion.dev/status", "pillion.dev/before", "pillion-proxy", "restartPolicy", "timeoutSeconds", "terminationGracePeriodSeconds"),
)


def pod(**app: Any) -> dict[str, Any]:
    container = {
        "name": "app",
        "image": "app",
        "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 53, "protocol": "UDP"}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web-0", "namespace": "shop"},
        "spec": {"containers": [container | app]},
    }


def injected(found: dict[str, Any], namespace: dict[str, str] | None = None) -> dict[str, Any]:
    before = copy.deepcopy(found)
    decision, patch = review(found, {**ENABLED, **(namespace or {})}, LOCAL_MESH)
    assert isinstance(decision, Inject), decision
    assert found == before, "reviewing must not change the pod"
    json.dumps(patch)
    return apply_patch(found, patch)


def sidecar_env(found: dict[str, Any]) -> dict[str, str]:
    entries = found["spec"]["initContainers"][0]["env"]
    return {entry["name"]: entry.get("value", f"<{entry.get('valueFrom', {}).get('fieldRef', {}).get('fieldPath')}>") for entry in entries}


def test_the_sidecar_is_a_native_one_and_comes_first() -> None:
    found = pod()
    found["spec"]["initContainers"] = [{"name": "migrate"}]
    first, second = injected(found)["spec"]["initContainers"]
    assert (first["name"], first["restartPolicy"]) == ("pillion-proxy", "Always")
    assert second == {"name": "migrate"}
    assert first["startupProbe"]["httpGet"] == {"path": "/ready", "port": 4191}
    context = first["securityContext"]
    assert context["runAsUser"] == 2102 and context["capabilities"] == {"drop": ["ALL"]} and not context["allowPrivilegeEscalation"]


def test_the_environment_is_one_the_sidecar_accepts() -> None:
    env = sidecar_env(injected(pod()))
    kubelet = {
        "<metadata.namespace>": "shop",
        "<metadata.name>": "web-0",
        "<metadata.uid>": "u",
        "<status.podIPs>": "10.0.0.1,fd00::1",
        "<spec.serviceAccountName>": "web",
    }
    config = load_config({name: kubelet.get(value, value.replace("$$", "$")) for name, value in env.items()})
    assert config.identity.uri == "spiffe://cluster.local/ns/shop/sa/web"
    assert config.pod_ips == ("10.0.0.1", "fd00::1")
    assert config.inbound_ports == (8080,)
    assert (config.inbound_listen.port, config.outbound_listen.port, config.admin_listen.port) == (4143, 4140, 4191)
    assert str(config.identity_addr) == "pillion-identity.pillion.svc.cluster.local:8080"
    assert str(config.policy_addr) == "pillion-policy.pillion.svc.cluster.local:8090"


def test_the_token_is_for_our_audience_only_and_mounted_into_the_sidecar_only() -> None:
    found = injected(pod())
    volumes = {volume["name"]: volume for volume in found["spec"]["volumes"]}
    (source,) = volumes["pillion-identity-token"]["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "identity.pillion.dev"
    assert volumes["pillion-trust-anchors"]["configMap"]["name"] == "pillion-trust-anchors"
    assert "volumeMounts" not in found["spec"]["containers"][0]
    assert {mount["name"] for mount in found["spec"]["initContainers"][0]["volumeMounts"]} == set(volumes)
    env = sidecar_env(found)
    mounts = {mount["name"]: mount["mountPath"] for mount in found["spec"]["initContainers"][0]["volumeMounts"]}
    assert env["PILLION_IDENTITY_TOKEN_FILE"] == mounts["pillion-identity-token"] + "/token"
    assert env["PILLION_TRUST_ANCHORS_FILE"] == mounts["pillion-trust-anchors"] + "/ca-bundle.crt"


def test_injecting_twice_changes_nothing() -> None:
    once = injected(pod())
    assert once["metadata"]["annotations"]["pillion.dev/status"] == "injected"
    decision, patch = review(once, ENABLED)
    assert isinstance(decision, Skip) and decision.reason == "already-injected" and patch == []


# --- the sidecar's kinds ---------------------------------------------------------------------------------------------


def meshed(found: dict[str, Any], mesh: Mesh = DEFAULT_MESH, **annotations: str) -> dict[str, Any]:
    found = copy.deepcopy(found)
    prefixed = {f"config.pillion.dev/{name.replace('_', '-')}": value for name, value in annotations.items()}
    found["metadata"]["annotations"] = {**ENABLED, **prefixed}
    decision, patch = review(found, {}, mesh)
    assert isinstance(decision, Inject), decision
    return apply_patch(found, patch)


def names(containers: list[dict[str, Any]]) -> list[str]:
    return [container["name"] for container in containers]


def test_without_an_agent_an_init_container_captures_before_everything_else() -> None:
    found = pod()
    found["spec"]["initContainers"] = [{"name": "migrate"}]
    after = meshed(found, skip_inbound_ports="9000", skip_outbound_ports="25,8000-8010")["spec"]
    assert names(after["initContainers"]) == ["pillion-capture", "pillion-proxy", "migrate"]
    capture = after["initContainers"][0]
    assert capture["command"] == ["python", "-m", "ebpf.redirect_self", "--skip-inbound=9000", "--skip-outbound=25,8000-8010"]
    assert capture["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    assert "restartPolicy" not in capture


def test_a_pod_for_a_node_without_agent_says_so() -> None:
    after = meshed(pod(), Mesh(capture="agent"), capture="init")["spec"]
    assert after["initContainers"][0]["command"][2] == "ebpf.redirect_self"
    assert names(meshed(pod(), LOCAL_MESH, capture="init")["spec"]["initContainers"]) == ["pillion-proxy"]


def test_the_capture_program_takes_what_the_injector_writes(capsys: pytest.CaptureFixture[str]) -> None:
    from ebpf.redirect import capture
    from ebpf.redirect_self import main

    command = meshed(pod(), skip_inbound_ports="http,9000", skip_outbound_ports="25")["spec"]["initContainers"][0]["command"]
    assert main([*command[3:], "--print"]) == 0
    assert capsys.readouterr().out == capture([(8080, 8080), (9000, 9000)], [(25, 25)])


RESTRICTED_VOLUMES = {"configMap", "projected"}


@pytest.mark.parametrize("native", [True, False])
def test_with_the_agent_the_pod_passes_the_restricted_level(native: bool) -> None:
    """Kubernetes' Pod Security Standards, level restricted, v1.34: the controls that concern what we add."""
    after = meshed(pod(), Mesh(capture="agent", native_sidecar=native))["spec"]
    added = [found for found in [*after["initContainers"], *after["containers"]] if found["name"].startswith("pillion-")]
    assert names(added) == (["pillion-proxy"] if native else ["pillion-capture", "pillion-proxy"])
    for container in added:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["runAsNonRoot"] is True and context["runAsUser"] > 0
        assert context["capabilities"] == {"drop": ["ALL"]} and context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert context["readOnlyRootFilesystem"] is True
        assert not {"privileged", "procMount"} & context.keys()
        assert all("hostPort" not in port for port in container.get("ports", []))
    assert {next(key for key in volume if key != "name") for volume in after["volumes"]} <= RESTRICTED_VOLUMES
    assert after.keys() <= {"initContainers", "containers", "volumes"}


def test_a_pod_in_a_user_namespace_of_its_own_is_refused_where_the_agent_would_capture() -> None:
    found = pod()
    found["spec"]["hostUsers"] = False
    agent = Mesh(capture="agent")
    refused, patch = review(found, ENABLED, agent)
    assert isinstance(refused, Refuse) and refused.reason == "host-users" and not patch
    assert "hostUsers: false" in refused.sentence and "config.pillion.dev/capture: init" in refused.sentence
    by_init = {**ENABLED, "config.pillion.dev/capture": "init"}
    assert isinstance(review(found, by_init, agent)[0], Inject)
    found["spec"]["hostUsers"] = True
    assert isinstance(review(found, ENABLED, agent)[0], Inject)


def test_with_the_agent_a_native_sidecar_proves_capture_and_holds_the_others_until_it_has() -> None:
    """Its hook is what the kubelet waits for; a startup probe would cost two more of the kubelet's looks, a second each."""
    (proxy,) = meshed(pod(), Mesh(capture="agent"))["spec"]["initContainers"]
    assert {"name": "PILLION_PROVE_CAPTURE", "value": "true"} in proxy["env"]
    assert proxy["lifecycle"]["postStart"]["exec"]["command"] == ["python", "-S", "-m", "injector.hold", "proven"]
    assert "startupProbe" not in proxy


@pytest.mark.parametrize(
    "mesh", [Mesh(capture="init"), Mesh(capture="agent", native_sidecar=False), LOCAL_MESH], ids=["init", "classic", "none"]
)
def test_elsewhere_the_sidecar_proves_nothing(mesh: Mesh) -> None:
    """What captures, or proves capture, has run before it."""
    spec = meshed(pod(), mesh)["spec"]
    proxy = next(found for found in [*spec["initContainers"], *spec["containers"]] if found["name"] == "pillion-proxy")
    assert "PILLION_PROVE_CAPTURE" not in {entry["name"] for entry in proxy["env"]}
    assert names(spec["initContainers"])[:1] == (["pillion-proxy"] if mesh is LOCAL_MESH else ["pillion-capture"])
    waited_for = [proxy.get("startupProbe") is not None, proxy.get("lifecycle", {}).get("postStart") is not None]
    assert waited_for == ([True, False] if mesh is LOCAL_MESH else [False, True])


def test_a_classic_sidecar_needs_a_container_that_proves_capture_before_init_containers_run() -> None:
    capture = meshed(pod(), Mesh(capture="agent", native_sidecar=False))["spec"]["initContainers"][0]
    assert capture["command"] == ["python", "-m", "ebpf.validator"]
    assert capture["securityContext"]["runAsUser"] != 2102, "the sidecar's uid passes capture and would prove nothing"


def test_a_classic_sidecar_is_ready_before_the_others_start_and_stays_a_while_when_they_end() -> None:
    found = pod()
    found["spec"]["initContainers"] = [{"name": "migrate"}]
    after = meshed(found, Mesh(native_sidecar=False))
    assert names(after["spec"]["initContainers"]) == ["pillion-capture", "migrate"]
    proxy, app = after["spec"]["containers"]
    assert (proxy["name"], app["name"]) == ("pillion-proxy", "app")
    assert "restartPolicy" not in proxy and "startupProbe" not in proxy
    assert proxy["lifecycle"] == {
        "postStart": {"exec": {"command": ["python", "-S", "-m", "injector.hold"]}},
        "preStop": {"exec": {"command": ["sleep", "5"]}},
    }
    assert after["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"] == "app"


def test_a_classic_sidecar_that_nobody_waits_for_comes_last() -> None:
    after = meshed(pod(), native_sidecar="false", wait_before_exit="0", **{"await": "false"})
    app, proxy = after["spec"]["containers"]
    assert (app["name"], proxy["name"]) == ("app", "pillion-proxy") and "lifecycle" not in proxy


def test_probes_are_rewritten_where_they_are_also_when_a_classic_sidecar_comes_first() -> None:
    after = meshed(pod(livenessProbe={"tcpSocket": {"port": 1}}), native_sidecar="false")
    assert after["spec"]["containers"][1]["livenessProbe"]["httpGet"]["port"] == 4191


def test_resources_image_and_waiting_follow_the_annotations() -> None:
    after = meshed(
        pod(),
        cpu_request="10m",
        memory_limit="128Mi",
        image="mine:1",
        image_pull_policy="Never",
        wait_before_exit="7",
        connect_timeout="1500ms",
        detect_timeout="2s",
        forwarded="x-forwarded-for",
        env='{"PILLION_MAX_CONNECTIONS": "7", "PILLION_X": "$(HOME)"}',
    )
    for container in after["spec"]["initContainers"]:
        assert container["resources"] == {"requests": {"cpu": "10m"}, "limits": {"memory": "128Mi"}}
        assert (container["image"], container["imagePullPolicy"]) == ("mine:1", "Never")
    proxy = after["spec"]["initContainers"][1]
    assert proxy["lifecycle"]["preStop"] == {"exec": {"command": ["sleep", "7"]}}
    env = {entry["name"]: entry.get("value") for entry in proxy["env"]}
    assert (env["PILLION_CONNECT_TIMEOUT_MS"], env["PILLION_DETECT_TIMEOUT_S"]) == ("1500", "2")
    assert (env["PILLION_MAX_CONNECTIONS"], env["PILLION_X"], env["PILLION_FORWARDED"]) == ("7", "$$(HOME)", "x-forwarded-for")


def test_the_sidecar_understands_everything_that_options_set() -> None:
    """Names that the sidecar does not read would be settings without effect."""
    from core.env import settings_of
    from proxy.config import Config

    known = {setting.name for setting in settings_of(Config)}
    after = meshed(pod(), connect_timeout="1s", detect_timeout="2s", forwarded="forwarded")
    assert {entry["name"] for entry in after["spec"]["initContainers"][1]["env"]} <= known


def test_the_default_image_is_of_this_version() -> None:
    from importlib.metadata import version

    assert DEFAULT_MESH.image == f"pillion:{version('pillion')}"


# --- a second look ---------------------------------------------------------------------------------------------------


def test_what_another_webhook_adds_afterwards_is_taken_in() -> None:
    once = meshed(pod(livenessProbe={"tcpSocket": {"port": 8080}}))
    late = copy.deepcopy(once)
    added = {"name": "late", "ports": [{"containerPort": 9100}], "readinessProbe": {"httpGet": {"port": 9100, "path": "/r"}}}
    late["spec"]["containers"].insert(0, added)
    late["spec"]["initContainers"][1]["terminationMessagePath"] = "/dev/termination-log"  # the API server fills in defaults meanwhile
    decision, patch = review(late, ENABLED)
    assert isinstance(decision, Skip) and decision.reason == "already-injected"
    after = apply_patch(late, patch)
    assert after["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/pillion-probe/late/readinessProbe"
    env = {entry["name"]: entry.get("value") for entry in after["spec"]["initContainers"][1]["env"]}
    assert set(json.loads(env["PILLION_PROBES"])) == {"/pillion-probe/app/livenessProbe", "/pillion-probe/late/readinessProbe"}
    assert env["PILLION_INBOUND_PORTS"] == "8080,9100"
    assert review(after, ENABLED)[1] == []
    assert uninject(after)["spec"]["containers"] == [added, *pod(livenessProbe={"tcpSocket": {"port": 8080}})["spec"]["containers"]]


# --- what is no pod --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70000) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=6),
    max_leaves=30,
)


@given(JSON)
def test_anything_gives_a_decision(found: Any) -> None:
    decision, patch = review(found, ENABLED)
    assert isinstance(decision, Inject | Skip | Refuse)
    if patch:
        apply_patch(found, patch)


@pytest.mark.parametrize(
    ("found", "where"),
    [
        ({}, "spec"),
        ([], "a pod"),
        ({"spec": {}}, "spec.containers"),
        ({"spec": {"containers": [{"name": "a", "ports": [{"containerPort": "x"}]}]}}, "spec.containers[0].ports[0].containerPort"),
        ({"spec": {"containers": [{"name": "a"}, {"name": "a"}]}}, "spec.containers[1].name"),
        ({"metadata": {"annotations": {"a": 1}}, "spec": {"containers": []}}, "metadata.annotations"),
    ],
)
def test_what_is_no_pod_is_refused_at_its_field(found: Any, where: str) -> None:
    decision, patch = review(found, ENABLED)
    assert isinstance(decision, Refuse) and decision.reason == "invalid-pod" and where in decision.sentence and patch == []


def test_what_the_author_wrote_stays() -> None:
    found = pod()
    found["metadata"]["annotations"] = {"mine": "1"}
    found["spec"]["volumes"] = [{"name": "data", "emptyDir": {}}]
    after = injected(found)
    assert after["metadata"]["annotations"]["mine"] == "1"
    assert after["spec"]["volumes"][0] == {"name": "data", "emptyDir": {}}
    assert after["spec"]["containers"] == found["spec"]["containers"]


def test_skipped_ports_of_the_namespace_become_the_pods_own() -> None:
    key = "config.pillion.dev/skip-inbound-ports"
    assert injected(pod(), {key: "9000"})["metadata"]["annotations"][key] == "9000"


def test_settings_follow_the_options() -> None:
    found = pod()
    prefix = "config.pillion.dev/"
    found["metadata"]["annotations"] = {prefix + "log-level": "debug", prefix + "access-log": "errors", prefix + "image": "mine:1"}
    after = injected(found)
    env = sidecar_env(after)
    assert (env["PILLION_LOG_LEVEL"], env["PILLION_ACCESS_LOG"]) == ("debug", "errors")
    assert after["spec"]["initContainers"][0]["image"] == "mine:1"


# --- probes ----------------------------------------------------------------------------------------------------------


def probes(found: dict[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(sidecar_env(found)["PILLION_PROBES"].replace("$$", "$"))
    return value


@pytest.mark.parametrize(
    ("action", "original"),
    [
        ({"httpGet": {"path": "/healthz", "port": "http"}}, {"httpGet": {"path": "/healthz", "port": 8080}}),
        ({"tcpSocket": {"port": 5432}}, {"tcpSocket": {"port": 5432}}),
        ({"grpc": {"port": 9000, "service": "cart"}}, {"grpc": {"port": 9000, "service": "cart"}}),
        ({"httpGet": {"path": "/a$b", "port": "8080"}}, {"httpGet": {"path": "/a$b", "port": 8080}}),
    ],
)
@pytest.mark.parametrize("kind", ["livenessProbe", "readinessProbe", "startupProbe"])
def test_a_probe_goes_to_the_sidecar_which_knows_the_original(kind: str, action: dict[str, Any], original: dict[str, Any]) -> None:
    found = injected(pod(**{kind: {**action, "periodSeconds": 7, "timeoutSeconds": 3}}))
    probe = found["spec"]["containers"][0][kind]
    assert probe == {"httpGet": {"path": f"/pillion-probe/app/{kind}", "port": 4191}, "periodSeconds": 7, "timeoutSeconds": 4}
    assert probes(found) == {f"/pillion-probe/app/{kind}": {**original, "timeoutSeconds": 3}}


def test_the_sidecar_understands_the_probes() -> None:
    from proxy.probes import read_probes

    found = injected(
        pod(livenessProbe={"tcpSocket": {"port": 1}}, readinessProbe={"httpGet": {"port": "http"}}, startupProbe={"grpc": {"port": 2}})
    )
    assert set(read_probes(probes(found))) == set(probes(found))


@pytest.mark.parametrize("probe", [{"exec": {"command": ["true"]}}, {"httpGet": {"host": "example.org", "port": 80}}])
def test_a_probe_that_reaches_no_port_of_the_app_stays(probe: dict[str, Any]) -> None:
    found = injected(pod(livenessProbe=probe))
    assert found["spec"]["containers"][0]["livenessProbe"] == probe
    assert probes(found) == {}


def test_an_annotation_keeps_the_probes() -> None:
    found = pod(livenessProbe={"tcpSocket": {"port": 1}})
    found["metadata"]["annotations"] = {"config.pillion.dev/keep-probes": "true"}
    after = injected(found)
    assert after["spec"]["containers"] == found["spec"]["containers"]
    assert probes(after) == {}


def test_probes_of_another_native_sidecar_are_rewritten_where_they_are() -> None:
    found = pod()
    found["spec"]["initContainers"] = [{"name": "logs", "restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 24}}}]
    after = injected(found)
    assert after["spec"]["initContainers"][1]["startupProbe"]["httpGet"]["path"] == "/pillion-probe/logs/startupProbe"


def test_a_probe_of_a_port_nobody_declared_is_refused() -> None:
    decision, patch = review(pod(livenessProbe={"httpGet": {"port": "web"}}), ENABLED)
    assert isinstance(decision, Refuse) and "'web'" in decision.sentence and patch == []


def test_another_installation_has_other_addresses() -> None:
    decision, patch = review(pod(), ENABLED, Mesh(trust_domain="example.org", control_namespace="mesh", capture="none"))
    env = sidecar_env(apply_patch(pod(), patch))
    assert isinstance(decision, Inject)
    assert env["PILLION_TRUST_DOMAIN"] == "example.org" and env["PILLION_IDENTITY_ADDR"].startswith("pillion-identity.mesh.svc")


# --- RFC 6902 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "operation", "after"),
    [  # RFC 6902 appendix A
        ({"foo": "bar"}, {"op": "add", "path": "/baz", "value": 1}, {"foo": "bar", "baz": 1}),
        ({"foo": ["a", "c"]}, {"op": "add", "path": "/foo/1", "value": "b"}, {"foo": ["a", "b", "c"]}),
        ({"foo": ["a"]}, {"op": "add", "path": "/foo/-", "value": ["b"]}, {"foo": ["a", ["b"]]}),
        ({"foo": 1, "baz": 2}, {"op": "remove", "path": "/baz"}, {"foo": 1}),
        ({"foo": ["a", "b", "c"]}, {"op": "remove", "path": "/foo/1"}, {"foo": ["a", "c"]}),
        ({"foo": 1}, {"op": "replace", "path": "/foo", "value": 2}, {"foo": 2}),
        ({"/": 9, "~1": 10}, {"op": "replace", "path": "/~01", "value": 8}, {"/": 9, "~1": 8}),
        ({"foo": ["a"]}, {"op": "test", "path": "/foo/0", "value": "a"}, {"foo": ["a"]}),
    ],
)
def test_operations_do_what_the_rfc_says(document: dict[str, Any], operation: dict[str, Any], after: dict[str, Any]) -> None:
    assert apply_patch(document, [operation]) == after


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "replace", "path": "/nope", "value": 1},
        {"op": "remove", "path": "/nope"},
        {"op": "add", "path": "/a/b/c", "value": 1},
        {"op": "add", "path": "/list/9", "value": 1},
        {"op": "replace", "path": "/list/-", "value": 1},
        {"op": "test", "path": "/a", "value": 2},
        {"op": "test", "path": "/list/0", "value": 2},
        {"op": "move", "path": "/a", "from": "/list"},
    ],
)
def test_an_operation_that_does_not_fit_changes_nothing(operation: dict[str, Any]) -> None:
    document = {"a": 1, "list": [0]}
    with pytest.raises(PatchFailed, match=operation["path"]):
        apply_patch(document, [{"op": "add", "path": "/b", "value": 1}, operation])
    assert document == {"a": 1, "list": [0]}


@given(st.text())
def test_any_key_survives_escaping(key: str) -> None:
    assert apply_patch({}, [{"op": "add", "path": f"/{escape(key)}", "value": 1}]) == {key: 1}
