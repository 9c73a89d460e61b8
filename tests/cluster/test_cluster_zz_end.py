"""Last, because it looks at what all tests did and then takes the mesh away: rights that were used, leaving, and coming back by Helm."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from core.k8s.access import GRANTS, Question, questions
from tests.cluster.conftest import PILLION, Ground
from tests.cluster.kube import AGENTS, CONTROL_PLANE, Kube, Space, until
from tools.helm import available, ensure

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
OURS = "app.kubernetes.io/part-of=pillion"

NEVER_LOGGED = {
    ("identity", "create", "configmaps"): "server-side apply of a new object is logged as patch, and needs create as well",
    (
        "identity",
        "patch",
        "events",
    ): "a refusal that repeats within minutes is counted by patch; in a run here none need repeat (unit tests do it)",
}
"""Rights that are needed without being seen, and why."""


# --- what was used -------------------------------------------------------------------------------------------------------------------


STARTED = datetime.now(UTC).isoformat()
"""What was forbidden before is an earlier session's: one that took roles away."""


def audited(log: Path) -> tuple[set[tuple[str, ...]], list[str]]:
    """(component, verb, group, resource/subresource, name) of what our components asked with success, and what was forbidden."""
    used, forbidden = set(), []
    for line in log.read_text("utf-8").splitlines():
        event = json.loads(line)
        user, ref = event["user"]["username"], event.get("objectRef")
        if not user.startswith("system:serviceaccount:pillion:pillion-") or ref is None:
            continue
        component = user.removeprefix("system:serviceaccount:pillion:pillion-")
        resource = f"{ref['resource']}/{ref['subresource']}" if ref.get("subresource") else ref["resource"]
        row = (component, event["verb"], ref.get("apiGroup", ""), resource, ref.get("name", ""))
        if (event.get("responseStatus") or {}).get("code") == 403:
            forbidden += [" ".join(row)] if event["requestReceivedTimestamp"] > STARTED else []
        else:
            used.add(row)
    return used, forbidden


def seen(question: Question, used: set[tuple[str, ...]]) -> bool:
    resource = f"{question.resource}/{question.subresource}" if question.subresource else question.resource
    named = question.name and question.verb not in ("create", "list", "watch")  # these have no name in their path
    return any(
        row[:4] == (question.component, question.verb, question.group, resource) and (not named or row[4] == question.name) for row in used
    )


@pytest.fixture(scope="module")
def audit_log(ground: Ground, request: pytest.FixtureRequest) -> Path:
    if ground.nodes is None:
        pytest.skip("the API server's audit log is out of reach")
    files = {item.path.name for item in takewhile(lambda item: item.path != request.path, request.session.items)}
    if not {f"test_cluster_{name}.py" for name in ("identity", "injection", "install", "workloads")} <= files:
        pytest.skip("looks at what the other tests made the components do, and these have not run before it")
    return ground.nodes.state / "log" / "audit.log"


@pytest.fixture(scope="module")
def everything_done(mesh: Space, make_space: Callable[..., Space]) -> None:
    """Statuses of every kind, which no other test needs to ask for."""
    space = make_space("kinds")
    api = "policy.pillion.dev/v1alpha1"
    ref = {"group": "policy.pillion.dev", "kind": "Server", "name": "s"}
    specs: dict[str, Any] = {
        "Server": {"podSelector": {}, "port": 80},
        "AuthorizationPolicy": {"targetRef": ref, "requiredAuthenticationRefs": []},
        "MeshTLSAuthentication": {"identities": ["*"]},
        "NetworkAuthentication": {"networks": [{"cidr": "10.0.0.0/8"}]},
    }
    space.apply(*({"apiVersion": api, "kind": kind, "metadata": {"name": "s"}, "spec": spec} for kind, spec in specs.items()))
    parent = {"group": "policy.pillion.dev", "kind": "Server", "name": "s"}
    for kind in ("HTTPRoute", "GRPCRoute"):
        meta = {"name": kind.lower()}
        space.apply({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind, "metadata": meta, "spec": {"parentRefs": [parent]}})
    for kind in [*specs, "HTTPRoute", "GRPCRoute"]:
        until(f"a status of {kind}", lambda kind=kind: all(item.get("status") for item in space.json("get", kind.lower())["items"]))  # type: ignore[misc]


def test_every_right_was_used_and_none_was_missing(audit_log: Path, everything_done: None) -> None:
    asked = [question for grant in GRANTS if grant.when != "given-issuer" for question in questions(grant)]

    def unused() -> list[Question]:
        used, _ = audited(audit_log)
        return [q for q in asked if not seen(q, used) and (q.component, q.verb, q.resource) not in NEVER_LOGGED]

    with suppress(AssertionError):  # what is said below names them
        until("every right used", lambda: not unused(), 90, 3)
    assert unused() == [], "rights that nobody used: the installation asks too much"
    # a test takes the policy controller's role away for a moment
    _, forbidden = audited(audit_log)
    assert [row for row in forbidden if not row.startswith("policy ")] == []


