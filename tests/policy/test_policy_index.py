from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import policy_lab as lab
import pytest
from policy_lab import CART_IP, CART_POD, CART_VIP, indexed, parsed

from core.k8s.objects import Pod
from core.refs import Ref, default_ref
from policy import wire
from policy.index import Index, IndexSettings, IpKey, Key, PodKey, inbound
from policy.index.options import read_port_list
from policy.index.report import authz, explain, problems
from policy.index.store import Store

EVERYWHERE = (wire.Network("0.0.0.0/0"), wire.Network("::/0"))
FRONT = "spiffe://cluster.local/ns/shop/sa/front"
BASE = (lab.namespace(), lab.pod(), lab.service(), lab.endpoints("cart-0"))


def policy_of(index: Index, port: int = 8080) -> wire.InboundPolicy:
    return index.inbound_policy("shop", "cart-0", port)


def names(authorizations: tuple[wire.Authorization, ...]) -> list[str]:
    return [granted.ref.name for granted in authorizations]


def reasons(index: Index) -> list[tuple[str, str]]:
    return [(problem.ref.name, problem.reason) for problem in problems(index)]


# --- default policies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "networks", "authentication", "audit"),
    [
        ("all-unauthenticated", EVERYWHERE, wire.Anyone(), False),
        ("all-authenticated", EVERYWHERE, wire.Meshed(("*",)), False),
        ("cluster-unauthenticated", (wire.Network("10.0.0.0/8"),), wire.Anyone(), False),
        ("cluster-authenticated", (wire.Network("10.0.0.0/8"),), wire.Meshed(("*",)), False),
        ("audit", EVERYWHERE, wire.Anyone(), True),
    ],
)
def test_a_default_policy_grants_what_its_name_says(
    name: str, networks: tuple[wire.Network, ...], authentication: wire.Anyone | wire.Meshed, audit: bool
) -> None:
    settings = IndexSettings(cluster_networks=("10.0.0.0/8",))
    granted = wire.Authorization(default_ref(name), networks, authentication, audit)
    by_annotation = indexed(lab.pod(default_inbound_policy=name), settings=settings)
    assert policy_of(by_annotation) == wire.InboundPolicy(default_ref(name), "detect", (granted,))
    by_server = indexed(lab.pod(), lab.server(accessPolicy=name), settings=settings)
    assert policy_of(by_server).authorizations == (granted,)


def test_deny_grants_nothing() -> None:
    assert policy_of(indexed(lab.pod(default_inbound_policy="deny"))) == wire.InboundPolicy(default_ref("deny"), "detect", ())


def test_the_pods_annotation_beats_the_namespaces_which_beats_the_clusters() -> None:
    cluster = IndexSettings(default_inbound_policy="cluster-authenticated")
    assert policy_of(indexed(lab.pod(), settings=cluster)).server.name == "cluster-authenticated"
    assert policy_of(indexed(lab.pod(), lab.namespace(default_inbound_policy="deny"), settings=cluster)).server.name == "deny"
    both = indexed(lab.pod(default_inbound_policy="audit"), lab.namespace(default_inbound_policy="deny"), settings=cluster)
    assert policy_of(both).server.name == "audit"


def test_a_wrong_default_policy_denies_and_is_reported() -> None:
    index = indexed(lab.namespace(default_inbound_policy="all-unauthenticated"), lab.pod(default_inbound_policy="all-unauthenticatd"))
    assert policy_of(index).server == default_ref("deny")
    assert policy_of(index).authorizations == ()
    assert reasons(index) == [("cart-0", "invalid-annotation")]


def test_the_default_policy_is_live() -> None:
    index = indexed(*BASE)
    assert CART_POD in index.apply(parsed(lab.namespace(default_inbound_policy="deny")))
    assert policy_of(index).server.name == "deny"
    assert CART_POD in index.apply(parsed(lab.pod(default_inbound_policy="audit")))
    assert policy_of(index).server.name == "audit"


def test_nobody_is_let_in_at_an_unknown_pod() -> None:
    assert Index().inbound_policy("shop", "ghost", 80).authorizations == ()


# --- servers -----------------------------------------------------------------------------------------------------------


def test_a_server_takes_its_port_over_and_only_that() -> None:
    index = indexed(lab.pod(), lab.server())
    assert policy_of(index) == wire.InboundPolicy(Ref(lab.POLICY, "Server", "shop", "cart"), "detect", ())
    assert policy_of(index, 8081).server == default_ref("all-unauthenticated")


