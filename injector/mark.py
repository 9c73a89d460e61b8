"""The annotation that asks for the sidecar, as `pillion inject` writes it and `pillion uninject` takes it back. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from injector.fixed import BEFORE, INJECT
from injector.patch import json_object_untrusted


def wish_of(pod: Mapping[str, Any]) -> str | None:
    """What the annotation says on a pod, pod template or namespace; None without it. Any shape will do."""
    metadata = pod.get("metadata")
    annotations = metadata.get("annotations") if isinstance(metadata, dict) else None
    found = annotations.get(INJECT) if isinstance(annotations, dict) else None
    return None if found is None else str(found)


def mark(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The pod with the annotation; `unmark` is the inverse. Raises ValueError for metadata or annotations that are no objects."""
    metadata = {} if pod.get("metadata") is None else pod["metadata"]
    annotations = metadata.get("annotations", {}) if isinstance(metadata, dict) else None
    annotations = {} if annotations is None and isinstance(metadata, dict) else annotations
    if not isinstance(metadata, dict) or not isinstance(annotations, dict):
        raise ValueError("expected objects at metadata and metadata.annotations")
    empty = {name: parent[name] for name, parent in (("metadata", pod), ("annotations", metadata)) if name in parent and not parent[name]}
    note = {BEFORE: json.dumps({"empty": empty}, separators=(",", ":"))} if empty else {}
    return {**pod, "metadata": {**metadata, "annotations": {**annotations, INJECT: "enabled", **note}}}


def unmark(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The pod without the annotation, unchanged unless it says ``enabled``."""
    if wish_of(pod) != "enabled":
        return dict(pod)
    metadata = dict(pod["metadata"])
    annotations = dict(metadata.pop("annotations"))
    del annotations[INJECT]
    note = json_object_untrusted(str(annotations.get(BEFORE)))
    empty = note.get("empty")
    if note.keys() == {"empty"} and isinstance(empty, dict):
        del annotations[BEFORE]
    else:
        empty = {}
    if annotations:
        metadata["annotations"] = annotations
    elif "annotations" in empty:
        metadata["annotations"] = empty["annotations"]
    rest = {key: value for key, value in pod.items() if key != "metadata"}
    if metadata:
        return {**pod, "metadata": metadata}
    return {**rest, "metadata": empty["metadata"]} if "metadata" in empty else rest
