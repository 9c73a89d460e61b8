"""Who may use a port of a pod: from the objects of a namespace to `wire.InboundPolicy`, rule by rule. Pure.

The steps are Linkerd's, with the differences that docs/policy.md lists: which Server takes the port over, else the default policy; what
the policies of the Server and the Namespace grant; what routes are attached and who may use each. An intent to narrow
(``inherit: false``) counts even when the grant beside it cannot be resolved: a dangling reference never opens anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from core.k8s.objects import Pod
from core.names import WorkloadId
from core.refs import Ref, default_ref
from policy import wire
from policy.gateway import InboundRoute
from policy.index import options
from policy.index.settings import ALL_NETWORKS, IndexSettings
from policy.index.store import Store
from policy.match import excess
from policy.model import ACCESS_POLICIES, AuthorizationPolicy, MeshTLSAuthentication, NetworkAuthentication, Server

EVERYWHERE = tuple(wire.Network(cidr) for cidr in ALL_NETWORKS)
ANY_IDENTITY = wire.Meshed(("*",))


class Granted(NamedTuple):
    """What an AuthorizationPolicy amounts to. authorization: None when it lets nobody in, and then ``problem`` says why."""

    policy: AuthorizationPolicy
    authorization: wire.Authorization | None
    problem: str = ""


class Default(NamedTuple):
    """The default inbound policy of a pod. source: who set it, for people. problem: what is wrong with the annotation, or ""."""

    name: str
    source: str
    problem: str = ""


def servers_for(store: Store, pod: Pod, port: int) -> list[Server]:
    """Servers that select this port of this pod, oldest first: the first one takes the port over, the others have no effect."""
    found = [
        server
        for server in store.servers.get(pod.metadata.namespace, {}).values()
        if selects_port(server, pod, port) and server.pod_selector.matches(pod.metadata.labels)
    ]
    return found if len(found) < 2 else sorted(found, key=lambda server: server.metadata.age_key)


def selects_port(server: Server, pod: Pod, port: int) -> bool:
    """Does the Server's port, a number or the name of a container port, mean this port of the pod?"""
    if isinstance(server.port, int):
        return server.port == port
    return any(entry.name == server.port and entry.container_port == port for entry in pod.ports)


_WITH_IDENTITY = {
    "all-unauthenticated": "all-authenticated",
    "cluster-unauthenticated": "cluster-authenticated",
    "audit": "all-authenticated",
}


def port_default(store: Store, pod: Pod, port: int, settings: IndexSettings) -> Default:
    """`default_policy` of one port, which may require an identity by annotation; a list that cannot be read requires it of every port."""
    default = default_policy(store, pod, settings)
    key = options.REQUIRE_IDENTITY_PORTS
    text = options.nearest(key, pod.metadata.annotations, store.namespace_annotations(pod.metadata.namespace))
    listed = options.read_port_list(text or "")
    if default.name in _WITH_IDENTITY and (listed.wrong or listed.holds(port, pod.ports)):
        return default._replace(name=_WITH_IDENTITY[default.name], source=f"{default.source}, with an identity by annotation {key}")
    return default


def default_policy(store: Store, pod: Pod, settings: IndexSettings) -> Default:
    """The default inbound policy: the pod's annotation, else its namespace's, else the cluster's; a wrong value denies."""
    key = options.DEFAULT_INBOUND_POLICY
    namespace = pod.metadata.namespace
    owners = ((str(pod.ref), pod.metadata.annotations), (f"namespace {namespace}", store.namespace_annotations(namespace)))
    for owner, found in owners:
        if key not in found:
            continue
        name, source = found[key].strip(), f"annotation {key} of {owner}"
        if name in ACCESS_POLICIES:
            return Default(name, source)
        expected = ", ".join(ACCESS_POLICIES)
        return Default("deny", source, f"{source}: expected one of {expected}, found {name[:80]!r}; everything is denied")
    return Default(settings.default_inbound_policy, "the cluster's default")