def test_a_port_may_be_the_name_of_a_container_port() -> None:
    index = indexed(lab.pod(ports={"http": 8080, "admin": 9000}), lab.server(port="admin"))
    assert policy_of(index, 9000).server.kind == "Server"
    assert policy_of(index, 8080).server.kind == "default"


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ({}, True),
        ({"matchLabels": {"app": "cart"}}, True),
        ({"matchLabels": {"app": "web"}}, False),
        ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web", "cart"]}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["cart"]}]}, False),
        ({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["x"]}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}, False),
        ({"matchLabels": {"app": "cart"}, "matchExpressions": [{"key": "tier", "operator": "Exists"}]}, False),
    ],
)
def test_selectors_choose_pods(selector: lab.Raw, selected: bool) -> None:
    assert (policy_of(indexed(lab.pod(), lab.server(selector=selector))).server.kind == "Server") is selected


def test_a_server_of_another_namespace_selects_nothing() -> None:
    assert policy_of(indexed(lab.pod(in_namespace="other"), lab.server())).server.kind == "default"


@pytest.mark.parametrize("order", [0, 1])
def test_of_overlapping_servers_the_oldest_wins_and_the_other_is_reported(order: int) -> None:
    servers = [lab.server("young", created="2026-02-01T00:00:00Z"), lab.server("old", created="2026-01-01T00:00:00Z")]
    index = indexed(lab.pod(), *(servers[::-1] if order else servers))
    assert policy_of(index).server.name == "old"
    assert reasons(index) == [("young", "overlap")]
    report = explain(index, "shop", "cart-0", 8080)
    assert report is not None and [ref.name for ref in report.shadowed] == ["young"]


def test_of_servers_of_one_age_the_first_name_wins() -> None:
    assert policy_of(indexed(lab.pod(), lab.server("b"), lab.server("a"))).server.name == "a"


def test_without_a_server_the_port_is_opaque_when_listed() -> None:
    assert policy_of(indexed(lab.pod()), 5432).protocol == "opaque"
    listed = indexed(lab.pod(opaque_ports="9000-9010,http"))
    assert [policy_of(listed, port).protocol for port in (5432, 9005, 8080)] == ["detect", "opaque", "opaque"]
    assert policy_of(indexed(lab.pod(), lab.namespace(opaque_ports="8080"))).protocol == "opaque"
    assert policy_of(indexed(lab.pod(opaque_ports=""), lab.namespace(opaque_ports="8080"))).protocol == "detect"


def test_a_port_may_require_an_identity_whatever_the_default_is() -> None:
    index = indexed(lab.pod(require_identity_ports="http,9000"), lab.namespace(default_inbound_policy="cluster-unauthenticated"))
    found = {port: policy_of(index, port) for port in (8080, 9000, 9001)}
    assert {port: policy.server.name for port, policy in found.items()} == {
        8080: "cluster-authenticated",
        9000: "cluster-authenticated",
        9001: "cluster-unauthenticated",
    }
    assert found[8080].authorizations[0].authentication == wire.Meshed(("*",))
    listed = indexed(lab.pod(), lab.namespace(require_identity_ports="8080"))
    assert policy_of(listed).server.name == "all-authenticated"
    for name in ("deny", "all-authenticated"):
        assert policy_of(indexed(lab.pod(require_identity_ports="8080", default_inbound_policy=name))).server.name == name


def test_a_list_of_ports_with_identity_that_cannot_be_read_opens_none() -> None:
    index = indexed(lab.pod(require_identity_ports="9000,80-70"))
    assert policy_of(index, 8080).server.name == "all-authenticated"
    assert reasons(index) == [("cart-0", "invalid-annotation")]


def test_a_wrong_port_list_is_reported() -> None:
    assert reasons(indexed(lab.pod(opaque_ports="80,99999,9-1"))) == [("cart-0", "invalid-annotation")]


def test_path_checks_are_switched_off_for_a_port_only_by_its_own_annotation() -> None:
    index = indexed(lab.pod(unchecked_path_ports="8080"), lab.server())
    assert (policy_of(index).check_paths, policy_of(index, 8081).check_paths) == (False, True)


# --- authorization policies --------------------------------------------------------------------------------------------