# --- leaving and coming back ---------------------------------------------------------------------------------------------------------


def left(kube: Kube) -> list[str]:
    """Everything with our label, and everything in our namespace."""
    kinds = [
        line
        for line in kube.run("api-resources", "--verbs=list", "-o", "name").split()
        if not line.startswith(("events", "componentstatuses"))
    ]
    found = kube.run("get", ",".join(kinds), "-A", "-l", OURS, "--no-headers", "-o", "name", "--ignore-not-found").split()
    return sorted(set(found))


@pytest.fixture
def alone(kube: Kube, mesh: Space) -> Kube:
    """No pod has a sidecar any more."""
    meshed = {
        pod["metadata"]["namespace"]
        for pod in kube.json("get", "pods", "-A")["items"]
        if "pillion-proxy" in [each["name"] for each in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]]
    }
    for name in meshed:
        kube.run("delete", "namespace", name, "--wait=false", "--ignore-not-found")
    # all that are on their way, or what is in them would still be named to be deleted and be gone by then
    until("no namespace is being deleted", lambda: not parting(kube), 240, 1)
    return kube


@contextmanager
def back_afterwards(ground: Ground, mesh: Space, request: pytest.FixtureRequest) -> Iterator[None]:
    """The mesh is installed again after the body, unless that succeeds and nobody comes after it."""
    needed = ground.stays or request.node is not request.session.items[-1]
    try:
        yield
    except BaseException:
        needed = True
        raise
    finally:
        if needed:
            _install_anew(ground, mesh)


def _install_anew(ground: Ground, mesh: Space) -> None:
    try:
        # first its pods: a namespace with pods is looked at again only after half of their grace period
        mesh.run("delete", "deployments,daemonsets", "--all")
        until("its pods have ended", lambda: not mesh.json("get", "pods")["items"])
        ground.kube.run("delete", "namespace", "pillion", "--ignore-not-found", timeout=240)
    finally:
        ground.kube.apply(ground.install())
        mesh.rolled_out(*CONTROL_PLANE, AGENTS)


def parting(kube: Kube) -> list[str]:
    return [each["metadata"]["name"] for each in kube.json("get", "namespaces")["items"] if "deletionTimestamp" in each["metadata"]]


def pillion(kube: Kube, *arguments: str) -> str:
    environment = {**os.environ, "KUBECONFIG": kube.kubeconfig}
    done = subprocess.run([*PILLION, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_uninstalled_nothing_is_left_but_policies_and_helm_installs_the_same(
    ground: Ground, mesh: Space, alone: Kube, request: pytest.FixtureRequest
) -> None:
    with back_afterwards(ground, mesh, request):
        _uninstall(alone)
        missing = available()
        if missing and os.environ.get("CI") != "true":
            pytest.skip(missing)
        _install_and_leave_by_helm(ground, alone)


def _uninstall(kube: Kube) -> None:
    kube.apply(
        {
            "apiVersion": "policy.pillion.dev/v1alpha1",
            "kind": "Server",
            "metadata": {"name": "kept", "namespace": "default"},
            "spec": {"podSelector": {}, "port": 80},
        }
    )
    kube.run("delete", "-f", "-", "--timeout=240s", input=pillion(kube, "uninstall"), timeout=300)
    crds = [name for name in left(kube) if name.startswith("customresourcedefinition")]
    assert len(crds) == 4
    assert [name for name in left(kube) if name not in crds] == []
    assert kube.json("get", "server.policy.pillion.dev", "kept", "-n", "default")["spec"]["port"] == 80
    kube.run("delete", "server.policy.pillion.dev", "kept", "-n", "default")
    kube.run("delete", *crds)


def _install_and_leave_by_helm(ground: Ground, kube: Kube) -> None:
    # the agent's Pod Security level is the namespace's, which Helm does not write
    kube.apply(
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": "pillion", "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
        }
    )
    chart = str(ROOT / "manifests" / "helm")
    images = ["--set", f"image={ground.image},agentImage={ground.agent_image}"]
    helm = [str(ensure()), "--kubeconfig", kube.kubeconfig, "--namespace", "pillion"]
    run = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run([*helm, "install", "pillion", chart, *images, "--wait", "--timeout=280s"], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    issuer = kube.json("get", "secret", "pillion-issuer", "-n", "pillion")["data"]
    answer = json.loads(pillion(kube, "check", "-o", "json", "--wait", "60"))
    assert answer["success"]
    done = subprocess.run([*helm, "upgrade", "pillion", chart, "--reuse-values", "--set", "logLevel=debug", "--wait"], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert kube.json("get", "secret", "pillion-issuer", "-n", "pillion")["data"] == issuer, "an upgrade keeps the authority"
    with pytest.raises(AssertionError, match="kept by Helm"):
        pillion(kube, "upgrade")
    done = subprocess.run([*helm, "uninstall", "pillion", "--wait"], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert len([name for name in left(kube) if name.startswith("customresourcedefinition")]) == 4, "policies outlive the release"
