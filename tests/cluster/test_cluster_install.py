"""`pillion install`, `check` and `upgrade` on a cluster: what they print is what is there, and what is wrong is named."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from cli.check import catalogue
from core.k8s.access import GRANTS, questions
from tests.cluster.conftest import PILLION, Ground
from tests.cluster.kube import CONTROL_PLANE, Kube, Object, Space, client, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def pillion(kube: Kube, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KUBECONFIG": kube.kubeconfig}
    return subprocess.run([*PILLION, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def checked(kube: Kube, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and every check by its id."""
    done = pillion(kube, "check", "-o", "json", *arguments)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert answer["success"] == (done.returncode == 0)
    return done.returncode, {row["id"]: row for category in answer["categories"] for row in category["checks"]}


@contextmanager
def without(kube: Kube, *names: str) -> Iterator[None]:
    """An object is gone while the body runs, and then there again as it was."""
    kept = kube.json("get", *names)
    kube.run("delete", *names)
    try:
        yield
    finally:
        kube.apply({**kept, "metadata": {key: kept["metadata"][key] for key in ("name", "namespace", "labels") if key in kept["metadata"]}})


# --- install -------------------------------------------------------------------------------------------------------------------------


def test_applying_again_changes_nothing(ground: Ground, mesh: Space) -> None:
    keys = mesh.json("get", "secrets")["items"]
    told = ground.kube.apply(ground.install()).splitlines()
    assert told and [line for line in told if not line.endswith(" unchanged")] == []
    assert {item["metadata"]["name"]: item.get("data") for item in mesh.json("get", "secrets")["items"]} == {
        item["metadata"]["name"]: item.get("data") for item in keys
    }


def test_server_side_apply_keeps_the_keys_too(ground: Ground, mesh: Space) -> None:
    issuer = mesh.json("get", "secret", "pillion-issuer")["data"]
    ground.kube.run("apply", "--server-side", "--force-conflicts", "-f", "-", input=ground.install())
    assert mesh.json("get", "secret", "pillion-issuer")["data"] == issuer
    hooks = ground.kube.json("get", "mutatingwebhookconfiguration", "pillion-injector")["webhooks"]
    assert all(hook["clientConfig"].get("caBundle") for hook in hooks)


def test_the_control_plane_would_be_let_into_a_restricted_namespace(kube: Kube, mesh: Space) -> None:
    for pod in mesh.pods("app.kubernetes.io/component in (identity,policy,injector)"):
        copy: Object = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "copy", "namespace": "default", "annotations": {"pillion.dev/inject": "disabled"}},
            "spec": {key: value for key, value in pod["spec"].items() if key in ("securityContext", "containers", "volumes")},
        }
        for container in copy["spec"]["containers"]:
            container["volumeMounts"] = [each for each in container["volumeMounts"] if not each["name"].startswith("kube-api-access")]
        copy["spec"]["volumes"] = [each for each in copy["spec"]["volumes"] if not each["name"].startswith("kube-api-access")]
        # a dry run in a namespace with the label shows what the level says about the pod
        kube.run("label", "namespace", "default", "pod-security.kubernetes.io/enforce=restricted", "--overwrite")
        try:
            kube.run("create", "--dry-run=server", "-f", "-", input=json.dumps(copy))
        finally:
            kube.run("label", "namespace", "default", "pod-security.kubernetes.io/enforce-")


def test_sidecars_run_the_compiled_modules_that_the_images_of_users_have(ground: Ground, space: Space) -> None:
    if ground.nodes is None or shutil.which("gcc") is None:
        pytest.skip("the images were not made here, or by a machine without a compiler")
    space.apply(client())
    space.ready("client")
    loaded = "import proxy.transport.relay; print(proxy.transport.relay.__file__)"
    assert space.exec("client", "python", "-c", loaded, container="pillion-proxy").strip().endswith(".so")


# --- check ---------------------------------------------------------------------------------------------------------------------------


def test_check_finds_nothing_wrong(kube: Kube, mesh: Space, space: Space) -> None:
    space.apply(client())
    space.ready("client")
    code, found = checked(kube, "--proxy", "-n", space.name, "--wait", "60")
    assert {row["id"]: row["error"] for row in found.values() if row["result"] == "error"} == {}
    assert code == 0
    assert set(found) == {check.id for category in [*catalogue.CONTROL_PLANE, *catalogue.DATA_PLANE] for check in category.checks}
    assert "1 of 1 pods have a sidecar" in found["injected"]["detail"]


def test_check_before_an_installation_knows_that_there_is_one(kube: Kube, mesh: Space) -> None:
    code, found = checked(kube, "--pre")
    assert code == 0
    assert found["pre-namespace"]["result"] == "skipped"
    assert "pillion upgrade" in found["pre-namespace"]["detail"]


