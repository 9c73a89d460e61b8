"""Manifests as the local runner takes them: which kinds it runs, which it stores for the controllers, and a first look at their shape.

Pure. Called by local.supervisor as the ``parse`` of a folder source and for `pillion local apply`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from core.k8s import fields
from core.k8s.fields import InvalidObject, shown
from core.k8s.objects import ObjectMeta, group_kind, namespaced, read_meta
from core.refs import Ref
from injector.fixed import SIDECAR_UID
from injector.undo import uninject
from local import shapes
from policy import model
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
_IDLE = {
    "": {"Binding", "Endpoints", "Event", "LimitRange", "Node", "PersistentVolume", "PersistentVolumeClaim", "PodTemplate", "ResourceQuota"}
    | {"ReplicationController"},
    "apps": {"ControllerRevision"},
    "batch": {"CronJob"},
}
"""What else there is in the groups of `_USED`: any other kind there is a mistake in writing."""
POLICY_GROUPS = ("policy.pillion.dev", "gateway.networking.k8s.io")
_LINKERD_POLICY = "policy.linkerd.io"
_CLUSTER_WIDE = (("", "Namespace"),)
RESERVED_UIDS = frozenset({SIDECAR_UID, 2103, 2104})
"""The sidecar's, and those of identity service and policy controller (see local.control_plane)."""


class _ClaimMeta(msgspec.Struct, frozen=True):
    name: str


class _Claim(msgspec.Struct, frozen=True):
    metadata: _ClaimMeta


class _Labels(msgspec.Struct, frozen=True, rename="camel"):
    match_labels: dict[str, str] = {}


class _Selecting(msgspec.Struct, frozen=True):
    selector: _Labels = _Labels()


class Manifest(msgspec.Struct, frozen=True):
    """An object as somebody wrote it, with ``metadata.namespace`` filled in. raw must not be changed."""

    metadata: ObjectMeta
    ref: Ref
    raw: Mapping[str, Any]


def is_run(group: str, kind: str) -> bool:
    """Does the runner do anything with objects of this kind?"""
    return (group, kind) in _USED or group in POLICY_GROUPS


def read_manifest(raw: Mapping[str, Any]) -> Manifest | None:
    """The object, or None for a kind that means nothing without Kubernetes (Ingress, RBAC ...); raises InvalidObject.

    A policy of Linkerd's is refused: whoever brings one means it to keep somebody out.
    """
    group, kind = group_kind(raw)
    if group == _LINKERD_POLICY:
        expected = f"{model.GROUP}/{model.VERSION}, or for routes {model.GATEWAY_GROUP}/v1 (docs/policy.md says what differs)"
        raise InvalidObject("apiVersion", expected, shown(raw["apiVersion"]))
    if not is_run(group, kind):
        if kind not in _IDLE.get(group, {kind}):
            known = ", ".join(sorted(kind for of, kind in _USED if of == group))
            raise InvalidObject("kind", f"a kind of {group or 'v1'}, of which these mean something here: {known}", shown(kind))
        return None
    if (group, kind) in _CLUSTER_WIDE:
        meta = read_meta(raw)
        return Manifest(msgspec.structs.replace(meta, namespace=""), Ref(group, kind, "", meta.name), raw)
    raw = namespaced(raw)
    meta = read_meta(raw)
    if group in POLICY_GROUPS:
        parse_object(raw)  # refused here already, where the author's file has a name
    if (group, kind) in WORKLOADS:
        check_pod(_with_claims(kind, raw), template_path(kind))
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
    if not isinstance(spec, Mapping) or not isinstance(template, Mapping):
        raise InvalidObject("spec.template", "a pod template", shown(template))
    if kind != "Job":
        _check_selector(spec, template)
    return template


def _with_claims(kind: str, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The template with a StatefulSet's claimed volumes among its own; raises InvalidObject."""
    template = pod_template(kind, raw)
    claims = raw["spec"].get("volumeClaimTemplates") if kind == "StatefulSet" else None
    spec = template.get("spec")
    if not claims or not isinstance(spec, Mapping):
        return template
    names = [fields.read(claim, _Claim, f"spec.volumeClaimTemplates[{number}]").metadata.name for number, claim in enumerate(claims)]
    return dict(template, spec=dict(spec, volumes=[*(spec.get("volumes") or []), *({"name": name} for name in names)]))


def _check_selector(spec: Mapping[str, Any], template: Mapping[str, Any]) -> None:
    labels = fields.read(template.get("metadata") or {}, shapes.Meta, "spec.template.metadata").labels
    wanted = fields.read(spec, _Selecting, "spec").selector.match_labels
    for key, value in wanted.items():
        if labels.get(key) != value:
            raise InvalidObject("spec.selector.matchLabels", f"labels that the pod template has ({key}: {labels.get(key)})", shown(value))


def check_pod(template: Mapping[str, Any], path: str) -> None:
    """Refuse what would fail later; raises InvalidObject naming the field. path: of the template inside its object."""
    template = uninject(template)  # what was injected by hand is injected anew: local.injection
    fields.read(template.get("metadata") or {}, shapes.Meta, fields.join(path, "metadata"))
    where = fields.join(path, "spec")
    spec = template.get("spec")
    typed = fields.read(spec, shapes.PodSpec, where)
    _check_user(typed.security_context, where)
    if typed.host_network:
        raise InvalidObject(f"{where}.hostNetwork", "nothing or false: every pod here has a network of its own", "true")
    names: set[str] = set()
    volumes = {volume.name for volume in typed.volumes or ()}
    for field, containers in (("initContainers", typed.init_containers or ()), ("containers", typed.containers)):
        for number, container in enumerate(containers):
            _check_container(container, f"{where}.{field}[{number}]", names, volumes)


def _check_user(security: shapes.Security | None, path: str) -> None:
    """An app with a uid of ours would pass capture (the sidecar's), or read the authority's keys on the file system it shares with them."""
    if security is not None and security.run_as_user in RESERVED_UIDS:
        uids = ", ".join(map(str, sorted(RESERVED_UIDS)))
        raise InvalidObject(f"{path}.securityContext.runAsUser", f"a uid other than those of the mesh ({uids})", str(security.run_as_user))


def _check_container(container: shapes.Container, path: str, names: set[str], volumes: set[str]) -> None:
    _check_user(container.security_context, path)
    if container.name in names:
        raise InvalidObject(f"{path}.name", "a name that no other container of the pod has", shown(container.name))
    names.add(container.name)
    if not container.command:
        expected = "the program to run: the local runner has no images and cannot know an entrypoint"
        raise InvalidObject(f"{path}.command", expected, "nothing")
    for number, mount in enumerate(container.volume_mounts or ()):
        if mount.name not in volumes:
            expected = f"one of the pod's volumes ({', '.join(sorted(volumes)) or 'it has none'})"
            raise InvalidObject(f"{path}.volumeMounts[{number}].name", expected, shown(mount.name))