def access(name: str, settings: IndexSettings) -> tuple[wire.Authorization, ...]:
    """What an access policy (a Server's, or a default inbound policy) grants by itself."""
    if name == "deny":
        return ()
    networks = tuple(wire.Network(cidr) for cidr in settings.cluster_networks) if name.startswith("cluster-") else EVERYWHERE
    authentication = ANY_IDENTITY if name.endswith("-authenticated") else wire.Anyone()
    return (wire.Authorization(default_ref(name), networks, authentication, audit=name == "audit"),)


def port_in_list(store: Store, pod: Pod, port: int, key: str, fallback: str = "") -> bool:
    """Does the pod's annotation ``key`` (else its namespace's, else ``fallback``) list the port?"""
    text = options.nearest(key, pod.metadata.annotations, store.namespace_annotations(pod.metadata.namespace))
    return options.read_port_list(fallback if text is None else text).holds(port, pod.ports)


def port_protocol(store: Store, pod: Pod, port: int, settings: IndexSettings) -> wire.Protocol:
    """What a port of a pod speaks: its Server's word, else opaque when listed so, else to be detected."""
    servers = servers_for(store, pod, port)
    if servers:
        return servers[0].protocol
    return "opaque" if port_in_list(store, pod, port, options.OPAQUE_PORTS, settings.opaque_ports) else "detect"


def grant(store: Store, policy: AuthorizationPolicy, settings: IndexSettings) -> Granted:
    """What a policy grants once all its references resolve; one that does not makes the whole policy grant nothing."""
    networks: Sequence[wire.Network] = EVERYWHERE
    authentication: wire.Anyone | wire.Meshed = wire.Anyone()
    for ref in policy.required:
        if ref.kind == "ServiceAccount":
            authentication = wire.Meshed((identity(settings, ref.namespace, ref.name),))
            continue
        found = store.authentications.get(ref)
        if isinstance(found, MeshTLSAuthentication):
            accounts = tuple(identity(settings, namespace, name) for namespace, name in found.accounts)
            authentication = wire.Meshed(found.identities + accounts)
        elif isinstance(found, NetworkAuthentication):
            networks = found.networks
        else:
            return Granted(policy, None, f"{ref} does not exist, so the whole policy grants nothing")
    return Granted(policy, wire.Authorization(policy.ref, tuple(networks), authentication))


def identity(settings: IndexSettings, namespace: str, account: str) -> str:
    """SPIFFE URI of a service account; account "*" makes the pattern for all of the namespace."""
    return WorkloadId(settings.trust_domain, namespace, account).uri


class ServerGrants(NamedTuple):
    """Who may use a Server. narrowed: a policy of its own says ``inherit: false``, so the Namespace's do not count."""

    own: list[Granted]
    namespace: list[Granted]
    access: tuple[wire.Authorization, ...]
    narrowed: bool

    @property
    def authorizations(self) -> tuple[wire.Authorization, ...]:
        """In the order they are tried; the access policy comes last, so that ``audit`` names only what nothing else let in."""
        return effective(self.own) + (() if self.narrowed else effective(self.namespace)) + self.access


def effective(grants: Iterable[Granted]) -> tuple[wire.Authorization, ...]:
    """The authorizations of those that grant something."""
    return tuple(granted.authorization for granted in grants if granted.authorization is not None)


def grants_for(store: Store, namespace: str, target: Ref, settings: IndexSettings) -> list[Granted]:
    """All policies of the namespace that target this object, oldest first."""
    return _granted(store, (policy for policy in store.policies.get(namespace, {}).values() if policy.target == target), settings)


def _granted(store: Store, policies: Iterable[AuthorizationPolicy], settings: IndexSettings) -> list[Granted]:
    return [grant(store, policy, settings) for policy in sorted(policies, key=lambda policy: policy.metadata.age_key)]


def server_grants(store: Store, server: Server, settings: IndexSettings) -> ServerGrants:
    """Who may use a Server when no route says more."""
    namespace = server.metadata.namespace
    own = grants_for(store, namespace, server.ref, settings)
    above = grants_for(store, namespace, Ref("", "Namespace", "", namespace), settings)
    return ServerGrants(own, above, access(server.access, settings), any(not granted.policy.inherit for granted in own))