def test_check_says_which_right_is_missing(kube: Kube, mesh: Space) -> None:
    with without(kube, "clusterrolebinding", "pillion-policy"):
        code, found = checked(kube, "--wait", "0")
    assert code == 1
    assert "service account pillion/pillion-policy may not list pods" in found["rbac-grants"]["error"]
    assert found["rbac-grants"]["hint"].startswith("pillion upgrade")


def test_check_says_which_right_is_too_much(kube: Kube, mesh: Space) -> None:
    kube.run("create", "clusterrolebinding", "too-much", "--clusterrole=view", "--serviceaccount=pillion:pillion-injector")
    kube.run("create", "clusterrolebinding", "much-too-much", "--clusterrole=cluster-admin", "--serviceaccount=pillion:pillion-injector")
    try:
        code, found = checked(kube, "--wait", "0")
    finally:
        kube.run("delete", "clusterrolebinding", "too-much", "much-too-much")
    assert "service account pillion/pillion-injector may list secrets, which it never does" in found["rbac-surplus"]["error"]
    assert code == 0, "a warning does not fail the check"


def test_check_waits_for_what_settles_and_says_what_does_not(kube: Kube, mesh: Space) -> None:
    mesh.run("scale", "deployment/pillion-policy", "--replicas=0")
    try:
        until("no policy controller", lambda: not mesh.pods("app.kubernetes.io/component=policy"))
        until("nobody answers for it", lambda: checked(kube, "--wait", "0")[1]["policy-answers"]["result"] == "error")
        code, found = checked(kube, "--wait", "0")
        assert code == 1
        assert "pillion-policy: 0 of 0 ready" in found["control-plane-ready"]["error"]
    finally:
        mesh.run("scale", "deployment/pillion-policy", "--replicas=1")
    code, found = checked(kube, "--wait", "120")
    assert found["control-plane-ready"]["result"] == "success"
    assert found["policy-answers"]["result"] == "success"


def test_check_shows_policies_without_effect_and_pods_without_sidecar(kube: Kube, mesh: Space, space: Space) -> None:
    space.apply(
        {
            "apiVersion": "policy.pillion.dev/v1alpha1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": "nobody"},
            "spec": {
                "targetRef": {"group": "policy.pillion.dev", "kind": "Server", "name": "gone"},
                "requiredAuthenticationRefs": [{"group": "policy.pillion.dev", "kind": "MeshTLSAuthentication", "name": "gone"}],
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "on-the-node"},
            "spec": {"hostNetwork": True, "containers": [{"name": "app", "image": "localhost/pause:1"}]},
        },
    )
    code, found = checked(kube, "--wait", "30", "-n", space.name)
    assert code == 0
    assert f"{space.name}/nobody" in found["policy-effective"]["error"]
    assert f"{space.name}/on-the-node: the pod uses the network of its node" in found["injected"]["error"]


# --- upgrade -------------------------------------------------------------------------------------------------------------------------


def test_upgrade_keeps_settings_and_the_authority(ground: Ground, mesh: Space) -> None:
    kube = ground.kube
    changed = ground.install("--set", "opaquePorts=25\\,3306", "--set", "logLevel=debug")
    issuer = mesh.json("get", "secret", "pillion-issuer")["data"]
    try:
        kube.apply(changed)
        done = pillion(kube, "upgrade", "--set", "logLevel=warning")
        assert done.returncode == 0, done.stderr
        kept = next(item for item in yaml.safe_load_all(done.stdout) if item["metadata"]["name"] == "pillion-config")
        settings = yaml.safe_load(kept["data"]["values.yaml"])
        assert (settings["opaquePorts"], settings["logLevel"], settings["image"]) == ("25,3306", "warning", ground.image)
        kube.apply(done.stdout)
        mesh.rolled_out(*CONTROL_PLANE)
        assert mesh.json("get", "secret", "pillion-issuer")["data"]["ca.crt"] == issuer["ca.crt"]
    finally:
        kube.apply(ground.install())
        mesh.rolled_out(*CONTROL_PLANE)


def test_upgrade_names_what_is_not_part_of_it_any_more(kube: Kube, mesh: Space) -> None:
    done = pillion(kube, "upgrade", "--set", "agent.enabled=false")
    assert "kubectl delete daemonset pillion-agent -n pillion" in done.stderr
    assert "secret" not in done.stderr


def test_upgrade_refuses_another_trust_domain(kube: Kube, mesh: Space) -> None:
    done = pillion(kube, "upgrade", "--set", "trustDomain=elsewhere.example")
    assert done.returncode == 1
    assert "cluster.local and cannot change" in done.stderr


