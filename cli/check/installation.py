"""Checks of what is installed: kinds, settings, roles, deployments and what runs in them."""

from __future__ import annotations

from functools import cache
from typing import Any

import trio
import yaml

from cli.check.cluster import COMPONENT, NAMESPACE, VERSION, Cluster, Object, some
from cli.check.model import Category, Check, Failed, Skipped
from cli.render.chart import load_chart, render
from cli.render.values import checked, retained
from core.k8s.access import GRANTS, Component, Grant, Question, questions, variants
from core.k8s.errors import ApiError
from ebpf.plan import CONNECT, NAMES, REFUSED
from injector.mesh import InvalidMesh, Mesh, read_mesh

COMPONENTS: tuple[Component, ...] = ("identity", "policy", "injector")
_INSTALL = "pillion install | kubectl apply -f -"
_UPGRADE = "pillion upgrade | kubectl apply -f -"
_AT_ONCE = 8  # reviews asked at the same time


@cache
def own_kinds() -> tuple[Object, ...]:
    """Our CustomResourceDefinitions, as this version has them."""
    return tuple(item for item in render(load_chart(), {}) if item["kind"] == "CustomResourceDefinition")


async def kinds_established(cluster: Cluster) -> str:
    """Our four."""
    missing = []
    for item in own_kinds():
        found = await cluster.find("apiextensions.k8s.io", "v1", "customresourcedefinitions", item["metadata"]["name"])
        if not _condition(found or {}, "Established"):
            missing.append(item["metadata"]["name"])
    if missing:
        raise Failed(f"not there, or not served: {', '.join(missing)}")
    return f"{len(own_kinds())} kinds"


async def kinds_current(cluster: Cluster) -> None:
    """Their schemas are this version's."""
    other = []
    for item in own_kinds():
        found = await cluster.find("apiextensions.k8s.io", "v1", "customresourcedefinitions", item["metadata"]["name"])
        if found and _schemas(found) != _schemas(item):
            other.append(item["metadata"]["name"])
    if other:
        raise Failed(f"of another version than this command: {', '.join(other)}")


