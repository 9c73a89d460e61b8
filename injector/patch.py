"""The sidecar as a JSON patch (RFC 6902), and the application of such patches. Pure; called by the webhook and by the local runner.

Applied to the pod it was made for, the patch leaves a pod for which `decide` says ``already-injected``: injecting twice changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from injector import sidecar
from injector.decide import INJECTED, STATUS, Decision, Inject, Refuse, Skip, decide
from injector.options import Options
from injector.probes import UnknownPort, rewrite_probes

Operation = Mapping[str, Any]


class PatchFailed(ValueError):
    """A patch that does not fit the document; the text names the operation."""


def review(
    pod: Mapping[str, Any], namespace_annotations: Mapping[str, str], mesh: sidecar.Mesh = sidecar.DEFAULT_MESH
) -> tuple[Decision, list[Operation]]:
    """Decide, and build the patch (empty unless the decision is Inject)."""
    decision = decide(pod, namespace_annotations)
    if not isinstance(decision, Inject):
        return decision, []
    try:
        return decision, build_patch(pod, decision.options, mesh)
    except UnknownPort as error:
        return Refuse("invalid-probe", str(error)), []


def build_patch(pod: Mapping[str, Any], options: Options, mesh: sidecar.Mesh) -> list[Operation]:
    """Annotations, volumes, probes, and the sidecar as the first init container; raises probes.UnknownPort."""
    spec = pod.get("spec") or {}
    probes = [] if options.keep_probes else rewrite_probes(pod)
    operations = _annotations(pod, {**options.inherited, STATUS: INJECTED})
    if "volumes" not in spec:
        operations.append(_add("/spec/volumes", []))
    operations += [_add("/spec/volumes/-", volume) for volume in sidecar.volumes()]
    # before the insertion of the sidecar, which moves the other init containers
    operations += [{"op": "replace", "path": probe.path, "value": dict(probe.probe)} for probe in probes]
    if not spec.get("initContainers"):
        operations.append(_add("/spec/initContainers", []))
    operations.append(_add("/spec/initContainers/0", sidecar.container(pod, options, probes, mesh)))
    return operations


def _annotations(pod: Mapping[str, Any], wanted: Mapping[str, str]) -> list[Operation]:
    operations: list[Operation] = []
    metadata = pod.get("metadata")
    if metadata is None:
        operations.append(_add("/metadata", {}))
    if not (metadata or {}).get("annotations"):
        operations.append(_add("/metadata/annotations", {}))
    return operations + [_add(f"/metadata/annotations/{escape(key)}", value) for key, value in wanted.items()]


def _add(path: str, value: object) -> dict[str, Any]:
    return {"op": "add", "path": path, "value": value}


def escape(key: str) -> str:
    """A key as a segment of a JSON pointer (RFC 6901 section 3)."""
    return key.replace("~", "~0").replace("/", "~1")


def apply_patch(document: Mapping[str, Any], operations: Sequence[Operation]) -> dict[str, Any]:
    """The document after the operations ``add``, ``replace``, ``remove`` and ``test``, all of them or none; raises PatchFailed."""
    result: Any = copy.deepcopy(dict(document))
    for operation in operations:
        try:
            _apply(result, operation)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PatchFailed(f"{operation.get('op')} {operation.get('path')}: {error!r}") from None
    found: dict[str, Any] = result
    return found


def _apply(document: Any, operation: Operation) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    target = document
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    kind, value = operation["op"], copy.deepcopy(operation.get("value"))
    if isinstance(target, list):
        _apply_to_list(target, last, kind, value)
    elif kind == "add":
        target[last] = value
    elif last not in target:
        raise KeyError(last)
    elif kind == "replace":
        target[last] = value
    elif kind == "remove":
        del target[last]
    elif kind != "test" or target[last] != value:
        raise ValueError("the test failed" if kind == "test" else "unknown operation")


def _apply_to_list(target: list[Any], last: str, kind: str, value: Any) -> None:
    number = len(target) if last == "-" else int(last)
    if number < 0 or number > len(target) or (kind != "add" and number == len(target)):
        raise IndexError(number)
    if kind == "add":
        target.insert(number, value)
    elif kind == "replace":
        target[number] = value
    elif kind == "remove":
        del target[number]
    elif kind != "test" or target[number] != value:
        raise ValueError("the test failed" if kind == "test" else "unknown operation")


__all__ = ["Decision", "Inject", "Operation", "PatchFailed", "Refuse", "Skip", "apply_patch", "build_patch", "escape", "review"]
