"""The rules of evaluation as cases: what is given, and what clients get. Run by test_policy_rules.

An answer is ``permit``, ``denied``, ``no route`` or ``bad target``, followed by the route and by the authorization that let the client in;
``(audit)`` when it is let in only to be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import policy_lab as lab
import pytest

from policy.authorize import Client

FRONT = Client("10.1.1.1", "spiffe://cluster.local/ns/shop/sa/front")
BATCH = Client("10.1.1.2", "spiffe://cluster.local/ns/shop/sa/batch")
OPS = Client("10.1.1.3", "spiffe://cluster.local/ns/ops/sa/tool")
FAR = Client("203.0.113.7", "spiffe://cluster.local/ns/shop/sa/front")
FOREIGN = Client("10.1.1.4", "spiffe://elsewhere.org/ns/shop/sa/front")
PLAIN = Client("10.1.1.5", None, "plaintext")
PLAIN_FAR = Client("203.0.113.8", None, "plaintext")
LOOPBACK = Client("127.0.0.1", None, "plaintext")
LOOPBACK6 = Client("::1", None, "plaintext")

Raw = dict[str, Any]
Asks = Sequence[tuple[Client, str, str]]


def case(rule: str, given: Sequence[Raw], *asks: tuple[Client, str, str]) -> Any:
    return pytest.param(given, asks, id=rule)


def at_route(name: str = "web", kind: str = "HTTPRoute") -> Raw:
    return lab.target(kind, name)


def at_namespace() -> Raw:
    return lab.target("Namespace", "shop")


def account(name: str, in_namespace: str | None = None) -> Raw:
    return lab.ref("ServiceAccount", name, in_namespace)


def probed(raw: Raw) -> Raw:
    raw["spec"]["containers"][0]["readinessProbe"] = {"httpGet": {"path": "/healthz", "port": "http"}}
    raw["spec"]["containers"][0]["livenessProbe"] = {"tcpSocket": {"port": 8080}}
    return raw


OLD, YOUNG = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
SERVER_WITH_ROUTE = (lab.pod(), lab.server(), lab.route(path="/a"))


SERVERS = [
    case(
        "a Server takes its port over: the default policy no longer applies there",
        [lab.pod(default_inbound_policy="all-unauthenticated"), lab.server()],
        (FRONT, "tcp", "denied"),
        (FRONT, "GET /", "denied"),
        (FRONT, "9000 GET /", "permit all-unauthenticated"),
    ),
    case(
        "a Server without a matching label selects nothing",
        [lab.pod(labels={"app": "other"}), lab.server()],
        (PLAIN, "tcp", "permit all-unauthenticated"),
    ),
    case(
        "a Server may name a container port",
        [lab.pod(ports={"http": 8080, "admin": 9000}), lab.server(port="admin")],
        (PLAIN, "9000 tcp", "denied"),
        (PLAIN, "8080 tcp", "permit all-unauthenticated"),
    ),
    case(
        "a name that no container port has selects nothing",
        [lab.pod(), lab.server(port="web")],
        (PLAIN, "8080 tcp", "permit all-unauthenticated"),
    ),
    case(
        "of overlapping Servers the oldest wins, by number or by name",
        [
            lab.pod(),
            lab.server("young", created=YOUNG, accessPolicy="all-unauthenticated"),
            lab.server("old", created=OLD, port="http", accessPolicy="all-authenticated"),
        ],
        (PLAIN, "tcp", "denied"),
        (FRONT, "tcp", "permit all-authenticated"),
    ),
    case(
        "of overlapping Servers of one age the first name wins",
        [lab.pod(), lab.server("b", accessPolicy="all-unauthenticated"), lab.server("a")],
        (PLAIN, "tcp", "denied"),
    ),
    case(
        "policies and routes of a Server that lost its port do not count",
        [
            lab.pod(),
            lab.server("other", created=OLD),
            lab.server(created=YOUNG),
            lab.policy(at=lab.target("Server", "cart")),
            lab.route(path="/a"),
            lab.policy("r", at=at_route()),
        ],
        (FRONT, "tcp", "denied"),
        (FRONT, "GET /a", "denied"),
    ),
    case(
        "routes concern the Server's port only",
        [*SERVER_WITH_ROUTE],
        (PLAIN, "9000 GET /b", "permit all-unauthenticated"),
        (PLAIN, "GET /b", "no route"),
    ),
]

POLICIES = [
    case(
        "no authorization lets anybody in without naming them",
        [lab.pod(), lab.server()],
        (PLAIN, "tcp", "denied"),
        (FRONT, "tcp", "denied"),
    ),
    case(
        "an empty list of required authentications admits everybody",
        [lab.pod(), lab.server(), lab.policy()],
        (PLAIN_FAR, "tcp", "permit allow"),
        (FOREIGN, "GET /", "permit allow"),
    ),
    case(
        "a ServiceAccount is one identity of this trust domain, from anywhere",
        [lab.pod(), lab.server(), lab.policy("p", account("front"))],
        (FRONT, "tcp", "permit p"),
        (FAR, "GET /", "permit p"),
        (BATCH, "tcp", "denied"),
        (FOREIGN, "tcp", "denied"),
        (PLAIN, "tcp", "denied"),
    ),
    case(
        "a ServiceAccount of another namespace",
        [lab.pod(), lab.server(), lab.policy("p", account("tool", "ops"))],
        (OPS, "tcp", "permit p"),
        (FRONT, "tcp", "denied"),
    ),
    case(
        "identities: URIs and path prefixes",
        [
            lab.pod(),
            lab.server(),
            lab.policy("p", lab.ref("MeshTLSAuthentication", "friends")),
            lab.mesh_tls("friends", FRONT.identity or "", "spiffe://cluster.local/ns/ops/*"),
        ],
        (FRONT, "tcp", "permit p"),
        (OPS, "tcp", "permit p"),
        (BATCH, "tcp", "denied"),
    ),
    case(
        "identities: a star is every identity of this trust domain",
        [lab.pod(), lab.server(), lab.policy("p", lab.ref("MeshTLSAuthentication", "friends")), lab.mesh_tls("friends", "*")],
        (OPS, "tcp", "permit p"),
        (FOREIGN, "tcp", "denied"),
        (PLAIN, "tcp", "denied"),
    ),
    case(
        "identities of a foreign trust domain only where it is written out",
        [
            lab.pod(),
            lab.server(),
            lab.policy("p", lab.ref("MeshTLSAuthentication", "friends")),
            lab.mesh_tls("friends", "spiffe://elsewhere.org/*"),
        ],
        (FOREIGN, "tcp", "permit p"),
        (FRONT, "tcp", "denied"),
    ),
    case(
        "identityRefs: accounts of the own namespace, and whole namespaces",
        [
            lab.pod(),
            lab.server(),
            lab.policy("p", lab.ref("MeshTLSAuthentication", "friends")),
            lab.mesh_tls(refs=[{"kind": "ServiceAccount", "name": "batch"}, {"kind": "Namespace", "name": "ops"}]),
        ],
        (BATCH, "tcp", "permit p"),
        (OPS, "tcp", "permit p"),
        (FRONT, "tcp", "denied"),
    ),
    case(
        "networks with exceptions, IPv4 and IPv6",
        [
            lab.pod(),
            lab.server(),
            lab.policy("p", lab.ref("NetworkAuthentication", "office")),
            lab.networks("office", "10.1.0.0/16", excluded=("10.1.1.4/30",)),
            lab.policy("six", lab.ref("NetworkAuthentication", "six")),
            lab.networks("six", "2001:db8::/32", excluded=("2001:db8:1::/48",)),
        ],
        (Client("10.1.1.3", None), "tcp", "permit p"),
        (Client("10.1.1.4", None), "tcp", "denied"),
        (Client("10.1.1.7", None), "tcp", "denied"),
        (Client("10.1.1.8", None), "tcp", "permit p"),
        (Client("10.2.0.0", None), "tcp", "denied"),
        (Client("::ffff:10.1.1.3", None), "tcp", "permit p"),
        (Client("2001:db8::1", None), "tcp", "permit six"),
        (Client("2001:db8:1::1", None), "tcp", "denied"),
    ),
    case(
        "identity and network must hold at once",
        [
            lab.pod(),
            lab.server(),
            lab.policy("p", account("front"), lab.ref("NetworkAuthentication", "office")),
            lab.networks("office", "10.0.0.0/8"),
        ],
        (FRONT, "tcp", "permit p"),
        (FAR, "tcp", "denied"),
        (BATCH, "tcp", "denied"),
        (PLAIN, "tcp", "denied"),
    ),
    case(
        "several policies are alternatives",
        [
            lab.pod(),
            lab.server(),
            lab.policy("a", account("front")),
            lab.policy("b", lab.ref("NetworkAuthentication", "office")),
            lab.networks("office", "203.0.113.0/24"),
        ],
        (FRONT, "tcp", "permit a"),
        (PLAIN_FAR, "tcp", "permit b"),
        (PLAIN, "tcp", "denied"),
    ),
    case(
        "one unresolved reference makes the whole policy ineffective, not wider",
        [
            lab.pod(),
            lab.server(),
            lab.policy("p", account("front"), lab.ref("NetworkAuthentication", "gone")),
            lab.policy("q", lab.ref("MeshTLSAuthentication", "gone"), lab.ref("NetworkAuthentication", "office")),
            lab.networks("office", "0.0.0.0/0"),
        ],
        (FRONT, "tcp", "denied"),
        (PLAIN, "tcp", "denied"),
    ),
    case(
        "references reach into other namespaces, and without a namespace stay in their own",
        [
            lab.pod(),
            lab.server(),
            lab.policy("p", lab.ref("MeshTLSAuthentication", "friends", "ops")),
            lab.mesh_tls("friends", FRONT.identity or "", in_namespace="ops"),
            lab.policy("q", lab.ref("NetworkAuthentication", "office")),
            lab.networks("office", "0.0.0.0/0", in_namespace="ops"),
        ],
        (FRONT, "tcp", "permit p"),
        (BATCH, "tcp", "denied"),
        (PLAIN, "tcp", "denied"),
    ),
    case(
        "a policy of the Namespace counts on each of its Servers, and on ports without a Server not at all",
        [lab.pod(default_inbound_policy="deny"), lab.server(), lab.policy("ns", account("front"), at=at_namespace())],
        (FRONT, "tcp", "permit ns"),
        (BATCH, "tcp", "denied"),
        (FRONT, "9000 tcp", "denied"),
    ),
    case(
        "Server, Namespace and accessPolicy are a union",
        [
            lab.pod(),
            lab.server(accessPolicy="cluster-authenticated"),
            lab.policy("own", account("front")),
            lab.policy("ns", lab.ref("NetworkAuthentication", "office"), at=at_namespace()),
            lab.networks("office", "203.0.113.8"),
        ],
        (FRONT, "tcp", "permit own"),
        (PLAIN_FAR, "tcp", "permit ns"),
        (OPS, "tcp", "permit cluster-authenticated"),
        (PLAIN, "tcp", "denied"),
    ),
    case(
        "audit names only whom nothing else lets in",
        [lab.pod(), lab.server(accessPolicy="audit"), lab.policy("own", account("front"))],
        (FRONT, "tcp", "permit own"),
        (BATCH, "GET /", "permit audit (audit)"),
        (PLAIN, "tcp", "permit audit (audit)"),
    ),
    case(
        "inherit: false on a Server drops the Namespace's policies, and keeps accessPolicy",
        [
            lab.pod(),
            lab.server(accessPolicy="cluster-authenticated"),
            lab.policy("own", account("front"), inherit=False),
            lab.policy("ns", at=at_namespace()),
        ],
        (FRONT, "tcp", "permit own"),
        (BATCH, "tcp", "permit cluster-authenticated"),
        (PLAIN, "tcp", "denied"),
    ),
    case(
        "inherit: false narrows also when what it grants does not resolve",
        [
            lab.pod(),
            lab.server(),
            lab.policy("own", lab.ref("NetworkAuthentication", "gone"), inherit=False),
            lab.policy("ns", at=at_namespace()),
        ],
        (FRONT, "tcp", "denied"),
    ),
    case(
        "loopback is always let in, whatever the policy",
        [lab.pod(default_inbound_policy="deny"), lab.server(port=9000), lab.policy("p", account("front"), inherit=False)],
        (LOOPBACK, "tcp", "permit localhost"),
        (LOOPBACK6, "GET /", "permit localhost"),
        (LOOPBACK, "9000 tcp", "permit localhost"),
        (Client("::ffff:127.0.0.1", None), "9000 tcp", "permit localhost"),
        (Client("128.0.0.1", None), "9000 tcp", "denied"),
    ),
    case(
        "probes open nothing, without and with a Server",
        [probed(lab.pod(default_inbound_policy="all-authenticated", ports={"http": 8080, "admin": 9000})), lab.server(port=9000)],
        (PLAIN, "GET /healthz", "denied"),
        (PLAIN, "tcp", "denied"),
        (PLAIN, "9000 GET /healthz", "denied"),
    ),
]

ROUTES = [
    case(
        "with a route, what none matches is answered so, also for those whom the Server lets in",
        [*SERVER_WITH_ROUTE, lab.policy("own", account("front"))],
        (FRONT, "GET /a", "permit web own"),
        (FRONT, "GET /b", "no route"),
        (PLAIN, "GET /b", "no route"),
        (PLAIN, "GET /a", "denied web"),
    ),
    case(
        "a route's policies widen: those of Server, Namespace and accessPolicy count as well",
        [
            lab.pod(),
            lab.server(accessPolicy="cluster-authenticated"),
            lab.route(path="/a"),
            lab.policy("ns", account("tool", "ops"), at=at_namespace()),
            lab.policy("own", account("front")),
            lab.policy("open", at=at_route()),
        ],
        (PLAIN, "GET /a", "permit web open"),
        (FRONT, "GET /a/b", "permit web open"),
        (PLAIN, "GET /b", "no route"),
    ),
    case(
        "a route without policies of its own has the Server's",
        [*SERVER_WITH_ROUTE, lab.policy("own", account("front")), lab.policy("ns", account("tool", "ops"), at=at_namespace())],
        (FRONT, "GET /a", "permit web own"),
        (OPS, "GET /a", "permit web ns"),
        (BATCH, "GET /a", "denied web"),
    ),
    case(
        "inherit: false on a route's policy: only the route's own count there",
        [
            lab.pod(),
            lab.server(accessPolicy="all-authenticated"),
            lab.policy("own", account("front")),
            lab.policy("ns", at=at_namespace()),
            lab.route("admin", path="/admin"),
            lab.route("rest", path="/"),
            lab.policy("narrow", account("tool", "ops"), at=at_route("admin"), inherit=False),
            lab.policy("also", account("batch"), at=at_route("admin")),
        ],
        (OPS, "GET /admin", "permit admin narrow"),
        (BATCH, "GET /admin/x", "permit admin also"),
        (FRONT, "GET /admin", "denied admin"),
        (PLAIN, "GET /admin", "denied admin"),
        (FRONT, "GET /administrator", "permit rest own"),
        (PLAIN, "GET /", "permit rest ns"),
        (LOOPBACK, "GET /admin", "permit admin localhost"),
    ),
    case(
        "inherit: false on a route holds when its grant does not resolve: nobody is let in",
        [
            lab.pod(),
            lab.server(accessPolicy="all-unauthenticated"),
            lab.route(path="/a"),
            lab.policy("p", lab.ref("NetworkAuthentication", "gone"), at=at_route(), inherit=False),
        ],
        (FRONT, "GET /a", "denied web"),
    ),
    case(
        "inherit: false on a Server reaches its routes: the Namespace's policies do not count there either",
        [
            *SERVER_WITH_ROUTE,
            lab.policy("own", account("front"), inherit=False),
            lab.policy("ns", at=at_namespace()),
        ],
        (FRONT, "GET /a", "permit web own"),
        (BATCH, "GET /a", "denied web"),
    ),
    case(
        "a rule that narrows by regular expression is not shadowed by a catch-all",
        [
            lab.pod(),
            lab.server(accessPolicy="all-unauthenticated"),
            lab.route("rest", path="/"),
            lab.route("tenants", matches=[{"path": {"type": "RegularExpression", "value": "/tenants/[0-9]+/keys"}}]),
            lab.policy("narrow", account("tool", "ops"), at=at_route("tenants"), inherit=False),
        ],
        (OPS, "GET /tenants/7/keys", "permit tenants narrow"),
        (PLAIN, "GET /tenants/7/keys", "denied tenants"),
        (PLAIN, "GET /tenants/7", "permit rest all-unauthenticated"),
    ),
    case(
        "a request whose path has two readings is refused where rules look at paths, and not where none does",
        [*SERVER_WITH_ROUTE, lab.policy(), lab.server("other", port=9000, accessPolicy="all-unauthenticated")],
        (FRONT, "GET /a/../b", "bad target"),
        (FRONT, "GET /a%2f..", "bad target"),
        (LOOPBACK, "GET //a", "bad target"),
        (FRONT, "9000 GET /a/../b", "permit all-unauthenticated"),
    ),
    case(
        "a port that opted out of path checks has one reading of everything",
        [lab.pod(unchecked_path_ports="8080"), lab.server(), lab.route(path="/a"), lab.policy()],
        (FRONT, "GET /b/../a", "permit web allow"),
        (FRONT, "GET /a/../b", "no route"),
    ),
    case(
        "a port with routes denies connections that are not read as HTTP",
        [*SERVER_WITH_ROUTE, lab.policy()],
        (FRONT, "tcp", "denied"),
        (LOOPBACK, "tcp", "denied"),
        (FRONT, "GET /a", "permit web allow"),
    ),
    case(
        "an opaque Server with routes denies, without routes its policies decide",
        [
            lab.pod(ports={"http": 8080, "db": 9000}),
            lab.server(proxyProtocol="opaque"),
            lab.route(path="/"),
            lab.policy(),
            lab.server("db", port="db", proxyProtocol="opaque"),
            lab.policy("db", account("front"), at=lab.target("Server", "db")),
        ],
        (FRONT, "tcp", "denied"),
        (FRONT, "9000 tcp", "permit db"),
        (BATCH, "9000 tcp", "denied"),
    ),
    case(
        "beside a GRPCRoute no HTTPRoute of the same Server counts",
        [lab.pod(), lab.server(), lab.policy(), lab.route("web", created=OLD), lab.route("rpc", kind="GRPCRoute", created=YOUNG)],
        (FRONT, "grpc /shop.Cart/Add", "permit rpc allow"),
        (FRONT, "GET /", "no route"),
    ),
    case(
        "GRPCRoutes narrow by service and method",
        [
            lab.pod(),
            lab.server(proxyProtocol="gRPC"),
            lab.policy("own", account("front")),
            lab.route("all", kind="GRPCRoute"),
            lab.route("drop", kind="GRPCRoute", matches=[{"method": {"service": "shop.Cart", "method": "Drop"}}]),
            lab.policy("ops", account("tool", "ops"), at=at_route("drop", "GRPCRoute"), inherit=False),
        ],
        (FRONT, "grpc /shop.Cart/Add", "permit all own"),
        (FRONT, "grpc /shop.Cart/Drop", "denied drop"),
        (OPS, "grpc /shop.Cart/Drop", "permit drop ops"),
        (OPS, "grpc /shop.Cart/Add", "denied all"),
    ),
    case(
        "a policy of an HTTPRoute says nothing about a GRPCRoute of the same name",
        [lab.pod(), lab.server(), lab.route("web", kind="GRPCRoute"), lab.policy("p", at=at_route("web", "HTTPRoute"))],
        (FRONT, "grpc /shop.Cart/Add", "denied web"),
    ),
    case(
        "a route that holds what cannot be enforced lets nobody in, and does not leave its requests to wider routes",
        [
            lab.pod(),
            lab.server(accessPolicy="all-unauthenticated"),
            lab.route("rest", path="/"),
            lab.route("web", path="/a", filters=[{"type": "URLRewrite"}]),
        ],
        (FRONT, "GET /a", "denied web"),
        (FRONT, "GET /b", "permit rest all-unauthenticated"),
    ),
    case(
        "a route of a Server of another namespace, or of another Server, is none of this one",
        [
            lab.pod(),
            lab.server(accessPolicy="all-authenticated"),
            lab.route("far", parent={"group": lab.POLICY, "kind": "Server", "name": "cart", "namespace": "ops"}),
            lab.route("other", parent={"group": lab.POLICY, "kind": "Server", "name": "web"}),
            lab.route("outbound", parent={"group": "", "kind": "Service", "name": "cart", "port": 80}),
        ],
        (FRONT, "GET /x", "permit all-authenticated"),
    ),
    case(
        "of equal matches the older route decides",
        [
            lab.pod(),
            lab.server(),
            lab.route("b", path="/a", created=OLD),
            lab.route("a", path="/a", created=YOUNG),
            lab.policy("old", account("front"), at=at_route("b")),
            lab.policy("young", account("batch"), at=at_route("a")),
        ],
        (FRONT, "GET /a", "permit b old"),
        (BATCH, "GET /a", "denied b"),
    ),
]