def _schemas(crd: Object) -> list[Any]:
    return [version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"]]


async def mesh_settings(cluster: Cluster) -> Mesh:
    """The installation's mesh.yaml; raises Failed."""
    config = await cluster.find("", "v1", "configmaps", "pillion-config", NAMESPACE)
    if config is None:
        raise Failed(f"ConfigMap {NAMESPACE}/pillion-config is not there")
    try:
        return read_mesh(str((config.get("data") or {}).get("mesh.yaml", "")).encode())
    except InvalidMesh as error:
        raise Failed(f"ConfigMap {NAMESPACE}/pillion-config, mesh.yaml: {error}") from None


async def settings_readable(cluster: Cluster) -> str:
    """What the injector reads."""
    mesh = await mesh_settings(cluster)
    return f"trust domain {mesh.trust_domain}, capture by {mesh.capture}"


async def settings_known(cluster: Cluster) -> None:
    """What `pillion upgrade` would render with."""
    await stored_values(cluster)


async def stored_values(cluster: Cluster) -> dict[str, Any]:
    """The settings of the installation, whole; raises Failed."""
    await mesh_settings(cluster)
    config = await cluster.find("", "v1", "configmaps", "pillion-config", NAMESPACE)
    try:
        return checked(retained(yaml.safe_load((config or {})["data"]["values.yaml"]))[0])
    except (AttributeError, KeyError, ValueError, TypeError, yaml.YAMLError) as error:
        raise Failed(f"ConfigMap {NAMESPACE}/pillion-config, values.yaml: {error}") from None


# --- roles ---------------------------------------------------------------------------------------------------------------------------


async def agent_installed(cluster: Cluster) -> bool:
    """Whether the installation has agents."""
    return "pillion-agent" in await cluster.ours("daemonsets")


async def accounts_exist(cluster: Cluster) -> None:
    """A service account for each component."""
    found = await cluster.ours("serviceaccounts", "")
    wanted = [*COMPONENTS, *(("agent",) if await agent_installed(cluster) else ())]
    missing = [f"pillion-{name}" for name in wanted if f"pillion-{name}" not in found]
    if missing:
        raise Failed(f"missing in namespace {NAMESPACE}: {', '.join(missing)}")


async def grants_hold(cluster: Cluster) -> str:
    """Everything in the table, asked one by one."""
    agent, kinds = await agent_installed(cluster), variants(await stored_values(cluster))
    grants = [grant for grant in GRANTS if grant.when in kinds and (agent or grant.component != "agent")]
    asked = [question for grant in grants for question in questions(grant)]
    refused = await _refused(cluster, asked)
    if refused:
        raise Failed("\n".join(_told(question) for question in refused))
    return f"{len(asked)} verbs"


async def nothing_more_granted(cluster: Cluster) -> None:
    """Rights that would make a component worth attacking."""
    dangerous = [
        Grant(component, group, (resource,), (verb,), "")
        for component in COMPONENTS
        for group, resource, verb in (
            ("", "secrets", "list"),
            ("", "secrets", "create"),
            ("", "pods", "create"),
            ("", "pods/exec", "create"),
            ("", "serviceaccounts/token", "create"),
            ("rbac.authorization.k8s.io", "clusterrolebindings", "create"),
        )
    ]
    asked = [question for grant in dangerous for question in questions(grant)]
    refused = await _refused(cluster, asked)
    surplus = [question for question in asked if question not in refused]
    if surplus:
        raise Failed(
            "\n".join(f"{_account(q)} may {_what(q)}, which it never does" for q in surplus), "kubectl get clusterrolebindings -o wide"
        )


async def _refused(cluster: Cluster, asked: list[Question]) -> list[Question]:
    """Those to which the API server says no, in order; raises ApiError."""
    answers: dict[Question, bool | ApiError] = {}
    limiter = trio.CapacityLimiter(_AT_ONCE)

    async def ask(question: Question) -> None:
        async with limiter:
            try:
                answer = await cluster.api.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", review_of(question))
                answers[question] = bool((answer.get("status") or {}).get("allowed"))
            except ApiError as error:
                answers[question] = error

    async with trio.open_nursery() as nursery:
        for question in asked:
            nursery.start_soon(ask, question)
    for answer in answers.values():
        if isinstance(answer, ApiError):
            raise answer
    return [question for question in asked if not answers[question]]


def review_of(question: Question) -> dict[str, Any]:
    """A SubjectAccessReview."""
    attributes = {
        "verb": question.verb,
        "group": question.group,
        "resource": question.resource,
        "subresource": question.subresource,
        "namespace": question.namespace,
        "name": question.name,
    }
    user = f"system:serviceaccount:{NAMESPACE}:pillion-{question.component}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated"]
    spec = {"user": user, "groups": groups, "resourceAttributes": {key: value for key, value in attributes.items() if value}}
    return {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}


def _told(question: Question) -> str:
    return f"{_account(question)} may not {_what(question)}"


def _account(question: Question) -> str:
    return f"service account {NAMESPACE}/pillion-{question.component}"


def _what(question: Question) -> str:
    resource = f"{question.resource}/{question.subresource}" if question.subresource else question.resource
    kind = f"{resource}.{question.group}" if question.group else resource
    return (
        f"{question.verb} {kind}"
        + (f" {question.name}" if question.name else "")
        + (f" in {question.namespace}" if question.namespace else "")
    )


# --- what runs -----------------------------------------------------------------------------------------------------------------------


async def deployments_exist(cluster: Cluster) -> None:
    """One for each component."""
    found = await cluster.ours("deployments")
    missing = [f"pillion-{name}" for name in COMPONENTS if f"pillion-{name}" not in found]
    if missing:
        raise Failed(f"missing in namespace {NAMESPACE}: {', '.join(missing)}")


