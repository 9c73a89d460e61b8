"""When a cluster is whole again after its machines were disturbed: by facts that are younger than the disturbance.

What the API server shows of a pod or a node is what a kubelet said last, and one that was killed says nothing: "Ready" may be old news.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from tests.cluster.kube import (
    AGENTS,
    CONTROL_PLANE,
    OUTSIDE,
    Kube,
    Object,
    Refused,
    Space,
    client,
    container,
    pod,
    pod_spec,
    service,
    until,
)
from tests.cluster.nodes import Cluster

_LEADERS = ("controller-manager", "scheduler")
_NODE_CONTROLLER_S = 5
"""How often it looks at the nodes; it calls the pods of one that is not ready not ready."""
_PATIENCE_S = 240.0
"""Clients of Kubernetes ask a server that was away at intervals that grow to a minute."""


# --- a kubelet that was restarted ----------------------------------------------------------------------------------------------------


def restart_kubelet(machines: Cluster, number: int, space: Space) -> None:
    """Kill and start it; returns when what the API server shows of this namespace's pods there is what the new one says.

    A new kubelet calls its pods not ready until it has probed them. It tells its news in order: when a pod that began later is shown as
    ready, all that it said before its probes succeeded has been heard.
    """
    machine = machines.nodes[number]
    name = f"node{machine.number}"
    killed = datetime.now(UTC).replace(microsecond=0)
    machines.stop(machine, "kubelet", kill=True)
    machines.again(machine, "kubelet")
    until(f"the new kubelet of {name} has spoken", lambda: _heard(space.kube, name, killed), _PATIENCE_S)
    until(f"it has probed the pods of {name}", lambda: _probed(space, name), _PATIENCE_S)
    witness = f"witness-{machine.number}"
    space.apply(pod(witness, pod_spec(container(), nodeName=name, terminationGracePeriodSeconds=0), annotations=OUTSIDE))
    space.ready(witness)
    space.run("delete", "pod", witness, "--wait=false")
    until("its pods have been ready for a while", lambda: _stay_ready(space), _PATIENCE_S)


def _heard(kube: Kube, node: str, since: datetime) -> bool:
    """The node has been called ready since then."""
    conditions = kube.json("get", "node", node)["status"]["conditions"]
    ready = next(each for each in conditions if each["type"] == "Ready")
    return ready["status"] == "True" and datetime.fromisoformat(ready["lastHeartbeatTime"]) >= since


def _probed(space: Space, node: str) -> bool:
    """Every readiness probe of this namespace's pods on that node has succeeded since its kubelet began: its counts start at none."""
    wanted = {
        (pod["metadata"]["name"], container["name"])
        for pod in space.pods()
        if pod["spec"].get("nodeName") == node
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
        if "readinessProbe" in container
    }
    try:
        metrics = space.kube.run("get", "--raw", f"/api/v1/nodes/{node}/proxy/metrics/probes")
    except Refused:  # it does not listen yet
        return False
    rows = (dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in metrics.splitlines() if line.startswith("prober_probe_total{"))
    succeeded = {
        (row["pod"], row["container"])
        for row in rows
        if row["namespace"] == space.name and row["probe_type"] == "Readiness" and row["result"] == "successful"
    }
    return bool(wanted) and wanted <= succeeded


def _stay_ready(space: Space) -> bool:
    """For longer than the node controller needs to act on a node that was not ready for a moment."""
    end = time.monotonic() + _NODE_CONTROLLER_S + 2
    while time.monotonic() < end:
        if not all(is_ready(pod) for pod in space.pods()):
            return False
        time.sleep(0.5)
    return True


def is_ready(pod: Object) -> bool:
    return any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", []))


# --- an API server that was away -----------------------------------------------------------------------------------------------------


@contextmanager
def no_api_server(machines: Cluster) -> Iterator[None]:
    """While the body runs; afterwards it is there again, and so are the controllers that lead, and the rest of Kubernetes knows.

    The controllers end without it: where several run, one that cannot renew its lease ends and is started anew. Here only one runs and
    without a lease; it would go on, and take nodes that nobody could hear for dead ones. kube-proxy and the cluster's DNS would ask again
    after up to half a minute each, one after the other; they are started anew, since only ours are tested for how they come back.
    """
    first = machines.nodes[0]
    for program in _LEADERS:
        machines.stop(first, program)
    machines.stop(first, "apiserver", patience_s=1)  # deaf at once, it would still wait for watches, which have no end
    try:
        yield
    finally:
        machines.again(first, "apiserver")
        try:
            until("the API server is back", lambda: machines.kubectl("get", "--raw", "/readyz").returncode == 0, _PATIENCE_S)
        finally:
            for program in _LEADERS:
                machines.again(first, program)
        for node in machines.nodes:
            machines.stop(node, "kube-proxy")
            machines.again(node, "kube-proxy")
        restart = ("--namespace=kube-system", "rollout", "restart", "deployment/coredns")
        until("the cluster's DNS is restarted", lambda: machines.kubectl(*restart).returncode == 0, _PATIENCE_S)


def whole(space: Space, mesh: Space) -> None:
    """Returns when everything that the tests rely on works for what is new: for a Service and a pod made now, and on every node."""
    until("the nodes are ready", lambda: _nodes_ready(space.kube), _PATIENCE_S)
    mesh.rolled_out(*CONTROL_PLANE, AGENTS, seconds=_PATIENCE_S)
    Space(space.kube, "kube-system").rolled_out("deployment/coredns", seconds=_PATIENCE_S)
    number = f"{time.monotonic_ns()}"[-9:]
    new, server, led = f"new-{number}", pod(f"server-{number}"), f"led-{number}"
    until("pods are injected", lambda: _injected(space, client(new)), _PATIENCE_S)
    space.apply(client(new), server, service(led, selector=server["metadata"]["labels"], type="NodePort"))
    space.ready(new, server["metadata"]["name"], seconds=_PATIENCE_S)
    expected = f"spiffe://cluster.local/ns/{space.name}/sa/default"
    until("a new Service is called by its name, meshed", lambda: _caller(space, new, f"http://{led}/") == expected, _PATIENCE_S)
    port = space.json("get", "service", led)["spec"]["ports"][0]["nodePort"]
    for node in space.kube.json("get", "nodes")["items"]:
        address = next(each["address"] for each in node["status"]["addresses"] if each["type"] == "InternalIP")
        url = f"http://{address}:{port}/"
        until(f"{url} answers", lambda url=url: _caller(space, new, url) is not None, _PATIENCE_S)  # type: ignore[misc]
    space.run("delete", f"pod/{new}", f"pod/{server['metadata']['name']}", f"service/{led}", "--wait=false")


def _nodes_ready(kube: Kube) -> bool:
    with suppress(Refused):
        return all(is_ready(node) for node in kube.json("get", "nodes")["items"])
    return False


def _injected(space: Space, what: Object) -> bool:
    with suppress(Refused):
        return "pillion-proxy" in space.run("create", "--dry-run=server", "-o", "yaml", "-f", "-", input=json.dumps(what))
    return False


def _caller(space: Space, who: str, url: str) -> str | None:
    """Whom the called pod's sidecar saw, "" without an identity; None when nobody answered."""
    with suppress(Refused):
        answered = space.app(who, "call", url)
        if answered.get("status") == 200:
            return str(answered["body"]["headers"].get("pillion-client-id", ""))
    return None