class RouteGrants(NamedTuple):
    """Who may use a route. conflict: why it is not attached, "" when it is. narrowed: only its own policies count."""

    route: InboundRoute
    own: list[Granted]
    narrowed: bool
    conflict: str

    def authorizations(self, of_server: tuple[wire.Authorization, ...]) -> tuple[wire.Authorization, ...]:
        """Nobody, when the route holds something that cannot be enforced."""
        if self.route.unsupported:
            return ()
        return effective(self.own) + (() if self.narrowed else of_server)


def conflict(store: Store, server: Server, route: InboundRoute) -> str:
    """Why a route that names the Server as parent is not attached, "" when it is: beside a GRPCRoute no HTTPRoute is (Gateway API)."""
    if route.kind == "grpc":
        return ""
    routes = store.routes.get(server.metadata.namespace, {}).values()
    rivals = [rival for rival in routes if rival.kind == "grpc" and server.metadata.name in rival.servers]
    if not rivals:
        return ""
    oldest = min(rivals, key=lambda rival: rival.metadata.age_key)
    return f"{oldest.ref} has the same parent, and a GRPCRoute takes precedence"


def route_grants(store: Store, server: Server, settings: IndexSettings) -> list[RouteGrants]:
    """Routes that name the Server as parent, oldest first."""
    namespace = server.metadata.namespace
    routes = [route for route in store.routes.get(namespace, {}).values() if server.metadata.name in route.servers]
    routes.sort(key=lambda route: route.metadata.age_key)
    policies: dict[Ref, list[AuthorizationPolicy]] = {}
    for policy in store.policies.get(namespace, {}).values():
        policies.setdefault(policy.target, []).append(policy)
    of_http = next((conflict(store, server, route) for route in routes if route.kind == "http"), "")  # the same for all of them
    found = []
    for route in routes:
        own = _granted(store, policies.get(route.ref, ()), settings)
        narrowed = any(not granted.policy.inherit for granted in own)
        found.append(RouteGrants(route, own, narrowed, of_http if route.kind == "http" else ""))
    return found


def server_policy(store: Store, server: Server, settings: IndexSettings) -> wire.InboundPolicy | None:
    """The policy of every port that a Server takes over; None when it is longer than any sidecar reads, or costs each request too much."""
    grants = server_grants(store, server, settings)
    of_server = grants.authorizations
    measure = _Measure(of_server)
    routes = []
    for found in route_grants(store, server, settings):
        if not found.conflict:
            route = wire.Route(found.route.ref, found.route.kind, found.route.hostnames, found.route.rules, ())
            measure.add_once(route)
            of_route = found.authorizations(of_server)
            measure.add(of_route)
            routes.append(msgspec.structs.replace(route, authorizations=of_route))
        if measure.left < 0:
            return None
    if measure.left < 0 or excess(rule for route in routes for rule in route.rules):
        return None
    return wire.InboundPolicy(server.ref, server.protocol, of_server, tuple(routes))


class _Measure:
    """How much more a line may hold.

    Every route repeats those of the Server and its Namespace. So a few hundred small objects can make gigabytes, which nobody may encode.
    """

    def __init__(self, authorizations: Iterable[wire.Authorization]) -> None:
        self.left = wire.MAX_LINE_BYTES
        self._sizes: dict[int, int] = {}  # by object: the same ones come again
        self.add(authorizations)

    def add(self, authorizations: Iterable[wire.Authorization]) -> None:
        """These are in the line, too, maybe not for the first time."""
        for one in authorizations:
            size = self._sizes.get(id(one))
            if size is None:
                size = self._sizes[id(one)] = len(msgspec.json.encode(one))
            self.left -= size

    def add_once(self, route: wire.Route) -> None:
        """This is in the line, too."""
        self.left -= len(msgspec.json.encode(route))
