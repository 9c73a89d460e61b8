"""What `pillion local status` shows, and whether `up` may return: the mesh as one value. Called by local.supervisor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from core.k8s.source import Refusal
from local import protocol, services
from local.hints import hints
from local.mesh import Mesh
from local.pod import Pod


def report(
    name: str,
    state: Path,
    mesh: Mesh,
    refusals: Sequence[Refusal],
    control_plane: dict[str, str] | None = None,
    pid: int = 0,
    note: str = "",
) -> protocol.MeshStatus:
    """The present state. settled: what the folder says has become pods. note: how pods are captured here."""
    pods = tuple(pod_status(pod) for _, pod in sorted(mesh.pods.items()))
    refused = [str(refusal) for refusal in refusals] + [f"{ref}: {why}" for ref, why in sorted(mesh.refused.items())]
    reasons = [*refused]
    reasons += [f"{what}: {why}" for what, why in sorted(mesh.troubles.items())]
    control_plane = control_plane or {}
    reasons += [f"{part} is {what}" for part, what in control_plane.items() if what != "ready"]
    for pod in mesh.pods.values():
        if why := why_not_ready(pod):
            reasons.append(f"pod {pod.plan.ref.namespace}/{pod.plan.ref.name}: {why}")
    notes = ["images are ignored: every container is a process on this machine's file system", *([note] if note else [])]
    notes += [*_limits(mesh), *hints(mesh.manifests, mesh.known_services, mesh.facts(), mesh.api_objects)]
    return protocol.MeshStatus(
        name=name,
        ready=not reasons,
        settled=mesh.settled,
        reasons=tuple(reasons),
        notes=tuple(notes),
        pods=pods,
        services=tuple(_services(mesh)),
        control_plane=control_plane,
        pid=pid or os.getpid(),
        state=str(state),
        refused=tuple(refused),
    )


def why_not_ready(pod: Pod) -> str:
    """ "" for a pod that is ready, has ended well, or is on its way out."""
    if pod.ready or pod.phase == "Succeeded" or pod.stopping.is_set():
        return ""
    for container in pod.containers:
        state = container.state
        if pod.phase == "Failed" or (state.ready and container.plan.kind == "init"):
            break
        if not state.ready and (state.phase != "waiting" or state.trouble):
            failing = "; ".join(f"{name} probe: {why}" for name, why in state.trouble.items())
            log = f"see {container.log}" if state.exit_code else ""
            return ", ".join(part for part in (f"container {container.plan.name} {state.reason or 'is not ready'}", failing, log) if part)
    return pod.message or "not ready"


def pod_status(pod: Pod) -> protocol.PodStatus:
    """One pod."""
    ref, captured = pod.plan.ref, pod.captured
    return protocol.PodStatus(
        namespace=ref.namespace,
        name=ref.name,
        owner=f"{pod.plan.owner.kind}/{pod.plan.owner.name}",
        phase="Terminating" if pod.stopping.is_set() else pod.phase,
        ready=pod.ready,
        meshed=bool(pod.capture),
        message=pod.message,
        level=captured.level if captured else 0,
        capture=captured.name if captured else "",
        why_unmeshed=pod.why_unmeshed,
        addresses=pod.addresses.all,
        containers=tuple(
            protocol.ContainerStatus(
                container.plan.name,
                container.plan.kind,
                container.state.phase,
                container.state.ready,
                container.state.restarts,
                container.state.reason,
                dict(container.state.trouble),
                container.pid,
            )
            for container in pod.containers
        ),
    )


def _limits(mesh: Mesh) -> list[str]:
    """What a Service asks for and does not get."""
    notes = []
    for ref, manifest in sorted(mesh.manifests.items()):
        spec = manifest.raw.get("spec") or {}
        if ref.kind != "Service" or ref.group:
            continue
        if spec.get("type") in ("NodePort", "LoadBalancer"):
            notes.append(
                f"service {ref.namespace}/{ref.name}: type {spec['type']} works as ClusterIP, nothing reaches it from outside of the mesh"
            )
        others = sorted({str(port.get("protocol")) for port in spec.get("ports") or () if port.get("protocol") not in (None, "TCP")})
        if others:
            notes.append(f"service {ref.namespace}/{ref.name}: {', '.join(others)} passes without encryption or policy, as on a cluster")
    return notes


def _services(mesh: Mesh) -> list[protocol.ServiceStatus]:
    facts = mesh.facts()
    return [
        protocol.ServiceStatus(
            service.metadata.namespace,
            service.metadata.name,
            service.vips,
            tuple(port.port for port in service.spec.ports),
            tuple(dict.fromkeys(end.pod.addresses.v4 for front in services.fronts([service], facts) for end in front.backends)),
        )
        for service in mesh.known_services
    ]
