"""What the controller says about an object in its status: per parent for routes, as conditions for our own kinds. Pure.

Retells what the index decided (policy.index), and writes nothing: `wanted` compares with what is stored and returns what has to be
written, so that a status that is right costs nothing. Rules of the Gateway API: ``status.parents[]`` is keyed by parentRef and
controllerName, entries of other controllers are kept as they are, our own that no parentRef names any more are dropped, and every
condition carries the generation it speaks of. Called by policy.status_writer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.refs import Ref
from policy.forwarding import Forwarding, ServiceParent
from policy.gateway import InboundRoute
from policy.index import Index, inbound
from policy.index.report import Problem
from policy.index.routing import displacing, means, unresolved
from policy.model import GATEWAY_GROUP, GROUP, AuthorizationPolicy

CONTROLLER = "pillion.dev/policy-controller"
_OWN_TYPES = ("Accepted", "ResolvedRefs", "Conflicted")
_MESSAGE_MAX = 1024
_CONFLICTS = {"overlap": "OlderServer", "routes-on-opaque": "RoutesOnOpaque"}
"""Problems of a Server (policy.index.report) that its status tells, with the condition's reason."""

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """What the API server has of an object, as far as its status needs it. refused: why this version was not understood, or ""."""

    ref: Ref
    api_version: str
    resource_version: str
    generation: int
    parents: tuple[Raw, ...]
    status: Raw


@dataclass(frozen=True)
class Verdict:
    """One condition without its bookkeeping. holds: status "True" or "False"."""

    type: str
    holds: bool
    reason: str
    message: str = ""


def read_stored(ref: Ref, raw: Raw) -> Stored:
    """From an object as it came; whatever is not of the expected shape counts as absent."""
    metadata, status = _dict(raw.get("metadata")), _dict(raw.get("status"))
    parents = _dict(raw.get("spec")).get("parentRefs")
    generation = metadata.get("generation")
    return Stored(
        ref,
        str(raw.get("apiVersion") or ""),
        str(metadata.get("resourceVersion") or ""),
        generation if isinstance(generation, int) else 0,
        tuple(_dict(parent) for parent in parents) if isinstance(parents, list) and ref.group == GATEWAY_GROUP else (),
        {key: [_dict(entry) for entry in status[key]] for key in ("parents", "conditions") if isinstance(status.get(key), list)},
    )


def wanted(index: Index, stored: Stored, refused: str, problems: Iterable[Problem], now: str) -> dict[str, Any] | None:
    """The status to write, None when what is stored says the same. now: RFC 3339, for conditions that change. refused: a sentence or ""."""
    if stored.ref.group == GATEWAY_GROUP:
        old = stored.status.get("parents") or []
        new = _parents(index, stored, refused, now, old)
        return {"parents": new} if new != old else None
    verdicts = list(own_verdicts(index, stored.ref, refused, problems))
    old = stored.status.get("conditions") or []
    new = _conditions(verdicts, old, stored.generation, now, keep_foreign=True)
    return {"conditions": new} if new != old else None


def _parents(index: Index, stored: Stored, refused: str, now: str, old: Sequence[Raw]) -> list[Raw]:
    mine = {_key(stored.ref, _dict(entry.get("parentRef"))): entry for entry in old if entry.get("controllerName") == CONTROLLER}
    entries: list[Raw] = [entry for entry in old if entry.get("controllerName") != CONTROLLER]
    for parent in stored.parents:
        verdicts = route_verdicts(index, stored.ref, parent, refused)
        if verdicts:
            before = mine.get(_key(stored.ref, parent), {})
            known = before.get("conditions")
            conditions = _conditions(verdicts, known if isinstance(known, list) else [], stored.generation, now, keep_foreign=False)
            entries.append({"parentRef": dict(parent), "controllerName": CONTROLLER, "conditions": conditions})
    if len(entries) == len(old) and all(entry in old for entry in entries):
        return list(old)  # the order of entries says nothing
    return entries


def route_verdicts(index: Index, ref: Ref, parent: Raw, refused: str) -> list[Verdict]:
    """What we say to one parentRef; nothing when the parent is somebody else's."""
    group, kind = parent.get("group", GATEWAY_GROUP), parent.get("kind", "Gateway")
    if (group, kind) == (GROUP, "Server"):
        return _server_parent(index, ref, parent, refused)
    if (group, kind) == ("", "Service"):
        return _service_parent(index, ref, parent, refused)
    return []


def _server_parent(index: Index, ref: Ref, parent: Raw, refused: str) -> list[Verdict]:
    name, namespace = str(parent.get("name")), ref.namespace
    if parent.get("namespace") not in (None, namespace):
        return [Verdict("Accepted", False, "NoMatchingParent", f"a Server is a parent only in its own namespace {namespace}")]
    if parent.get("port") is not None or parent.get("sectionName") is not None:
        return [Verdict("Accepted", False, "NoMatchingParent", "a Server has one port, so port and sectionName name nothing")]
    server = index.store.servers.get(namespace, {}).get(name)
    if server is None:
        return [Verdict("Accepted", False, "NoMatchingParent", f"there is no Server {name} in namespace {namespace}")]
    if refused:
        return [Verdict("Accepted", False, "UnsupportedValue", refused)]
    route = index.store.routes.get(namespace, {}).get(ref)
    if route is None or name not in route.servers:
        return [Verdict("Accepted", False, "Pending", "not read yet")]
    conflict = inbound.conflict(index.store, server, route)
    if conflict:
        return [Verdict("Accepted", False, "Conflicted", conflict)]
    if route.unsupported:
        return [Verdict("Accepted", False, "UnsupportedValue", f"{route.unsupported}; the route lets nobody in")]
    return [Verdict("Accepted", True, "Accepted"), Verdict("ResolvedRefs", True, "ResolvedRefs")]


