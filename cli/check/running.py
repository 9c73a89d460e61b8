"""Checks of what runs: the deployments of the control plane, and the agents with what their nodes can do."""

from __future__ import annotations

from cli.check.cluster import COMPONENT, NAMESPACE, VERSION, Cluster, Object, condition, some
from cli.check.installation import COMPONENTS, INSTALL, UPGRADE, agent_installed
from cli.check.model import Category, Check, Failed, Skipped
from ebpf.plan import CONNECT, NAMES, REFUSED


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


async def agents_everywhere(cluster: Cluster) -> None:
    """The DaemonSet's own count knows only the nodes that it is let onto."""
    if not await agent_installed(cluster):
        raise Skipped("no agent is installed: pods capture by an init container")
    having = {pod["spec"].get("nodeName") for pod in await _agents(cluster)}
    left_out = [name for name in await _linux_nodes(cluster) if name not in having]
    if left_out:
        raise Failed(f"{some(left_out)}: its selector, affinity or tolerations keep the agent away, and a meshed pod there does not start")


async def _nodes_without_agent(cluster: Cluster) -> list[str]:
    having = {pod["spec"].get("nodeName") for pod in await _agents(cluster) if condition(pod, "Ready")}
    return [name for name in await _linux_nodes(cluster) if name not in having]


async def _linux_nodes(cluster: Cluster) -> list[str]:
    metas = [node["metadata"] for node in await cluster.objects("", "v1", "nodes")]
    return sorted(meta["name"] for meta in metas if (meta.get("labels") or {}).get("kubernetes.io/os", "linux") == "linux")


async def _agents(cluster: Cluster) -> list[Object]:
    found = await cluster.objects("", "v1", "pods", NAMESPACE)
    return [pod for pod in found if (pod["metadata"].get("labels") or {}).get(COMPONENT) == "agent"]


async def capture_level(cluster: Cluster) -> str:
    """What each node's kernel can do, as its agent found out."""
    if not await agent_installed(cluster):
        raise Skipped("no agent is installed: pods capture by an init container")
    told, names = [], set()
    for pod in await _agents(cluster):
        if not condition(pod, "Ready") or pod["metadata"].get("deletionTimestamp"):
            continue  # agent-ready tells about it
        found = await cluster.raw(f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}:9991/proxy/status")
        node = found.get("node") or {}
        level = int(node.get("level", REFUSED))
        names.add(str(node.get("level_name") or NAMES.get(level, level)))
        if level != CONNECT:
            why = "; ".join(f"{part}: {problem}" for part, problem in (node.get("ability") or {}).items() if problem)
            told.append(f"node {pod['spec'].get('nodeName')} (kernel {node.get('kernel')}): {NAMES.get(level, level)}. {why}")
    if told:
        raise Failed("\n".join(sorted(told)))
    return ", ".join(sorted(names))


CONTROL = Category(
    "control-plane",
    "Control plane",
    (
        Check("control-plane-exists", "identity, policy and injector are installed", "fatal", deployments_exist, INSTALL),
        Check(
            "control-plane-ready",
            "all of their pods are ready",
            "error",
            replicas_ready,
            f"kubectl describe pods -n {NAMESPACE}",
            settles=True,
        ),
        Check("control-plane-restarts", "none of them ends again and again", "warning", pods_stay_up),
        Check("control-plane-version", "they are of this command's version", "warning", one_version, UPGRADE),
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
        Check(
            "agent-everywhere",
            "no node is left out",
            "warning",
            agents_everywhere,
            f"kubectl get daemonset -n {NAMESPACE} pillion-agent -o yaml",
        ),
        Check("capture-level", "every node captures and shortens with eBPF", "warning", capture_level),
    ),
)