def test_without_required_authentication_everybody_is_let_in() -> None:
    index = indexed(lab.pod(), lab.server(), lab.policy())
    ref = Ref(lab.POLICY, "AuthorizationPolicy", "shop", "allow")
    assert policy_of(index).authorizations == (wire.Authorization(ref, EVERYWHERE, wire.Anyone()),)


def test_a_service_account_is_an_identity() -> None:
    own = lab.policy("a", lab.ref("ServiceAccount", "front"))
    other = lab.policy("b", lab.ref("ServiceAccount", "front", "ops"))
    index = indexed(lab.pod(), lab.server(), own, other)
    found = [granted.authentication for granted in policy_of(index).authorizations]
    assert found == [wire.Meshed((FRONT,)), wire.Meshed(("spiffe://cluster.local/ns/ops/sa/front",))]


def test_identity_and_network_must_both_hold() -> None:
    required = lab.ref("MeshTLSAuthentication", "friends"), lab.ref("NetworkAuthentication", "office")
    index = indexed(
        lab.pod(),
        lab.server(),
        lab.policy("p", *required),
        lab.mesh_tls("friends", FRONT),
        lab.networks("office", "10.0.0.0/8", excluded=("10.1.0.0/16",)),
    )
    (granted,) = policy_of(index).authorizations
    assert granted.networks == (wire.Network("10.0.0.0/8", ("10.1.0.0/16",)),)
    assert granted.authentication == wire.Meshed((FRONT,))


def test_identity_refs_become_uris_and_patterns() -> None:
    refs = [{"kind": "ServiceAccount", "name": "front"}, {"kind": "Namespace", "name": "ops"}]
    index = indexed(lab.pod(), lab.server(), lab.policy("p", lab.ref("MeshTLSAuthentication", "friends")), lab.mesh_tls(refs=refs))
    assert policy_of(index).authorizations[0].authentication == wire.Meshed((FRONT, "spiffe://cluster.local/ns/ops/sa/*"))


def test_an_unresolved_reference_makes_the_whole_policy_ineffective_until_it_resolves() -> None:
    required = lab.ref("MeshTLSAuthentication", "friends", "ops"), lab.ref("NetworkAuthentication", "office")
    index = indexed(lab.pod(), lab.server(), lab.policy("p", *required), lab.networks("office", "10.0.0.0/8"))
    assert policy_of(index).authorizations == ()
    assert reasons(index) == [("p", "unresolved-reference")]
    friends = parsed(lab.mesh_tls("friends", FRONT, in_namespace="ops"))
    assert index.apply(friends) == {CART_POD}
    assert names(policy_of(index).authorizations) == ["p"]
    assert index.delete(friends.ref) == {CART_POD}
    assert policy_of(index).authorizations == ()


def test_a_policy_of_the_namespace_counts_for_each_of_its_servers_and_not_without_one() -> None:
    index = indexed(lab.pod(), lab.server(), lab.policy("ns", at=lab.target("Namespace", "shop")))
    assert names(policy_of(index).authorizations) == ["ns"]
    assert names(policy_of(index, 8081).authorizations) == ["all-unauthenticated"]


def test_server_namespace_and_access_policy_are_a_union_and_audit_comes_last() -> None:
    index = indexed(lab.pod(), lab.server(accessPolicy="audit"), lab.policy("own"), lab.policy("ns", at=lab.target("Namespace", "shop")))
    assert names(policy_of(index).authorizations) == ["own", "ns", "audit"]


def test_a_servers_policy_that_does_not_inherit_drops_the_namespaces() -> None:
    index = indexed(
        lab.pod(),
        lab.server(accessPolicy="all-authenticated"),
        lab.policy("own", inherit=False),
        lab.policy("ns", at=lab.target("Namespace", "shop")),
    )
    assert names(policy_of(index).authorizations) == ["own", "all-authenticated"]


def test_narrowing_holds_even_when_the_grant_beside_it_does_not_resolve() -> None:
    dangling = lab.policy("own", lab.ref("NetworkAuthentication", "gone"), inherit=False)
    index = indexed(lab.pod(), lab.server(), dangling, lab.policy("ns", at=lab.target("Namespace", "shop")))
    assert policy_of(index).authorizations == ()


def test_a_policy_without_its_target_is_reported() -> None:
    assert reasons(indexed(lab.pod(), lab.policy("lost"))) == [("lost", "no-such-target")]


# --- routes ------------------------------------------------------------------------------------------------------------


