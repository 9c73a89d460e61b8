"""Decides whether a pod gets a sidecar, and why not when it does not. Pure; called by the webhook and by the local runner.

The order and meaning of the reasons are Linkerd's injector's (``pkg/inject/report.go``), with two differences: a value that means nothing
is a refusal, not a skip, so that a typing error cannot leave a workload out of the mesh; and so is an app that runs as the sidecar's uid,
because capture lets that uid pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from injector.fixed import ADMIN_PORT, CAPTURE_NAME, INBOUND_PORT, INJECT, INJECTED, OUTBOUND_PORT, SIDECAR_NAME, SIDECAR_UID, STATUS
from injector.options import PREFIX, InvalidOption, Options, read_options

GRACE_S = 30  # Kubernetes: terminationGracePeriodSeconds of a pod that does not say

_SIDECAR_PORTS = (OUTBOUND_PORT, INBOUND_PORT, ADMIN_PORT)
_FOREIGN_NAMES = {"linkerd-proxy": "Linkerd", "linkerd-init": "Linkerd", "istio-proxy": "Istio", "istio-init": "Istio"}
_FOREIGN_IMAGES = {"linkerd/proxy": "Linkerd", "istio-release/proxyv2": "Istio", "istio/proxyv2": "Istio", "envoyproxy/envoy": "Envoy"}
"""By the end of their names: images come through mirrors."""


@dataclass(frozen=True)
class Inject:
    """The pod gets a sidecar with these options."""

    options: Options


@dataclass(frozen=True)
class Skip:
    """The pod stays as it is. reason: stable id, for events and metrics. sentence: for people."""

    reason: str
    sentence: str


@dataclass(frozen=True)
class Refuse:
    """The pod must not be created like this. reason, sentence: as in `Skip`."""

    reason: str
    sentence: str


Decision = Inject | Skip | Refuse


def decide(pod: Mapping[str, Any], namespace_annotations: Mapping[str, str], defaults: Mapping[str, str] | None = None) -> Decision:
    """What happens to a pod (a core/v1 Pod as JSON) in a namespace with these annotations. defaults: of the mesh, option -> text."""
    annotations = (pod.get("metadata") or {}).get("annotations") or {}
    spec = pod.get("spec") or {}
    wish = _wish(annotations, namespace_annotations)
    if wish is not None:
        return wish
    if spec.get("hostNetwork"):
        return Skip("host-network", "the pod uses the network of its node (hostNetwork: true), which a sidecar must not capture")
    if (spec.get("os") or {}).get("name") == "windows":
        return Skip("unsupported-os", "the pod runs on Windows, for which there is no sidecar")
    for container in containers(pod):
        if mesh := _foreign_mesh(container):
            return Skip("foreign-sidecar", f"the pod has a sidecar of {mesh} already: container {container.get('name')}")
    # before the next: what another webhook adds to an injected pod is looked at too
    if problem := _uid_problem(pod):
        return Refuse("sidecar-uid", problem)
    for container in containers(pod):
        if container.get("name") in (SIDECAR_NAME, CAPTURE_NAME):
            if annotations.get(STATUS) != INJECTED:
                return Refuse("reserved-name", f"container {container['name']} has a name of the sidecar's: expected another one")
            return Skip("already-injected", f"the pod has a container named {container['name']} already")
    if problem := _port_problem(pod):
        return Refuse("reserved-port", problem)
    try:
        options = read_options(annotations, namespace_annotations, declared_ports(pod), defaults)
    except InvalidOption as error:
        return Refuse("invalid-option", str(error))
    grace_s = spec.get("terminationGracePeriodSeconds", GRACE_S)
    if options.wait_before_exit_s and options.wait_before_exit_s >= grace_s:
        sentence = f"annotation {PREFIX}wait-before-exit is {options.wait_before_exit_s} s: expected less than the pod's "
        return Refuse("invalid-option", f"{sentence}terminationGracePeriodSeconds, which is {grace_s}")
    return Inject(options)


def wants(pod: Mapping[str, Any], namespace_annotations: Mapping[str, str]) -> bool:
    """Somebody wants this pod in the mesh, whatever stands against it."""
    annotations = (pod.get("metadata") or {}).get("annotations") or {}
    return _wish(annotations, namespace_annotations) is None


def _wish(annotations: Mapping[str, str], namespace_annotations: Mapping[str, str]) -> Skip | Refuse | None:
    """What `INJECT` on the pod, else on the namespace, says; None when it says yes."""
    for where, id_, found in (("pod", "workload", annotations), ("namespace", "namespace", namespace_annotations)):
        value = found.get(INJECT)
        if value is None:
            continue
        if value == "disabled":
            return Skip("disabled", f"annotation {INJECT} of the {where} is disabled")
        if value != "enabled":
            return Refuse(
                f"invalid-inject-annotation-at-{id_}", f"annotation {INJECT} of the {where} is {value[:80]!r}: expected enabled or disabled"
            )
        return None
    return Skip("not-annotated", f"neither the pod nor its namespace has the annotation {INJECT}: enabled")


def containers(pod: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Init containers and containers."""
    spec = pod.get("spec") or {}
    yield from spec.get("initContainers") or []
    yield from spec.get("containers") or []


def declared_ports(pod: Mapping[str, Any]) -> dict[str, int]:
    """Names of the declared TCP ports -> numbers; the first declaration of a name counts."""
    ports: dict[str, int] = {}
    for container in containers(pod):
        for port in container.get("ports") or []:
            if port.get("name") and port.get("protocol", "TCP") == "TCP":
                ports.setdefault(port["name"], port["containerPort"])
    return ports


def _foreign_mesh(container: Mapping[str, Any]) -> str | None:
    image = str(container.get("image") or "").partition("@")[0]
    repository, colon, tag = image.rpartition(":")
    bare = repository if colon and "/" not in tag else image
    return _FOREIGN_NAMES.get(str(container.get("name"))) or _FOREIGN_IMAGES.get("/".join(bare.split("/")[-2:]))


def _port_problem(pod: Mapping[str, Any]) -> str:
    """An app that listens where the sidecar does would end again and again, with nothing but its own word for why."""
    for container in containers(pod):
        for port in container.get("ports") or []:
            number = port.get("containerPort")
            if number in _SIDECAR_PORTS and port.get("protocol", "TCP") == "TCP":
                return f"container {container.get('name')} declares port {number}, where the sidecar listens: expected another one"
    return ""


def _uid_problem(pod: Mapping[str, Any]) -> str:
    spec = pod.get("spec") or {}
    if (spec.get("securityContext") or {}).get("runAsUser") == SIDECAR_UID:
        return f"spec.securityContext.runAsUser is {SIDECAR_UID}: that uid is the sidecar's and passes capture; expected another one"
    for container in containers(pod):
        if container.get("name") != SIDECAR_NAME and (container.get("securityContext") or {}).get("runAsUser") == SIDECAR_UID:
            name = container.get("name")
            return f"container {name} runs as uid {SIDECAR_UID}: that uid is the sidecar's and passes capture; expected another one"
    return ""