def _service_parent(index: Index, ref: Ref, parent: Raw, refused: str) -> list[Verdict]:
    name, namespace = str(parent.get("name")), str(parent.get("namespace") or ref.namespace)
    service = index.store.services.get(namespace, {}).get(name)
    if service is None:
        return [Verdict("Accepted", False, "NoMatchingParent", f"there is no Service {name} in namespace {namespace}")]
    if not service.vips:
        return [Verdict("Accepted", False, "NoMatchingParent", f"{service.ref} has no cluster IP, so nothing is sent to it")]
    meant = ServiceParent(namespace, name, parent.get("port"), parent.get("sectionName"))
    ports = [port for port in service.spec.ports if means(meant, service, port)]
    if not ports:
        return [Verdict("Accepted", False, "NoMatchingParent", f"{service.ref} has no such port")]
    if refused:
        return [Verdict("Accepted", False, "UnsupportedValue", refused)]
    route = index.store.objects.get(ref)
    if not isinstance(route, InboundRoute) or route.forwarding is None:
        return [Verdict("Accepted", False, "Pending", "not read yet")]
    if route.forwarding.unsupported:
        return [Verdict("Accepted", False, "UnsupportedValue", f"{route.forwarding.unsupported}; the route is not applied")]
    winner = displacing(index.store, service, ports, ref.namespace) if route.kind == "http" else None
    if winner is not None:
        message = f"{winner.ref} has the same parent, and a GRPCRoute takes precedence"
        return [Verdict("Accepted", False, "Conflicted", message)]
    return [Verdict("Accepted", True, "Accepted"), _resolved(index, route.forwarding)]


def _resolved(index: Index, forwarding: Forwarding) -> Verdict:
    """Of all backendRefs, those of weight 0 included; the message names each that is wrong."""
    references = dict.fromkeys(reference for rule in forwarding.rules for reference in rule.references)
    wrong = [found for reference in references if (found := unresolved(index.store, reference))[0]]
    if not wrong:
        return Verdict("ResolvedRefs", True, "ResolvedRefs")
    return Verdict("ResolvedRefs", False, wrong[0][0], "; ".join(dict.fromkeys(sentence for _, sentence in wrong)))


def own_verdicts(index: Index, ref: Ref, refused: str, problems: Iterable[Problem]) -> Iterable[Verdict]:
    """Conditions of a Server, AuthorizationPolicy, MeshTLSAuthentication or NetworkAuthentication."""
    object_ = index.store.objects.get(ref)
    if refused:
        yield Verdict("Accepted", False, "Invalid", refused)
    elif isinstance(object_, AuthorizationPolicy) and (missing := _missing_target(index, object_)):
        yield Verdict("Accepted", False, "NoMatchingTarget", missing)
    else:
        yield Verdict("Accepted", True, "Accepted")
    if isinstance(object_, AuthorizationPolicy):
        problem = inbound.grant(index.store, object_, index.settings).problem
        yield Verdict("ResolvedRefs", not problem, "RefNotFound" if problem else "ResolvedRefs", problem)
    conflicts = [problem for problem in problems if problem.reason in _CONFLICTS]
    if conflicts:
        yield Verdict("Conflicted", True, _CONFLICTS[conflicts[0].reason], "; ".join(problem.message for problem in conflicts))


def _missing_target(index: Index, policy: AuthorizationPolicy) -> str:
    target = policy.target
    if target.kind == "Namespace" or target in index.store.objects:
        route = index.store.objects.get(target)
        attached = not isinstance(route, InboundRoute) or route.servers
        return "" if attached else f"{target} names no Server as its parent, so the policy has no effect"
    return f"{target} does not exist, so the policy has no effect"


def _conditions(verdicts: Iterable[Verdict], old: Sequence[Any], generation: int, now: str, *, keep_foreign: bool) -> list[Raw]:
    known = {entry["type"]: entry for entry in old if isinstance(entry, dict) and isinstance(entry.get("type"), str)}
    result: list[Raw] = [entry for type_, entry in known.items() if keep_foreign and type_ not in _OWN_TYPES]
    for verdict in verdicts:
        before = known.get(verdict.type, {})
        status = "True" if verdict.holds else "False"
        result.append(
            {
                "type": verdict.type,
                "status": status,
                "reason": verdict.reason,
                "message": verdict.message[:_MESSAGE_MAX],
                "observedGeneration": generation,
                "lastTransitionTime": before.get("lastTransitionTime", now) if before.get("status") == status else now,
            }
        )
    return list(old) if len(result) == len(old) and all(entry in old for entry in result) else result


def _key(ref: Ref, parent: Raw) -> tuple[str, ...]:
    defaults = (
        ("group", GATEWAY_GROUP),
        ("kind", "Gateway"),
        ("namespace", ref.namespace),
        ("name", ""),
        ("sectionName", None),
        ("port", None),
    )
    return tuple(str(parent.get(field, default)) for field, default in defaults)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