def test_a_route_has_its_own_policies_and_the_servers() -> None:
    index = indexed(
        lab.pod(), lab.server(), lab.policy("wide"), lab.route(path="/a"), lab.policy("narrow", at=lab.target("HTTPRoute", "web"))
    )
    (found,) = policy_of(index).routes
    assert (found.kind, found.ref.name, names(found.authorizations)) == ("http", "web", ["narrow", "wide"])
    assert found.rules[0].matches == (wire.HttpMatch(wire.PathMatch("PathPrefix", "/a")),)


def test_a_routes_policy_that_does_not_inherit_leaves_only_the_routes_own() -> None:
    at = lab.target("HTTPRoute", "web")
    index = indexed(
        lab.pod(),
        lab.server(accessPolicy="all-unauthenticated"),
        lab.policy("wide"),
        lab.route(),
        lab.policy("one", at=at, inherit=False),
        lab.policy("two", at=at),
    )
    assert names(policy_of(index).routes[0].authorizations) == ["one", "two"]
    assert names(policy_of(index).authorizations) == ["wide", "all-unauthenticated"]


def test_routes_are_ordered_by_age_then_name() -> None:
    index = indexed(lab.pod(), lab.server(), lab.route("b"), lab.route("a"), lab.route("z", created="2026-01-01T00:00:00Z"))
    assert [found.ref.name for found in policy_of(index).routes] == ["a", "b", "z"]


def test_beside_a_grpc_route_no_http_route_is_attached() -> None:
    index = indexed(lab.pod(), lab.server(), lab.route("web"), lab.route("rpc", kind="GRPCRoute"))
    assert [found.ref.name for found in policy_of(index).routes] == ["rpc"]
    assert reasons(index) == [("web", "conflicted")]


def test_a_route_that_cannot_be_enforced_lets_nobody_in_instead_of_vanishing() -> None:
    index = indexed(lab.pod(), lab.server(accessPolicy="all-unauthenticated"), lab.route(filters=[{"type": "URLRewrite"}]))
    assert [found.authorizations for found in policy_of(index).routes] == [()]
    assert reasons(index) == [("web", "unsupported")]


def test_a_route_to_a_server_of_another_namespace_is_not_attached_and_reported() -> None:
    parent = {"group": lab.POLICY, "kind": "Server", "name": "cart", "namespace": "other"}
    index = indexed(lab.pod(), lab.server(), lab.route(parent=parent))
    assert policy_of(index).routes == ()
    assert reasons(index) == [("web", "unattachable-parent")]


def test_a_route_to_a_service_that_leaves_out_the_empty_group_is_reported() -> None:
    index = indexed(lab.pod(), lab.server(), lab.route(parent={"kind": "Service", "name": "cart"}))
    assert reasons(index) == [("web", "mistaken-parent")]


def test_a_route_without_its_server_is_reported() -> None:
    assert reasons(indexed(lab.pod(), lab.route())) == [("web", "no-such-parent")]


def test_routes_of_an_opaque_server_stay_attached_so_that_they_deny_and_are_reported() -> None:
    index = indexed(lab.pod(), lab.server(proxyProtocol="opaque"), lab.route())
    assert len(policy_of(index).routes) == 1
    assert reasons(index) == [("cart", "routes-on-opaque")]


def test_small_objects_that_make_a_huge_policy_deny_everything_before_it_is_made_and_are_reported() -> None:
    office = lab.networks("office", *(f"10.{at >> 8}.{at & 255}.0/24" for at in range(1000)))
    everywhere = [
        lab.policy(f"allow{at}", lab.ref("NetworkAuthentication", "office"), at=lab.target("Namespace", "shop")) for at in range(100)
    ]
    index = indexed(
        lab.pod(), lab.server(accessPolicy="all-unauthenticated"), office, *everywhere, *(lab.route(f"web{at}") for at in range(300))
    )
    assert policy_of(index) == wire.InboundPolicy(Ref(lab.POLICY, "Server", "shop", "cart"), "detect", ())  # told in full it takes 1.2 GB
    assert ("cart", "too-large") in reasons(index)
    index.delete(Ref(lab.POLICY, "NetworkAuthentication", "shop", "office"))
    assert len(policy_of(index).routes) == 300
    assert "too-large" not in [reason for _, reason in reasons(index)]