def test_uninstall_is_refused_while_pods_have_sidecars(kube: Kube, mesh: Space, space: Space) -> None:
    space.apply(client())
    space.ready("client")
    done = pillion(kube, "uninstall")
    assert done.returncode == 1
    assert "pods still have sidecars" in done.stderr and not done.stdout
    forced = pillion(kube, "uninstall", "--force")
    objects = list(yaml.safe_load_all(forced.stdout))
    assert objects[0]["kind"] == "MutatingWebhookConfiguration" and objects[-1]["kind"] == "Namespace"
    assert not [item for item in objects if item["kind"] == "CustomResourceDefinition"]


# --- questions to what runs ----------------------------------------------------------------------------------------------------------


def test_authz_and_diagnostics_answer_about_pods_of_the_cluster(kube: Kube, mesh: Space, space: Space) -> None:
    server = {"podSelector": {"matchLabels": {"app": "client"}}, "port": 8080, "accessPolicy": "all-authenticated"}
    space.apply(client(), {"apiVersion": "policy.pillion.dev/v1alpha1", "kind": "Server", "metadata": {"name": "mine"}, "spec": server})
    space.ready("client")
    where = ["-n", space.name, "--kubeconfig", kube.kubeconfig]
    authz = until("the Server", lambda: [row for row in asked(kube, "authz", "client", *where) if row["server"]["name"] == "mine"])
    assert [row["port"] for row in authz] == [8080]
    report = asked(kube, "diagnostics", "policy", "client", "-p", "8080", *where)
    assert "mine" in json.dumps(report)
    address = f"{kube.json('get', 'pod', 'client', '-n', space.name)['status']['podIP']}:8080"
    assert asked(kube, "diagnostics", "endpoints", address, *where)[address]["ref"]["name"] == "client"
    config = asked(kube, "diagnostics", "config", "client", *where)
    assert "cluster.local" in json.dumps(config)
    assert "pod/client" in [row["workload"] for row in asked(kube, "stat", "--window", "1", *where)]
    done = pillion(kube, "diagnostics", "policy", "client", "-p", "1", *where, "-o", "json")
    assert done.returncode == 0
    gone = pillion(kube, "authz", "nobody", *where)
    assert gone.returncode == 1 and "no pod or workload 'nobody'" in gone.stderr


def asked(kube: Kube, *arguments: str) -> Any:
    done = pillion(kube, *arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- roles ---------------------------------------------------------------------------------------------------------------------------


def rules_of(kube: Kube, user: str, namespace: str) -> set[tuple[str, str, str, str]]:
    """(verb, group, resource, name) that a service account may do in a namespace, as the API server lists it to that account."""
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace}}
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{user.split(':')[2]}", "system:authenticated"]
    acting = [f"--as={user}", *(f"--as-group={group}" for group in groups)]
    answer = json.loads(kube.run("create", "--validate=false", *acting, "-f", "-", "-o", "json", input=json.dumps(review)))
    return {
        (verb, group, resource, name)
        for rule in answer["status"]["resourceRules"]
        for verb in rule["verbs"]
        for group in rule.get("apiGroups") or [""]
        for resource in rule.get("resources") or []
        for name in rule.get("resourceNames") or [""]
    }


@pytest.mark.parametrize("component", ["identity", "policy", "injector", "agent"])
def test_each_component_may_do_what_its_table_says_and_nothing_more(kube: Kube, mesh: Space, component: str) -> None:
    account = f"system:serviceaccount:pillion:pillion-{component}"
    anybody = {namespace: rules_of(kube, "system:serviceaccount:default:nobody", namespace) for namespace in ("pillion", "default")}
    asked = [question for grant in GRANTS if grant.component == component and grant.when != "given-issuer" for question in questions(grant)]
    for namespace in ("pillion", "default"):
        expected = {
            (q.verb, q.group, f"{q.resource}/{q.subresource}" if q.subresource else q.resource, q.name)
            for q in asked
            if q.namespace in ("", namespace)
        }
        assert rules_of(kube, account, namespace) - anybody[namespace] == expected


def test_the_issuers_key_is_in_one_secret_only(mesh: Space) -> None:
    key = mesh.json("get", "secret", "pillion-issuer")["data"]["tls.key"]
    assert b"PRIVATE KEY" in base64.b64decode(key)
    holders = [item["metadata"]["name"] for item in mesh.json("get", "secrets")["items"] if key in (item.get("data") or {}).values()]
    assert holders == ["pillion-issuer"]
    assert key not in json.dumps(mesh.json("get", "configmaps"))
