"""The rules of evaluation end to end: manifests through model and index, over the wire, to what a sidecar decides about a client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import policy_lab as lab
import pytest
from policy_rule_cases import (
    FAR,
    FOREIGN,
    FRONT,
    OLD,
    PLAIN,
    PLAIN_FAR,
    POLICIES,
    ROUTES,
    SERVERS,
    YOUNG,
    Asks,
    Raw,
    account,
    at_namespace,
    at_route,
    case,
)  # fmt: skip

from core.k8s.fields import InvalidObject
from core.refs import Ref
from policy import wire
from policy.authorize import BadTarget, Client, Denied, NoRoute, Permit, PortAuthorizer
from policy.index import Index, IndexSettings


def ask(index: Index, client: Client, what: str, *, pod: str = "cart-0") -> str:
    """What the sidecar of a pod answers. what: ``[port] tcp``, ``[port] METHOD target`` or ``[port] grpc /service/method``."""
    first, _, rest = what.partition(" ")
    port, action = (int(first), rest) if first.isdigit() else (8080, what)
    line = wire.encode(wire.PortPolicy(port, index.inbound_policy("shop", pod, port)))
    message = wire.decode_to_sidecar_untrusted(line)
    assert isinstance(message, wire.PortPolicy)
    compiled = PortAuthorizer(message.policy, "cluster.local")
    mine = compiled.for_client(client)
    verb, _, target = action.partition(" ")
    if verb == "tcp":
        return text(mine.connection())
    nothing = (None,) * len(compiled.header_names)
    return text(mine.request({"grpc": "POST"}.get(verb, verb).encode(), target.encode(), b"cart.shop", nothing))


def text(decision: Permit | Denied | NoRoute | BadTarget) -> str:
    words = [{Permit: "permit", Denied: "denied", NoRoute: "no route", BadTarget: "bad target"}[type(decision)]]
    words += [ref.name for ref in (decision.route, decision.authorization) if ref is not None]
    assert decision.reason
    return " ".join(words) + (" (audit)" if decision.audit else "")


def access_cases() -> list[Any]:
    """Default inbound policies (by annotation) and accessPolicy (of a Server) grant the same."""
    answers = {
        #                           PLAIN      PLAIN_FAR  FRONT      FAR        FOREIGN
        "all-unauthenticated": ("permit", "permit", "permit", "permit", "permit"),
        "all-authenticated": ("denied", "denied", "permit", "permit", "denied"),
        "cluster-unauthenticated": ("permit", "denied", "permit", "denied", "permit"),
        "cluster-authenticated": ("denied", "denied", "permit", "denied", "denied"),
        "audit": ("permit", "permit", "permit", "permit", "permit"),
        "deny": ("denied", "denied", "denied", "denied", "denied"),
    }
    found = []
    for name, expected in answers.items():
        full = [f"permit {name}{' (audit)' if name == 'audit' else ''}" if one == "permit" else one for one in expected]
        clients = (PLAIN, PLAIN_FAR, FRONT, FAR, FOREIGN)
        asks = [(client, what, answer) for client, answer in zip(clients, full, strict=True) for what in ("tcp", "GET /x", "POST /a//../b")]
        found.append(case(f"default policy {name}", [lab.pod(default_inbound_policy=name)], *asks))
        found.append(case(f"default policy {name} of the namespace", [lab.namespace(default_inbound_policy=name), lab.pod()], *asks))
        found.append(case(f"accessPolicy {name}", [lab.pod(default_inbound_policy="deny"), lab.server(accessPolicy=name)], *asks))
    return found


@pytest.mark.parametrize(("given", "asks"), access_cases())
def test_default_policies_and_access_policies(given: Sequence[Raw], asks: Asks) -> None:
    index = lab.indexed(*given)
    assert [ask(index, client, what) for client, what, _ in asks] == [answer for _, _, answer in asks]


@pytest.mark.parametrize(("given", "asks"), [*SERVERS, *POLICIES, *ROUTES])
def test_rule(given: Sequence[Raw], asks: Asks) -> None:
    index = lab.indexed(*given)
    assert [ask(index, client, what) for client, what, _ in asks] == [answer for _, _, answer in asks]


@pytest.mark.parametrize(("given", "asks"), [*SERVERS, *POLICIES, *ROUTES])
def test_the_order_in_which_objects_arrive_decides_nothing(given: Sequence[Raw], asks: Asks) -> None:
    index = lab.indexed(*reversed(given))
    assert [ask(index, client, what) for client, what, _ in asks] == [answer for _, _, answer in asks]


def test_a_port_name_is_looked_up_in_each_pod() -> None:
    index = lab.indexed(lab.pod(), lab.pod("cart-1", "10.0.0.6", ports={"http": 9090}), lab.server(port="http"))
    assert [ask(index, PLAIN, what, pod="cart-0") for what in ("8080 tcp", "9090 tcp")] == ["denied", "permit all-unauthenticated"]
    assert [ask(index, PLAIN, what, pod="cart-1") for what in ("8080 tcp", "9090 tcp")] == ["permit all-unauthenticated", "denied"]


def test_clusters_default_policy_and_networks_are_settings() -> None:
    index = lab.indexed(
        lab.pod(), settings=IndexSettings(default_inbound_policy="cluster-unauthenticated", cluster_networks=("203.0.113.0/24",))
    )
    assert [ask(index, client, "tcp") for client in (PLAIN_FAR, PLAIN)] == ["permit cluster-unauthenticated", "denied"]


# --- live: after each step the pod is named as changed, and the answers are these ---------------------------------------------------------

STEPS: list[tuple[str, Raw | Ref, list[str]]] = [
    #                                                            FRONT GET /a     PLAIN GET /b           FRONT tcp
    ("a Server closes the port", lab.server(created=YOUNG), ["denied", "denied", "denied"]),
    ("a policy opens it", lab.policy("own", account("front")), ["permit own", "denied", "permit own"]),
    ("a route attaches", lab.route(path="/a"), ["permit web own", "no route", "denied"]),
    ("its own policy narrows", lab.policy("r", account("batch"), at=at_route(), inherit=False), ["denied web", "no route", "denied"]),
    ("its own policy widens", lab.policy("r", account("batch"), at=at_route()), ["permit web own", "no route", "denied"]),
    ("another route attaches", lab.route("rest", path="/"), ["permit web own", "denied rest", "denied"]),
    ("the Namespace opens", lab.policy("ns", at=at_namespace()), ["permit web own", "permit rest ns", "denied"]),
    ("a route detaches", Ref(lab.GATEWAY, "HTTPRoute", "shop", "rest"), ["permit web own", "no route", "denied"]),
    ("the last route detaches", Ref(lab.GATEWAY, "HTTPRoute", "shop", "web"), ["permit own", "permit ns", "permit own"]),
    ("an older Server takes over", lab.server("first", created=OLD), ["permit ns", "permit ns", "permit ns"]),
    ("and goes", Ref(lab.POLICY, "Server", "shop", "first"), ["permit own", "permit ns", "permit own"]),
    ("the Namespace closes", Ref(lab.POLICY, "AuthorizationPolicy", "shop", "ns"), ["permit own", "denied", "permit own"]),
    ("the Server goes", Ref(lab.POLICY, "Server", "shop", "cart"), ["permit all-unauthenticated"] * 3),
    (
        "the pod's default changes",
        lab.pod(default_inbound_policy="all-authenticated"),
        ["permit all-authenticated", "denied", "permit all-authenticated"],
    ),
]


def test_every_change_is_live() -> None:
    index = lab.indexed(lab.namespace(), lab.pod())
    for what, change, expected in STEPS:
        changed = index.delete(change) if isinstance(change, Ref) else index.apply(lab.parsed(change))
        assert lab.CART_POD in changed, what
        answers = [ask(index, FRONT, "GET /a"), ask(index, PLAIN, "GET /b"), ask(index, FRONT, "tcp")]
        assert answers == expected, what


def test_a_namespace_may_not_be_targeted_by_policies_of_another() -> None:
    with pytest.raises(InvalidObject, match=r"spec\.targetRef\.name: expected the policy's own namespace shop"):
        lab.parsed(lab.policy("p", at=lab.target("Namespace", "ops")))