def many_policies() -> list[dict[str, Any]]:
    office = lab.networks("office", *(f"10.{at >> 8}.{at & 255}.0/24" for at in range(1000)))
    to = lab.target("Namespace", "shop")
    return [office, *(lab.policy(f"allow{at}", lab.ref("NetworkAuthentication", "office"), at=to) for at in range(200))]


def many_long_paths() -> list[dict[str, Any]]:
    matches = [{"path": {"type": "PathPrefix", "value": f"/{at}/{'x' * 900}"}} for at in range(60)]
    return [lab.route(f"web{at}", matches=matches) for at in range(100)]


@pytest.mark.parametrize("make", [many_policies, many_long_paths])
def test_a_policy_that_is_longer_than_a_sidecar_reads_denies_everything_and_is_reported(make: Callable[[], list[dict[str, Any]]]) -> None:
    index = indexed(lab.pod(), lab.server(accessPolicy="all-unauthenticated"), *make())
    assert policy_of(index) == wire.InboundPolicy(Ref(lab.POLICY, "Server", "shop", "cart"), "detect", ())
    assert ("cart", "too-large") in reasons(index)


def test_a_server_with_more_regular_expressions_than_a_sidecar_takes_denies_everything_and_is_reported() -> None:
    def written(count: int) -> dict[str, Any]:
        return {"matches": [{"path": {"type": "RegularExpression", "value": f"/{count}/{at}.*"}} for at in range(50)]}

    index = indexed(lab.pod(), lab.server(accessPolicy="all-unauthenticated"), *(lab.route(f"web{at}", **written(at)) for at in range(21)))
    assert policy_of(index) == wire.InboundPolicy(Ref(lab.POLICY, "Server", "shop", "cart"), "detect", ())
    assert reasons(index) == [("cart", "too-large")]
    index.apply(parsed(lab.route("web20")))
    assert len(policy_of(index).routes) == 21
    assert reasons(index) == []


def test_a_port_list_beyond_all_reason_is_wrong_as_a_whole() -> None:
    listed = ",".join(["8080"] * 5000)
    assert policy_of(indexed(lab.pod(opaque_ports=listed))).protocol == "detect"
    assert reasons(indexed(lab.pod(opaque_ports=listed))) == [("cart-0", "invalid-annotation")]
    assert read_port_list(",".join(["60000-60010"] * 1000)).holds(60005), "as many as are read are not too long"


def test_annotations_that_change_all_the_time_are_not_remembered_for_ever() -> None:
    lists = [weakref.ref(read_port_list(f"{number}," + "x" * 10_000)) for number in range(500)]
    gc.collect()
    assert sum(found() is not None for found in lists) <= 64


def test_of_a_server_without_effect_on_many_pods_a_few_are_named() -> None:
    pods = [lab.pod(f"cart-{number}", f"10.1.0.{number}") for number in range(50)]
    index = indexed(*pods, lab.server("old", created="2026-01-01T00:00:00Z"), lab.server("young", created="2026-01-02T00:00:00Z"))
    assert reasons(index) == [("young", "overlap")] * 3


# --- destinations ------------------------------------------------------------------------------------------------------

ENDPOINT = wire.Endpoint("10.0.0.5:8080", lab.CART.uri, Ref("", "Pod", "shop", "cart-0"))
SERVICE = Ref("", "Service", "shop", "cart")


def test_a_service_address_has_its_ready_endpoints() -> None:
    index = indexed(*BASE)
    assert index.destination("10.96.0.1:80") == wire.Destination("service", SERVICE, "detect", (ENDPOINT,))
    index.apply(parsed(lab.endpoints("cart-0", ready=False)))
    assert index.destination("10.96.0.1:80") == wire.Destination("service", SERVICE, "detect", ())
    index.apply(parsed(lab.endpoints("cart-0", ready=None)))
    assert index.destination("10.96.0.1:80").endpoints == (ENDPOINT,)


def test_a_port_that_the_service_does_not_define_is_refused() -> None:
    assert indexed(*BASE).destination("10.96.0.1:81") == wire.Destination("refused", SERVICE, "detect")


def test_a_pod_address_is_that_pod() -> None:
    found = indexed(*BASE).destination("10.0.0.5:9999")
    assert found == wire.Destination("pod", ENDPOINT.pod, "detect", (wire.Endpoint("10.0.0.5:9999", lab.CART.uri, ENDPOINT.pod),))


