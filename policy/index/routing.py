"""Which routes act on the requests that somebody sends to a Service, and where these lead. Pure.

Gateway API for mesh: routes of the Service's own namespace act for everybody; routes of another namespace act for the clients of that
namespace only, and then alone; a GRPCRoute displaces HTTPRoutes on the same port. Only one level counts: routes of a backend are not
looked at. A backendRef into another namespace needs no ReferenceGrant (GEP-1294); one that resolves to nothing keeps its share, which
is answered with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from core.k8s.objects import Service, ServicePort
from core.refs import Ref
from policy import wire
from policy.forwarding import Forwarding, Reference, RuleForwarding, ServiceParent
from policy.gateway import InboundRoute
from policy.index.store import Store

Ready = Callable[[Service, ServicePort], tuple[wire.Endpoint, ...]]
"""The ready endpoints of a port of a Service."""


def means(parent: ServiceParent, service: Service, port: ServicePort) -> bool:
    """Is this port of the Service what a parentRef names?"""
    named = (parent.namespace, parent.name) == (service.metadata.namespace, service.metadata.name)
    return named and parent.port in (None, port.port) and parent.section in (None, port.name)


def rivals(store: Store, service: Service, port: ServicePort, namespace: str) -> list[InboundRoute]:
    """Every route of one namespace that could act on this port, oldest first; of these GRPCRoutes win over HTTPRoutes."""
    found = [
        route
        for route in store.routes_by_service.get((service.metadata.namespace, service.metadata.name), {}).values()
        if route.metadata.namespace == namespace and _acts(route.forwarding, service, port)
    ]
    return sorted(found, key=lambda route: route.metadata.age_key)


def _acts(forwarding: Forwarding | None, service: Service, port: ServicePort) -> bool:
    if forwarding is None or forwarding.unsupported:
        return False
    return any(means(parent, service, port) for parent in forwarding.parents)


def consumer_scope(store: Store, service: Service, namespace: str) -> str:
    """The client's namespace when it has routes of its own for the Service, else ""."""
    if namespace == service.metadata.namespace:
        return ""
    routes = store.routes_by_service.get((service.metadata.namespace, service.metadata.name), {}).values()
    return namespace if any(route.metadata.namespace == namespace for route in routes) else ""


def routing(
    store: Store, service: Service, port: ServicePort, namespace: str, ready: Ready
) -> tuple[tuple[wire.ServiceRoute, ...], tuple[wire.Backend, ...]]:
    """The routes for a client of a namespace, and the backends that they name by position."""
    own = service.metadata.namespace
    routes = rivals(store, service, port, namespace) if namespace not in ("", own) else []
    routes = routes or rivals(store, service, port, own)
    if any(route.kind == "grpc" for route in routes):
        routes = [route for route in routes if route.kind == "grpc"]
    backends: dict[wire.Backend, int] = {}
    made = []
    for route in routes:
        assert route.forwarding is not None, "rivals have one"
        actions = tuple(_action(store, rule, ready, backends) for rule in route.forwarding.rules)
        made.append(wire.ServiceRoute(route.ref, route.kind, route.hostnames, route.rules, actions))
    return tuple(made), tuple(backends)


def _action(store: Store, rule: RuleForwarding, ready: Ready, backends: dict[wire.Backend, int]) -> wire.Action:
    shares = tuple(_shares(store, rule.references, ready, backends))
    filters = rule.filters
    return wire.Action(shares, filters.request, filters.redirect, rule.timeouts, rule.retry, filters.response, filters.rewrite)


def _shares(store: Store, references: Iterable[Reference], ready: Ready, backends: dict[wire.Backend, int]) -> Iterator[wire.Share]:
    for reference in references:
        if reference.weight == 0:
            continue  # takes nothing, so it need not even exist
        position = backends.setdefault(_backend(store, reference, ready), len(backends))
        filters = reference.filters
        yield wire.Share(position, reference.weight, filters.request, filters.response, filters.rewrite)


def _backend(store: Store, reference: Reference, ready: Ready) -> wire.Backend:
    ref = Ref(reference.group, reference.kind, reference.namespace, reference.name)
    reason, sentence = unresolved(store, reference)
    if reason:
        return wire.Backend(ref, problem=sentence)
    service = store.services[reference.namespace][reference.name]
    return wire.Backend(ref, ready(service, next(_ports(service, reference.port))))


def _ports(service: Service, number: int | None) -> Iterator[ServicePort]:
    return (entry for entry in service.spec.ports if entry.port == number and entry.protocol == "TCP")


def unresolved(store: Store, reference: Reference) -> tuple[str, str]:
    """The reason for ResolvedRefs=False and a sentence, both "" for a backend that is there."""
    if (reference.group, reference.kind) != ("", "Service"):
        kind = f"{reference.kind}.{reference.group}" if reference.group else reference.kind
        return "InvalidKind", f"a backend is a Service, not a {kind[:100]}"
    service = store.services.get(reference.namespace, {}).get(reference.name)
    if service is None:
        return "BackendNotFound", f"there is no Service {reference.name} in namespace {reference.namespace}"
    if next(_ports(service, reference.port), None) is None:
        return "BackendNotFound", f"{service.ref} has no port {reference.port}"
    return "", ""
