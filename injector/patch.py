"""The sidecar as a JSON patch (RFC 6902), and the application of such patches. Pure; called by the webhook and by the local runner.

Applied to the pod it was made for, the patch leaves a pod for which `review` makes no further patch: injecting twice changes nothing.
`injector.undo` is its inverse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from core.k8s.fields import InvalidObject
from injector import sidecar
from injector.decide import Decision, Inject, Refuse, Skip, decide, declared_ports
from injector.fixed import BEFORE, DEFAULT_CONTAINER, INJECTED, SIDECAR_NAME, STATUS
from injector.mesh import DEFAULT_MESH, Mesh
from injector.options import PREFIX, InvalidOption, Options, read_options
from injector.probes import Rewritten, UnknownPort, rewrite_probes
from injector.shape import checked

Operation = Mapping[str, Any]


_HOST_USERS = (
    "the pod has a user namespace of its own (hostUsers: false), where the node's agent does not know the sidecar by its uid: "
    f"expected annotation {PREFIX}capture: init beside it"
)


class PatchFailed(ValueError):
    """A patch that does not fit the document; the text names the operation."""


def review(pod: Mapping[str, Any], namespace_annotations: Mapping[str, str], mesh: Mesh = DEFAULT_MESH) -> tuple[Decision, list[Operation]]:
    """Decide, and build the patch. It is empty unless the decision is Inject, or a pod injected before has new probes since then."""
    try:
        found = checked(pod)
    except InvalidObject as error:
        return Refuse("invalid-pod", f"this is no pod: {error}"), []
    decision = decide(found, namespace_annotations, mesh.defaults)
    try:
        if isinstance(decision, Inject):
            if found["spec"].get("hostUsers") is False and sidecar.captured_by(decision.options, mesh) == "agent":
                return Refuse("host-users", _HOST_USERS), []
            return decision, build_patch(found, decision.options, mesh, pod)
        if isinstance(decision, Skip) and decision.reason == "already-injected":
            annotations = (found.get("metadata") or {}).get("annotations") or {}
            options = read_options(annotations, namespace_annotations, declared_ports(found), mesh.defaults)
            return decision, supplement(found, options, pod)
    except UnknownPort as error:
        return Refuse("invalid-probe", str(error)), []
    except InvalidOption as error:
        return Refuse("invalid-option", str(error)), []
    return decision, []


def build_patch(pod: Mapping[str, Any], options: Options, mesh: Mesh, raw: Mapping[str, Any]) -> list[Operation]:
    """Annotations, volumes, probes, and the sidecar before the user's init containers; raises probes.UnknownPort.

    raw: the pod; pod: as `shape.checked` returns it. Capture comes first of all, so that nothing goes around the
    sidecar, not even before it runs.
    """
    spec = pod["spec"]
    native = mesh.native_sidecar if options.native_sidecar is None else options.native_sidecar
    probes = [] if options.keep_probes else rewrite_probes(pod)
    wanted = {**options.settled, STATUS: INJECTED}
    if not native and DEFAULT_CONTAINER not in (pod.get("metadata", {}).get("annotations") or {}):
        wanted[DEFAULT_CONTAINER] = spec["containers"][0]["name"]  # else kubectl logs and exec mean the first one: the sidecar
    operations = _annotations(pod, wanted, _before(pod, raw, wanted, probes))
    if "volumes" not in spec:
        operations.append(_add("/spec/volumes", []))
    operations += [_add("/spec/volumes/-", volume) for volume in sidecar.volumes()]
    # before containers are inserted, which moves the others
    operations += [{"op": "replace", "path": probe.path, "value": dict(probe.probe)} for probe in probes]
    proxy = sidecar.container(pod, options, probes, mesh, native=native)
    capture = sidecar.capture_container(options, mesh, native=native)
    first = [found for found in (capture, proxy if native else None) if found is not None]
    if first and not spec.get("initContainers"):
        operations.append(_add("/spec/initContainers", []))
    operations += [_add(f"/spec/initContainers/{number}", found) for number, found in enumerate(first)]
    if not native:
        # first, so that its postStart holds the others; last when it does not
        operations.append(_add("/spec/containers/0" if options.await_ready else "/spec/containers/-", proxy))
    return operations


def _annotations(pod: Mapping[str, Any], wanted: Mapping[str, str], before: Mapping[str, Any]) -> list[Operation]:
    operations: list[Operation] = []
    metadata = pod.get("metadata")
    if metadata is None:
        operations.append(_add("/metadata", {}))
    if not (metadata or {}).get("annotations"):
        operations.append(_add("/metadata/annotations", {}))
    values = {**wanted, BEFORE: _compact(before)} if before else wanted
    return operations + [_add(f"/metadata/annotations/{escape(key)}", value) for key, value in values.items()]


def _before(
    pod: Mapping[str, Any], raw: Mapping[str, Any], wanted: Mapping[str, str], probes: Sequence[Rewritten]
) -> dict[str, dict[str, Any]]:
    """What cannot be seen any more once the patch is applied; empty for an ordinary pod."""
    present = pod.get("metadata", {}).get("annotations") or {}
    added = {key: present.get(key) for key in wanted if key != STATUS or key in present}
    if BEFORE in present:
        added[BEFORE] = present[BEFORE]
    originals: dict[str, Any] = {}
    for probe in probes:
        originals.setdefault(probe.container, {})[probe.kind] = _at(raw, probe.path)
    parents = {"metadata": raw, "annotations": raw.get("metadata") or {}, "volumes": raw["spec"], "initContainers": raw["spec"]}
    empty = {name: parent[name] for name, parent in parents.items() if name in parent and not parent[name]}
    return {name: value for name, value in (("annotations", added), ("probes", originals), ("empty", empty)) if value}


def supplement(pod: Mapping[str, Any], options: Options, raw: Mapping[str, Any]) -> list[Operation]:
    """For a pod that was injected before: the probes and ports that another webhook has added since; raises probes.UnknownPort."""
    annotations = (pod.get("metadata") or {}).get("annotations") or {}
    place = _place_of_sidecar(pod["spec"])
    if annotations.get(STATUS) != INJECTED or place is None:
        return []
    path, proxy = place
    env = {entry.get("name"): (number, entry.get("value")) for number, entry in enumerate(proxy.get("env") or [])}
    probes = [] if options.keep_probes or "PILLION_PROBES" not in env else rewrite_probes(pod)
    operations: list[Operation] = [{"op": "replace", "path": probe.path, "value": dict(probe.probe)} for probe in probes]
    values = {"PILLION_INBOUND_PORTS": sidecar.inbound_ports_text(pod)}
    if probes:
        asked = json_object_untrusted((env["PILLION_PROBES"][1] or "{}").replace("$$", "$"))
        values["PILLION_PROBES"] = sidecar.probes_text({**asked, **{probe.key: probe.original for probe in probes}})
        before = json_object_untrusted(annotations.get(BEFORE, "{}"))
        originals = before["probes"] = before["probes"] if isinstance(before.get("probes"), dict) else {}
        for probe in probes:
            known = originals.get(probe.container)
            originals[probe.container] = {**(known if isinstance(known, dict) else {}), probe.kind: _at(raw, probe.path)}
        operations.append(_add(f"/metadata/annotations/{escape(BEFORE)}", _compact(before)))
    for name, value in values.items():
        if name in env and (env[name][1] or "") != value:
            operations.append(_add(f"{path}/env/{env[name][0]}/value", value))
    return operations


def _place_of_sidecar(spec: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    for field in ("initContainers", "containers"):
        for number, container in enumerate(spec.get(field) or []):
            if container["name"] == SIDECAR_NAME:
                return f"/spec/{field}/{number}", container
    return None


def json_object_untrusted(text: str) -> dict[str, Any]:
    """A JSON object; an empty one for everything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _add(path: str, value: object) -> dict[str, Any]:
    return {"op": "add", "path": path, "value": value}


def escape(key: str) -> str:
    """A key as a segment of a JSON pointer (RFC 6901 section 3)."""
    return key.replace("~", "~0").replace("/", "~1")


def apply_patch(document: Mapping[str, Any], operations: Sequence[Operation]) -> dict[str, Any]:
    """The document after the operations ``add``, ``replace``, ``remove`` and ``test``, all of them or none; raises PatchFailed."""
    result: Any = unshared(document)
    for operation in operations:
        try:
            _apply(result, operation)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PatchFailed(f"{operation.get('op')} {operation.get('path')}: {error!r}") from None
    found: dict[str, Any] = result
    return found


def unshared(value: Any) -> Any:
    """A deep copy in which nothing stands twice: a YAML alias makes one list of two, and a change of one would be one of both."""
    if isinstance(value, Mapping):
        return {key: unshared(item) for key, item in value.items()}
    return [unshared(item) for item in value] if isinstance(value, list) else value


def _at(document: Any, path: str) -> Any:
    for part in path.split("/")[1:]:
        document = document[int(part)] if isinstance(document, list) else document[part.replace("~1", "/").replace("~0", "~")]
    return document


def _apply(document: Any, operation: Operation) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    target = document
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    kind, value = operation["op"], unshared(operation.get("value"))
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