def test_everything_else_is_external() -> None:
    assert indexed(*BASE).destination("192.0.2.1:443") == wire.Destination("external", None, "detect")
    assert indexed(*BASE).destination("192.0.2.1:25").protocol == "opaque"


@pytest.mark.parametrize("pod", [lab.pod(meshed=False), lab.pod(skip_inbound_ports="8000-8100")])
def test_an_endpoint_without_a_sidecar_on_the_port_has_no_identity(pod: lab.Raw) -> None:
    index = indexed(pod, lab.service(), lab.endpoints("cart-0"))
    assert [found.identity for found in index.destination("10.96.0.1:80").endpoints] == [None]
    assert [found.identity for found in index.destination("10.0.0.5:8080").endpoints] == [None]


def test_a_sidecars_admin_port_has_no_identity_because_it_is_not_redirected() -> None:
    index = indexed(*BASE)
    assert [index.destination(f"10.0.0.5:{port}").endpoints[0].identity for port in (8080, 4191)] == [lab.CART.uri, None]


def test_a_namespaces_skip_list_takes_no_identity_from_pods_that_were_injected_without_it() -> None:
    index = indexed(*BASE, lab.namespace(skip_inbound_ports="8080"))
    assert [found.identity for found in index.destination("10.96.0.1:80").endpoints] == [lab.CART.uri]


def test_an_endpoint_whose_pod_is_not_known_is_left_out_until_it_is() -> None:
    """It may have a sidecar: nobody must be sent there in plaintext because slices come before pods."""
    index = indexed(lab.service(), lab.endpoints("cart-0"))
    assert index.destination("10.96.0.1:80").endpoints == ()
    assert CART_VIP in index.apply(parsed(lab.pod()))
    assert [found.identity for found in index.destination("10.96.0.1:80").endpoints] == [lab.CART.uri]
    assert CART_VIP in index.delete(parsed(lab.pod()).ref)
    assert index.destination("10.96.0.1:80").endpoints == ()


def test_an_endpoint_that_names_no_pod_is_the_pod_at_its_address() -> None:
    """Slices written by hand name none; what is meshed must prove itself behind them too."""
    by_hand = lab.endpoints("cart-0")
    del by_hand["endpoints"][0]["targetRef"]
    index = indexed(lab.service(), by_hand)
    assert index.destination("10.96.0.1:80").endpoints == (wire.Endpoint("10.0.0.5:8080"),), "no pod: beyond the mesh"
    assert CART_VIP in index.apply(parsed(lab.pod()))
    assert [found.identity for found in index.destination("10.96.0.1:80").endpoints] == [lab.CART.uri]
    assert CART_VIP in index.delete(parsed(lab.pod()).ref)
    assert index.destination("10.96.0.1:80").endpoints == (wire.Endpoint("10.0.0.5:8080"),)


@pytest.mark.parametrize("named", [{"meshed": False}, {"skip_inbound_ports": "8080"}], ids=["without a sidecar", "past its sidecar"])
def test_an_endpoint_that_names_a_pod_at_an_address_that_is_not_its_own_gets_no_plaintext(named: dict[str, Any]) -> None:
    index = indexed(lab.service(), lab.pod(ip="10.0.0.5"), lab.pod("plain-0", "10.0.0.9", **named), lab.endpoints(plain_0="10.0.0.5"))
    assert index.destination("10.96.0.1:80").endpoints == ()
    index.apply(parsed(lab.endpoints(plain_0="10.0.0.9")))
    assert [(found.addr, found.identity) for found in index.destination("10.96.0.1:80").endpoints] == [("10.0.0.9:8080", None)]


def test_an_endpoint_that_names_a_meshed_pod_has_to_be_that_pod_wherever_it_is() -> None:
    index = indexed(lab.service(), lab.pod(), lab.endpoints(cart_0="192.168.7.7"))
    assert [found.identity for found in index.destination("10.96.0.1:80").endpoints] == [lab.CART.uri]


def test_what_a_port_of_a_pod_speaks_is_asked_once_however_often_slices_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    port_protocol = inbound.port_protocol

    def counted(store: Store, pod: Pod, port: int, settings: IndexSettings) -> wire.Protocol:
        asked.append(port)
        return port_protocol(store, pod, port, settings)

    monkeypatch.setattr("policy.index.inbound.port_protocol", counted)
    slices = [lab.endpoints(name=f"cart-{number}", cart_0=f"10.0.7.{number}") for number in range(20)]
    index = indexed(lab.pod(opaque_ports="8080"), lab.service(), *slices)
    found = index.destination("10.96.0.1:80")
    assert (len(found.endpoints), found.protocol, asked) == (20, "opaque", [8080])


