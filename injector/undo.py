"""Takes out of a pod what injection put in, so that what is left is what was there before. Pure.

`injector.patch` notes in one annotation what cannot be seen any more: probes that were replaced, annotations that were added, fields that
were there but empty. Everything else is found by its name, so that edits made meanwhile stay. Called by `pillion uninject` and by the
local runner for pods that were injected by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from injector.fixed import BEFORE, CAPTURE_NAME, SIDECAR_NAME, STATUS
from injector.patch import json_object_untrusted, unshared
from injector.probes import KINDS
from injector.sidecar import BUNDLE_VOLUME, TOKEN_VOLUME

_OURS = {
    "containers": (SIDECAR_NAME, CAPTURE_NAME),
    "initContainers": (SIDECAR_NAME, CAPTURE_NAME),
    "volumes": (TOKEN_VOLUME, BUNDLE_VOLUME),
}


def is_injected(pod: Mapping[str, Any]) -> bool:
    """The sidecar or the injector's word is in the pod (or pod template). Any shape will do."""
    spec, metadata = _mapping(pod.get("spec")), _mapping(pod.get("metadata"))
    found = [item for field in ("initContainers", "containers") for item in _list(spec.get(field))]
    return STATUS in _mapping(metadata.get("annotations")) or any(_name(item) in (SIDECAR_NAME, CAPTURE_NAME) for item in found)


def uninject(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The pod without what `patch.build_patch` adds; unchanged when it was never injected. Any shape will do, nothing is raised."""
    found: dict[str, Any] = unshared(pod)
    if not is_injected(found):
        return found
    annotations = _mapping(_mapping(found.get("metadata")).get("annotations"))
    before = json_object_untrusted(str(annotations.get(BEFORE, "{}")))
    empty = _mapping(before.get("empty"))
    _restore_probes(found, _mapping(before.get("probes")))
    if isinstance(spec := found.get("spec"), dict):
        for field, names in _OURS.items():
            if isinstance(spec.get(field), list):
                spec[field] = [item for item in spec[field] if _name(item) not in names]
                _leave_empty(spec, field, empty)
    _restore_annotations(found, _mapping(before.get("annotations")), empty)
    return found


def _restore_annotations(pod: dict[str, Any], added: Mapping[str, Any], empty: Mapping[str, Any]) -> None:
    metadata = pod.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("annotations"), dict):
        return
    annotations = metadata["annotations"]
    for key, value in {STATUS: None, BEFORE: None, **added}.items():
        annotations.pop(key, None)
        if isinstance(value, str):
            annotations[key] = value
    _leave_empty(metadata, "annotations", empty)
    _leave_empty(pod, "metadata", empty)


def _restore_probes(pod: Mapping[str, Any], originals: Mapping[str, Any]) -> None:
    spec = _mapping(pod.get("spec"))
    for field in ("initContainers", "containers"):
        for container in _list(spec.get(field)):
            for kind, probe in _mapping(originals.get(_name(container))).items():
                if kind in KINDS and kind in container:
                    container[kind] = probe


def _leave_empty(parent: dict[str, Any], name: str, empty: Mapping[str, Any]) -> None:
    """An empty field goes, or becomes again the kind of empty that it was."""
    if parent[name]:
        return
    if name in empty and not empty[name]:
        parent[name] = empty[name]
    else:
        del parent[name]


def _name(item: object) -> str:
    return str(item.get("name")) if isinstance(item, dict) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
