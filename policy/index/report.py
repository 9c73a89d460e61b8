"""Why the index answers as it does, for people: what is wrong with the objects, and what made the policy of a port. Pure.

Decides nothing; it retells the same steps (policy.index.inbound) that produce the answers. Called by policy.controller and its
diagnostics, for ``pillion check``, ``pillion authz`` and ``pillion diagnostics``. `problems` looks at everything there is, so it is not
for every change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_network
from itertools import islice

import msgspec

from core.k8s.objects import Namespace, Node, Object, Pod, Service
from core.refs import Ref
from policy import wire
from policy.forwarding import Forwarding
from policy.gateway import InboundRoute
from policy.index import inbound, options, routing
from policy.index.inbound import EVERYWHERE, Granted
from policy.index.index import Index
from policy.match import HEADER_NAMES_MAX, NAME_SETS_MAX, PATTERNS_MAX
from policy.model import AuthorizationPolicy, Server

_TOO_LARGE = (
    f"its routes and policies are longer than the {wire.MAX_LINE_BYTES >> 20} MiB that a sidecar reads, or its routes have more than "
    f"{PATTERNS_MAX} regular expressions, {HEADER_NAMES_MAX} header names or {NAME_SETS_MAX} sets of names, so everything is denied"
)
_OVERLAPS_SHOWN = 3  # for a Server: whether there are more, nobody needs to know, and finding out takes a look at all Servers for each pod


class Problem(msgspec.Struct, frozen=True, order=True):
    """Something that does not act as its author will have meant. reason: stable word. message: a sentence that names what to look at."""

    ref: Ref
    reason: str
    message: str


class GrantReport(msgspec.Struct, frozen=True):
    """One AuthorizationPolicy. clients: whom it lets in, in words. problem: why it lets nobody in, "" when it does."""

    policy: Ref
    target: Ref
    inherit: bool
    clients: str
    problem: str = ""


class RouteReport(msgspec.Struct, frozen=True):
    """One route that names the Server as parent. narrowed: what the Server and Namespace allow does not count."""

    route: Ref
    attached: bool
    narrowed: bool
    grants: list[GrantReport]
    problem: str = ""


class PortReport(msgspec.Struct, frozen=True):
    """How the policy of a port came about. why: a sentence. shadowed: Servers without effect. namespace_counts: False when narrowed."""

    namespace: str
    pod: str
    port: int
    why: str
    shadowed: list[Ref]
    grants: list[GrantReport]
    namespace_counts: bool
    routes: list[RouteReport]
    policy: wire.InboundPolicy


class AuthzRow(msgspec.Struct, frozen=True):
    """One line of ``pillion authz``: on this port, for this route (None: no route), this authorization lets these clients in."""

    port: int
    server: Ref
    route: Ref | None
    authorization: Ref | None
    clients: str


def explain(index: Index, namespace: str, pod: str, port: int) -> PortReport | None:
    """How the policy of a port came about; None when the pod is not known."""
    found = index.pod(namespace, pod)
    if found is None:
        return None
    policy = index.inbound_policy(namespace, pod, port)
    servers = inbound.servers_for(index.store, found, port)
    if not servers:
        default = inbound.port_default(index.store, found, port, index.settings)
        why = f"no Server selects the port; default policy {default.name} from {default.source}" + (
            f" ({default.problem})" if default.problem else ""
        )
        return PortReport(namespace, pod, port, why, [], [], False, [], policy)
    server, *others = servers
    grants = inbound.server_grants(index.store, server, index.settings)
    reports = [grant_report(granted) for granted in (*grants.own, *grants.namespace)]
    routes = [route_report(found) for found in inbound.route_grants(index.store, server, index.settings)]
    why = f"{server.ref} takes the port over, with accessPolicy {server.access}"
    return PortReport(namespace, pod, port, why, [other.ref for other in others], reports, not grants.narrowed, routes, policy)


def grant_report(granted: Granted) -> GrantReport:
    """One policy in words."""
    who = clients(granted.authorization) if granted.authorization else "nobody"
    return GrantReport(granted.policy.ref, granted.policy.target, granted.policy.inherit, who, granted.problem)


def route_report(found: inbound.RouteGrants) -> RouteReport:
    """One route in words."""
    unsupported = f"{found.route.unsupported}; it lets nobody in" if found.route.unsupported else ""
    grants = [grant_report(granted) for granted in found.own]
    return RouteReport(found.route.ref, not found.conflict, found.narrowed, grants, found.conflict or unsupported)


def authz(index: Index, namespace: str, pod: str) -> list[AuthzRow]:
    """Who may use which declared or served port of a pod, one row for each way in; a port that nobody may use has one row too."""
    found = index.pod(namespace, pod)
    if found is None:
        return []
    rows: list[AuthzRow] = []
    for port in ports_of(index, found):
        policy = index.inbound_policy(namespace, pod, port)
        places: Iterable[tuple[Ref | None, tuple[wire.Authorization, ...]]]
        places = [(route.ref, route.authorizations) for route in policy.routes] or [(None, policy.authorizations)]
        for route, authorizations in places:
            rows.extend(AuthzRow(port, policy.server, route, granted.ref, clients(granted)) for granted in authorizations)
            if not authorizations:
                rows.append(AuthzRow(port, policy.server, route, None, "nobody"))
    return rows


def ports_of(index: Index, pod: Pod) -> list[int]:
    """Ports that the pod declares or that a Server of a number gives it."""
    servers = index.store.servers.get(pod.metadata.namespace, {}).values()
    served = {server.port for server in servers if isinstance(server.port, int) and server.pod_selector.matches(pod.metadata.labels)}
    return sorted({entry.container_port for entry in pod.ports} | served)


def clients(granted: wire.Authorization) -> str:
    """Whom an authorization lets in, in words."""
    match granted.authentication:
        case wire.Meshed(("*",)):
            who = "any meshed workload"
        case wire.Meshed(identities):
            who = ", ".join(identities)
        case _:
            who = "anyone"
    if granted.networks != EVERYWHERE:
        networks = (network.cidr + "".join(f" without {inner}" for inner in network.excluded) for network in granted.networks)
        who += f" from {', '.join(networks)}"
    return who + (" (audit)" if granted.audit else "")


def problems(index: Index) -> list[Problem]:
    """Everything that does not act as its author will have meant, sorted."""
    return sorted({problem for few in problems_by_parts(index) for problem in few})


def problems_by_parts(index: Index, part: int = 200) -> Iterator[list[Problem]]:
    """The same unsorted, a part of the objects at a time, so that a caller with other work can do it in between."""
    objects = list(index.store.objects.values())
    for start in range(0, len(objects), part):
        yield [problem for object_ in objects[start : start + part] for problem in _problems_of(index, object_)]


def _problems_of(index: Index, object_: Object) -> Iterator[Problem]:
    match object_:
        case AuthorizationPolicy():
            yield from _policy_problems(index, object_)
        case InboundRoute():
            yield from _route_problems(index, object_)
        case Server():
            yield from _server_problems(index, object_)
        case Pod() | Namespace() | Service():
            yield from _annotation_problems(index, object_)
        case Node():
            yield from _node_problems(index, object_)


def _policy_problems(index: Index, policy: AuthorizationPolicy) -> Iterator[Problem]:
    problem = inbound.grant(index.store, policy, index.settings).problem
    if problem:
        yield Problem(policy.ref, "unresolved-reference", problem)
    if policy.target.kind != "Namespace" and policy.target not in index.store.objects:
        yield Problem(policy.ref, "no-such-target", f"{policy.target} does not exist, so the policy has no effect")


def _route_problems(index: Index, route: InboundRoute) -> Iterator[Problem]:
    for sentence in route.unattachable:
        yield Problem(route.ref, "unattachable-parent", sentence)
    for sentence in route.mistaken:
        yield Problem(route.ref, "mistaken-parent", sentence)
    if route.unsupported and (route.servers or route.unattachable):
        yield Problem(route.ref, "unsupported", f"{route.unsupported}; the route lets nobody in")
    servers = index.store.servers.get(route.metadata.namespace, {})
    for name in route.servers:
        if name not in servers:
            yield Problem(route.ref, "no-such-parent", f"there is no Server {name} in namespace {route.metadata.namespace}")
    if route.forwarding is not None:
        yield from _forwarding_problems(index, route.ref, route.forwarding)


def _forwarding_problems(index: Index, ref: Ref, forwarding: Forwarding) -> Iterator[Problem]:
    if forwarding.unsupported:
        yield Problem(ref, "unsupported", f"{forwarding.unsupported}; the route is not applied to its Services")
    for parent in forwarding.parents:
        service = index.store.services.get(parent.namespace, {}).get(parent.name)
        if service is None:
            yield Problem(ref, "no-such-parent", f"there is no Service {parent.name} in namespace {parent.namespace}")
        elif not any(routing.means(parent, service, port) for port in service.spec.ports):
            yield Problem(ref, "no-such-parent", f"{service.ref} has no port that the route names")
    for rule in forwarding.rules:
        for reference in rule.references:
            _, sentence = routing.unresolved(index.store, reference)
            if sentence:
                yield Problem(ref, "unresolved-backend", f"{sentence}; its share of the requests gets an error")


def _server_problems(index: Index, server: Server) -> Iterator[Problem]:
    routes = inbound.route_grants(index.store, server, index.settings)
    for found in routes:
        if found.conflict:
            yield Problem(found.route.ref, "conflicted", f"not attached to {server.ref}: {found.conflict}")
    if routes and server.protocol in ("opaque", "tls"):
        yield Problem(server.ref, "routes-on-opaque", f"has routes but proxyProtocol {server.protocol}: its connections are denied")
    if inbound.server_policy(index.store, server, index.settings) is None:
        yield Problem(server.ref, "too-large", _TOO_LARGE)
    if not any(_may_overlap(server, other) for other in index.store.servers.get(server.metadata.namespace, {}).values()):
        return
    yield from islice(_overlaps(index, server), _OVERLAPS_SHOWN)


def _overlaps(index: Index, server: Server) -> Iterator[Problem]:
    """One for each port of each pod that an older Server has taken over."""
    for pod in index.store.pods.get(server.metadata.namespace, {}).values():
        if not server.pod_selector.matches(pod.metadata.labels):
            continue
        ports = (
            [server.port] if isinstance(server.port, int) else [entry.container_port for entry in pod.ports if entry.name == server.port]
        )
        for port in ports:
            winner = next(iter(inbound.servers_for(index.store, pod, port)), server)
            if winner.ref != server.ref:
                yield Problem(server.ref, "overlap", f"no effect on port {port} of {pod.ref}: the older {winner.ref} selects it too")


def _may_overlap(server: Server, other: Server) -> bool:
    """Could some pod have a port that both take? Asked before looking at any pod."""
    same_port = server.port == other.port or isinstance(server.port, str) or isinstance(other.port, str)
    return server.ref != other.ref and same_port and not server.pod_selector.excludes(other.pod_selector)


def _node_problems(index: Index, node: Node) -> Iterator[Problem]:
    """A pod network that cluster-* policies do not admit locks out pods that they are meant for."""
    known = [ip_network(network) for network in index.settings.cluster_networks]
    for text in node.pod_networks:
        network = ip_network(text, strict=False)
        if not any(network.version == wide.version and network.subnet_of(wide) for wide in known):  # type: ignore[arg-type]
            message = f"its pod network {network} is in none of the cluster's networks {', '.join(map(str, known))}: add it to them"
            yield Problem(node.ref, "outside-cluster-networks", message)


def _annotation_problems(index: Index, owner: Pod | Namespace | Service) -> Iterator[Problem]:
    for key in options.PORT_LISTS:
        wrong = options.read_port_list(owner.metadata.annotations.get(key, "")).wrong
        if wrong:
            yield Problem(
                owner.ref, "invalid-annotation", f"{key}: expected ports, ranges or port names, found {', '.join(map(repr, wrong))}"
            )
    if isinstance(owner, Pod) and (problem := inbound.default_policy(index.store, owner, index.settings).problem):
        yield Problem(owner.ref, "invalid-annotation", problem)