def test_pods_that_ended_or_share_the_nodes_address_own_none() -> None:
    assert indexed(lab.pod(phase="Succeeded")).destination("10.0.0.5:80").kind == "external"
    assert indexed(lab.pod(host_network=True)).destination("10.0.0.5:80").kind == "external"
    reused = indexed(lab.pod("old", created="2026-01-01T00:00:00Z"), lab.pod("new", created="2026-01-02T00:00:00Z"))
    found = reused.destination("10.0.0.5:80").ref
    assert found is not None and found.name == "new"


def test_endpoints_are_of_the_dialled_family_when_there_are_some() -> None:
    dual = lab.service()
    dual["spec"]["clusterIPs"] = ["10.96.0.1", "fd00::1"]
    index = indexed(lab.pod(), dual, lab.endpoints("cart-0"))
    assert [found.addr for found in index.destination("[fd00::1]:80").endpoints] == ["10.0.0.5:8080"]
    index.apply(parsed(lab.endpoints(name="cart-6", cart_0="fd00::5")))
    assert [found.addr for found in index.destination("[fd00::1]:80").endpoints] == ["[fd00::5]:8080"]
    assert [found.addr for found in index.destination("10.96.0.1:80").endpoints] == ["10.0.0.5:8080"]


@pytest.mark.parametrize(
    ("objects", "protocol"),
    [
        ((lab.service(app_protocol="http"),), "http1"),
        ((lab.service(app_protocol="kubernetes.io/h2c"),), "http2"),
        ((lab.service(app_protocol="grpc"),), "grpc"),
        ((lab.service(app_protocol="example.com/own"),), "detect"),
        ((lab.service(app_protocol="TCP"),), "detect"),
        ((lab.service(app_protocol="tcp"), lab.pod(opaque_ports="8080")), "opaque"),
        ((lab.service(app_protocol="pillion.dev/opaque"),), "opaque"),
        ((lab.service(opaque_ports="80"),), "opaque"),
        ((lab.service(opaque_ports="web"),), "opaque"),
        ((lab.service(app_protocol="http", opaque_ports="80"),), "http1"),
        ((lab.service(), lab.namespace(opaque_ports="80")), "opaque"),
        ((lab.service(), lab.server(proxyProtocol="gRPC")), "grpc"),
        ((lab.service(), lab.pod(opaque_ports="8080")), "opaque"),
    ],
)
def test_the_protocol_of_a_service_port_comes_from_the_nearest_word(objects: tuple[lab.Raw, ...], protocol: str) -> None:
    assert indexed(lab.pod(), lab.endpoints("cart-0"), *objects).destination("10.96.0.1:80").protocol == protocol


def test_endpoints_that_disagree_are_detected_unless_one_is_opaque() -> None:
    pods = lab.pod("cart-0"), lab.pod("cart-1", "10.0.0.6", labels={"app": "other"})
    index = indexed(*pods, lab.service(), lab.endpoints("cart-0", "cart-1"), lab.server(proxyProtocol="HTTP/2"))
    assert index.destination("10.96.0.1:80").protocol == "detect"
    index.apply(parsed(lab.server(proxyProtocol="opaque")))
    assert index.destination("10.96.0.1:80").protocol == "opaque"


# --- verbs -------------------------------------------------------------------------------------------------------------

PODS: set[Key] = {CART_POD}
ALL: set[Key] = {CART_POD, CART_IP, CART_VIP}


