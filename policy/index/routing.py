"""Which routes act on the requests that somebody sends to a Service, and where these lead. Pure.

Gateway API for mesh: routes of the Service's own namespace act for everybody; routes of another namespace act for the clients of that
namespace only, and then alone; a GRPCRoute displaces HTTPRoutes on the same port. Only one level counts: routes of a backend are not
looked at. A backendRef into another namespace needs no ReferenceGrant (GEP-1294); one that resolves to nothing keeps its share, which
is answered with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

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


def displacing(store: Store, service: Service, ports: Sequence[ServicePort], namespace: str) -> InboundRoute | None:
    """The oldest GRPCRoute of one namespace that acts on some of these ports, so that HTTPRoutes do not.

    Takes as long as there are routes and ports, not as the product of both: a Service may have thousands.
    """
    numbers, names, both = ({port.port for port in ports}, {port.name for port in ports}, {(port.port, port.name) for port in ports})

    def meant(parent: ServiceParent) -> bool:
        if (parent.namespace, parent.name) != (service.metadata.namespace, service.metadata.name):
            return False
        if parent.port is None:
            return parent.section is None or parent.section in names
        return parent.port in numbers if parent.section is None else (parent.port, parent.section) in both

    found = (
        route
        for route in store.routes_by_service.get((service.metadata.namespace, service.metadata.name), {}).values()
        if route.kind == "grpc" and route.metadata.namespace == namespace
        if route.forwarding is not None and not route.forwarding.unsupported and any(map(meant, route.forwarding.parents))
    )
    return min(found, key=lambda route: route.metadata.age_key, default=None)


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
    backends = _Backends(store, ready)
    made = []
    for route in routes:
        assert route.forwarding is not None, "rivals have one"
        actions = tuple(_action(rule, backends) for rule in route.forwarding.rules)
        made.append(wire.ServiceRoute(route.ref, route.kind, route.hostnames, route.rules, actions))
    return tuple(made), tuple(backends.known)


class _Backends:
    """The backends of one Service's routes. Each is looked up once, however many rules name it: a Service may have 10,000 endpoints."""

    def __init__(self, store: Store, ready: Ready) -> None:
        self._store = store
        self._ready = ready
        self._positions: dict[tuple[Ref, int | None], int] = {}
        self.known: list[wire.Backend] = []

    def position(self, reference: Reference) -> int:
        """Where it stands in `known`."""
        ref = Ref(reference.group, reference.kind, reference.namespace, reference.name)
        position = self._positions.setdefault((ref, reference.port), len(self.known))
        if position == len(self.known):
            self.known.append(self._backend(ref, reference))
        return position

    def _backend(self, ref: Ref, reference: Reference) -> wire.Backend:
        reason, sentence = unresolved(self._store, reference)
        if reason:
            return wire.Backend(ref, problem=sentence)
        service = self._store.services[reference.namespace][reference.name]
        return wire.Backend(ref, self._ready(service, next(_ports(service, reference.port))))


def _action(rule: RuleForwarding, backends: _Backends) -> wire.Action:
    shares = tuple(_shares(rule.references, backends))
    filters = rule.filters
    return wire.Action(shares, filters.request, filters.redirect, rule.timeouts, rule.retry, filters.response, filters.rewrite)


def _shares(references: Iterable[Reference], backends: _Backends) -> Iterator[wire.Share]:
    for reference in references:
        if reference.weight == 0:
            continue  # takes nothing, so it need not even exist
        filters = reference.filters
        yield wire.Share(backends.position(reference), reference.weight, filters.request, filters.response, filters.rewrite)


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
