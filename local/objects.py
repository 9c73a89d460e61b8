"""Manifests as the local runner takes them: which kinds it runs, which it stores for the controllers, and a first look at their shape.

Pure. Called by local.supervisor as the ``parse`` of a folder source and for `pillion local apply`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from core.k8s.fields import InvalidObject, shown
from core.k8s.objects import ObjectMeta, group_kind, namespaced, read_meta
from core.refs import Ref
from policy.admission import parse_object

WORKLOADS = (
    ("apps", "Deployment"),
    ("apps", "StatefulSet"),
    ("apps", "DaemonSet"),
    ("apps", "ReplicaSet"),
    ("batch", "Job"),
    ("", "Pod"),
)
_USED = (*WORKLOADS, ("", "Namespace"), ("", "ServiceAccount"), ("", "Service"), ("", "ConfigMap"), ("", "Secret"))
POLICY_GROUPS = ("policy.pillion.dev", "gateway.networking.k8s.io")
_CLUSTER_WIDE = (("", "Namespace"),)


class Manifest(msgspec.Struct, frozen=True):
    """An object as somebody wrote it, with ``metadata.namespace`` filled in. raw must not be changed."""

    metadata: ObjectMeta
    ref: Ref
    raw: Mapping[str, Any]


def is_run(group: str, kind: str) -> bool:
    """Does the runner do anything with objects of this kind?"""
    return (group, kind) in _USED or group in POLICY_GROUPS


def read_manifest(raw: Mapping[str, Any]) -> Manifest | None:
    """The object, or None for a kind that means nothing without Kubernetes (Ingress, RBAC ...); raises InvalidObject."""
    group, kind = group_kind(raw)
    if not is_run(group, kind):
        return None
    if (group, kind) in _CLUSTER_WIDE:
        meta = read_meta(raw)
        return Manifest(msgspec.structs.replace(meta, namespace=""), Ref(group, kind, "", meta.name), raw)
    raw = namespaced(raw)
    meta = read_meta(raw)
    if group in POLICY_GROUPS:
        parse_object(raw)  # refused here already, where the author's file has a name
    if (group, kind) in WORKLOADS:
        check_pod_spec(pod_template(kind, raw).get("spec"), template_path(kind) + ".spec")
    return Manifest(meta, Ref(group, kind, meta.namespace, meta.name), raw)


def template_path(kind: str) -> str:
    """Where the pod template is inside a workload object; "" for a Pod, which is its own."""
    return "" if kind == "Pod" else "spec.template"


def pod_template(kind: str, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """metadata and spec of the pods of a workload; raises InvalidObject when there is none."""
    if kind == "Pod":
        return raw
    spec = raw.get("spec")
    template = spec.get("template") if isinstance(spec, Mapping) else None
    if not isinstance(template, Mapping):
        raise InvalidObject("spec.template", "a pod template", shown(template))
    if kind != "Job":
        _check_selector(spec, template)
    return template


def _check_selector(spec: Any, template: Mapping[str, Any]) -> None:
    labels = (template.get("metadata") or {}).get("labels") or {}
    wanted = ((spec or {}).get("selector") or {}).get("matchLabels") or {}
    for key, value in wanted.items():
        if labels.get(key) != value:
            raise InvalidObject("spec.selector.matchLabels", f"labels that the pod template has ({key}: {labels.get(key)})", shown(value))


def check_pod_spec(spec: object, path: str) -> None:
    """Refuse what would crash the runner later; raises InvalidObject naming the field."""
    path = path.lstrip(".")
    if not isinstance(spec, Mapping):
        raise InvalidObject(path, "a pod spec", shown(spec))
    names: set[str] = set()
    for field in ("initContainers", "containers"):
        containers = spec.get(field) or ([] if field == "initContainers" else None)
        if not isinstance(containers, list) or (field == "containers" and not containers):
            raise InvalidObject(f"{path}.{field}", "a list of containers", shown(containers))
        for number, container in enumerate(containers):
            _check_container(container, f"{path}.{field}[{number}]", names)
    if not isinstance(spec.get("volumes") or [], list):
        raise InvalidObject(f"{path}.volumes", "a list of volumes", shown(spec.get("volumes")))


def _check_container(container: object, path: str, names: set[str]) -> None:
    if not isinstance(container, Mapping):
        raise InvalidObject(path, "a container", shown(container))
    name = container.get("name")
    if not isinstance(name, str) or not name or "/" in name or name in names or name in (".", ".."):
        raise InvalidObject(f"{path}.name", "a name that no other container of the pod has", shown(name))
    names.add(name)
    for field in ("command", "args"):
        words = container.get(field) or []
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise InvalidObject(f"{path}.{field}", "a list of strings", shown(words))
    if not container.get("command"):
        raise InvalidObject(
            f"{path}.command", "the program to run: the local runner has no images, so an entrypoint cannot be known", "nothing"
        )
    for field in ("env", "ports", "volumeMounts"):
        entries = container.get(field) or []
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise InvalidObject(f"{path}.{field}", "a list of objects", shown(entries))
    user = (container.get("securityContext") or {}).get("runAsUser")
    if user is not None and (not isinstance(user, int) or user <= 0):
        raise InvalidObject(
            f"{path}.securityContext.runAsUser", "a uid above 0: uid 0 would be root on this machine's own files", shown(user)
        )