@pytest.mark.parametrize(
    ("raw", "changed"),
    [
        (lab.endpoints("cart-0"), {CART_VIP}),
        (lab.service(), {CART_VIP}),
        (lab.pod(), ALL),
        (lab.namespace(opaque_ports="1"), ALL),
        (lab.server(), ALL),
        (lab.server("none", selector={"matchLabels": {"app": "web"}}), set()),
        (lab.policy(), PODS),
        (lab.route(), PODS),
        (lab.mesh_tls("unused", "*"), set()),
        (lab.endpoints("cart-0", name="other-1", of="unknown"), set()),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_every_verb_names_what_it_changed_and_nothing_else(raw: lab.Raw, changed: set[Key]) -> None:
    stranger = lab.pod("stranger", "10.9.9.9", in_namespace="other")
    object_ = parsed(raw)
    index = indexed(*BASE, stranger)
    index.delete(object_.ref)
    assert index.apply(object_) == changed
    assert index.apply(object_) == set()
    assert index.delete(object_.ref) == changed
    assert index.delete(object_.ref) == set()


def test_a_changed_object_names_the_subjects_of_before_and_after() -> None:
    index = indexed(*BASE)
    assert index.apply(parsed(lab.service(vip="10.96.0.2"))) == {CART_VIP, IpKey("10.96.0.2")}
    assert index.apply(parsed(lab.pod(ip="10.0.0.9"))) == {CART_POD, CART_IP, IpKey("10.0.0.9"), IpKey("10.96.0.2")}


def test_reset_applies_what_is_there_and_deletes_what_is_not() -> None:
    index = indexed(*BASE, lab.pod("gone", "10.0.0.7"), lab.server())
    fresh = parsed(lab.pod("fresh", "10.0.0.8"))
    changed = index.reset("", "Pod", (parsed(lab.pod()), fresh))
    assert changed == {PodKey("shop", "gone"), IpKey("10.0.0.7"), PodKey("shop", "fresh"), IpKey("10.0.0.8")}
    assert index.pod("shop", "gone") is None
    assert policy_of(index).server.kind == "Server"
    assert index.reset("", "Pod", ()) == {CART_POD, CART_IP, CART_VIP, PodKey("shop", "fresh"), IpKey("10.0.0.8")}


def test_deleting_everything_leaves_nothing_behind() -> None:
    index = indexed(
        *BASE, lab.server(), lab.policy("p", lab.ref("NetworkAuthentication", "office")), lab.networks("office", "10.0.0.0/8"), lab.route()
    )
    for ref in list(index.store.objects):
        index.delete(ref)
    left = {name: value for name, value in vars(index.store).items() if value}
    assert left == {}


def test_one_endpoint_slice_costs_the_same_however_much_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    raws = [lab.pod(f"p-{n}", f"10.1.{n // 250}.{n % 250}") for n in range(1000)]
    index = indexed(lab.server(), *raws, *(lab.service(f"s-{n}", f"10.97.0.{n}") for n in range(200)), lab.service())
    touched: list[object] = []
    monkeypatch.setattr(Index, "_pod_keys", lambda _, pod: touched.append(pod) or set())
    assert index.apply(parsed(lab.endpoints("p-1"))) == {CART_VIP}
    assert touched == []


# --- reports -----------------------------------------------------------------------------------------------------------


def test_explain_tells_every_step() -> None:
    dangling = lab.policy("dangling", lab.ref("NetworkAuthentication", "gone"))
    narrow = lab.policy("narrow", lab.ref("ServiceAccount", "front"), at=lab.target("HTTPRoute", "web"), inherit=False)
    index = indexed(lab.pod(), lab.server(), dangling, lab.route(), narrow)
    report = explain(index, "shop", "cart-0", 8080)
    assert report is not None
    assert report.why == "server shop/cart takes the port over, with accessPolicy deny"
    assert report.grants[0].problem == "networkauthentication shop/gone does not exist, so the whole policy grants nothing"
    assert (report.routes[0].attached, report.routes[0].narrowed, report.routes[0].grants[0].clients) == (True, True, FRONT)
    default = explain(index, "shop", "cart-0", 1)
    assert default is not None and default.why.endswith("default policy all-unauthenticated from the cluster's default")
    assert explain(index, "shop", "ghost", 1) is None


def test_authz_has_a_row_for_every_way_in_and_for_a_closed_port() -> None:
    index = indexed(
        lab.pod(ports={"http": 8080, "admin": 9000}),
        lab.server(port=9000),
        lab.policy("p", lab.ref("ServiceAccount", "front"), at=lab.target("HTTPRoute", "web")),
    )
    rows = [
        (row.port, row.server.name, row.authorization and row.authorization.name, row.clients) for row in authz(index, "shop", "cart-0")
    ]
    assert rows == [(8080, "all-unauthenticated", "all-unauthenticated", "anyone"), (9000, "cart", None, "nobody")]
    index.apply(parsed(lab.route()))
    row = authz(index, "shop", "cart-0")[1]
    assert (row.route and row.route.name, row.clients) == ("web", FRONT)