async def replicas_ready(cluster: Cluster) -> str:
    """As many as asked for, of the newest version."""
    told, count = [], 0
    for name, item in sorted((await cluster.ours("deployments")).items()):
        wanted, status = int(item["spec"].get("replicas", 1)), item.get("status") or {}
        ready = min(int(status.get("readyReplicas", 0)), int(status.get("updatedReplicas", 0)))
        count += ready
        if not wanted or ready < wanted or int(status.get("observedGeneration", 0)) < int(item["metadata"].get("generation", 0)):
            told.append(f"{name}: {ready} of {wanted} ready{await _why(cluster, name)}")
    if told:
        raise Failed("\n".join(told))
    return f"{count} pods"


async def _why(cluster: Cluster, name: str) -> str:
    """What keeps a pod of a component from being ready, in the kubelet's words."""
    for pod in await cluster.objects("", "v1", "pods", NAMESPACE):
        labels, status = pod["metadata"].get("labels") or {}, pod.get("status") or {}
        if f"pillion-{labels.get(COMPONENT)}" != name:
            continue
        for container in status.get("containerStatuses") or []:
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return f" ({pod['metadata']['name']}: {waiting['reason']} {waiting.get('message', '')})".rstrip(" )") + ")"
        unscheduled = next((c for c in status.get("conditions") or [] if c["type"] == "PodScheduled" and c["status"] == "False"), None)
        if unscheduled:
            return f" ({pod['metadata']['name']}: {unscheduled.get('message')})"
    return ""


async def pods_stay_up(cluster: Cluster) -> None:
    """Containers that end again and again."""
    told = []
    for pod in await cluster.objects("", "v1", "pods", NAMESPACE):
        for container in (pod.get("status") or {}).get("containerStatuses") or []:
            ended = ((container.get("lastState") or {}).get("terminated")) or {}
            if int(container.get("restartCount", 0)) >= 3 and ended:
                last = f"{ended.get('reason')}, exit code {ended.get('exitCode')}: {str(ended.get('message') or '').strip()[-300:]}"
                told.append(f"{pod['metadata']['name']} ended {container['restartCount']} times; the last time: {last}")
    if told:
        raise Failed("\n".join(told), f"kubectl logs -n {NAMESPACE} POD --previous")


async def one_version(cluster: Cluster) -> str:
    """Everything of ours is of this command's version."""
    items = [*(await cluster.ours("deployments")).items(), *(await cluster.ours("daemonsets")).items()]
    other = [f"{name} is {found}" for name, item in items if (found := _version(item)) != cluster.version]
    if other:
        raise Failed(f"this command is {cluster.version}, {some(other)}")
    return cluster.version


def _version(item: Object) -> str:
    return str((item["metadata"].get("labels") or {}).get(VERSION, "unknown"))


async def replicated(cluster: Cluster) -> str:
    """In a cluster of several nodes, more than one of each."""
    nodes = await cluster.objects("", "v1", "nodes")
    if len(nodes) < 3:
        raise Skipped(f"the cluster has {len(nodes)} nodes")
    single = [name for name, item in (await cluster.ours("deployments")).items() if int(item["spec"].get("replicas", 1)) < 2]
    if single:
        raise Failed(f"one replica only: {', '.join(sorted(single))}")
    return ""


# --- capture -------------------------------------------------------------------------------------------------------------------------


async def agents_ready(cluster: Cluster) -> str:
    """On every node that takes them."""
    agent = (await cluster.ours("daemonsets")).get("pillion-agent")
    if agent is None:
        raise Skipped("no agent is installed: pods capture by an init container")
    status = agent.get("status") or {}
    wanted, ready = int(status.get("desiredNumberScheduled", 0)), int(status.get("numberReady", 0))
    if ready < wanted or not wanted:
        without = await _nodes_without_agent(cluster)
        raise Failed(f"{ready} of {wanted} agents are ready; not on: {some(without) or 'any node'}{await _why(cluster, 'pillion-agent')}")
    return f"{ready} nodes"


async def _nodes_without_agent(cluster: Cluster) -> list[str]:
    having = {pod["spec"].get("nodeName") for pod in await _agents(cluster) if _condition(pod, "Ready")}
    return sorted(node["metadata"]["name"] for node in await cluster.objects("", "v1", "nodes") if node["metadata"]["name"] not in having)


async def _agents(cluster: Cluster) -> list[Object]:
    found = await cluster.objects("", "v1", "pods", NAMESPACE)
    return [pod for pod in found if (pod["metadata"].get("labels") or {}).get(COMPONENT) == "agent"]


async def capture_level(cluster: Cluster) -> str:
    """What each node's kernel can do, as its agent found out."""
    if not await agent_installed(cluster):
        raise Skipped("no agent is installed: pods capture by an init container")
    told, names = [], set()
    for pod in await _agents(cluster):
        if not _condition(pod, "Ready") or pod["metadata"].get("deletionTimestamp"):
            continue  # agent-ready tells about it
        found = await cluster.raw(f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}:9991/proxy/status")
        node = found.get("node") or {}
        level = int(node.get("level", REFUSED))
        names.add(NAMES.get(level, str(level)))
        if level != CONNECT:
            why = "; ".join(f"{part}: {problem}" for part, problem in (node.get("ability") or {}).items() if problem)
            told.append(f"node {pod['spec'].get('nodeName')} (kernel {node.get('kernel')}): {NAMES.get(level, level)}. {why}")
    if told:
        raise Failed("\n".join(sorted(told)))
    return ", ".join(sorted(names))


def _condition(item: Object, type_: str) -> bool:
    return any(found["type"] == type_ and found["status"] == "True" for found in (item.get("status") or {}).get("conditions") or [])


KINDS = Category(
    "kinds",
    "Kinds of Pillion",
    (
        Check("crds", "Server, AuthorizationPolicy and authentications are served", "fatal", kinds_established, _INSTALL, settles=True),
        Check("crds-version", "their schemas are this version's", "warning", kinds_current, _UPGRADE),
    ),
)
SETTINGS = Category(
    "settings",
    "Settings",
    (
        Check("config", "the injector's settings can be read", "fatal", settings_readable, _INSTALL),
        Check("config-values", "the settings of the installation can be rendered again", "warning", settings_known, _INSTALL),
    ),
)
ROLES = Category(
    "rbac",
    "Roles",
    (
        Check("rbac-accounts", "every component has its service account", "fatal", accounts_exist, _INSTALL),
        Check("rbac-grants", "each may do what it has to", "error", grants_hold, _UPGRADE),
        Check("rbac-surplus", "none may do what it never does", "warning", nothing_more_granted),
    ),
)
CONTROL = Category(
    "control-plane",
    "Control plane",
    (
        Check("control-plane-exists", "identity, policy and injector are installed", "fatal", deployments_exist, _INSTALL),
        Check(
            "control-plane-ready",
            "all of their pods are ready",
            "error",
            replicas_ready,
            f"kubectl describe pods -n {NAMESPACE}",
            settles=True,
        ),
        Check("control-plane-restarts", "none of them ends again and again", "warning", pods_stay_up),
        Check("control-plane-version", "they are of this command's version", "warning", one_version, _UPGRADE),
        Check(
            "control-plane-replicas", "there is more than one of each", "warning", replicated, "pillion upgrade --ha | kubectl apply -f -"
        ),
    ),
)
CAPTURE = Category(
    "capture",
    "Capture",
    (
        Check(
            "agent-ready", "an agent is ready on every node", "error", agents_ready, f"kubectl describe pods -n {NAMESPACE}", settles=True
        ),
        Check("capture-level", "every node captures and shortens with eBPF", "warning", capture_level),
    ),
)
