"""policy.authorize: who is let in, why, and what is remembered."""

from __future__ import annotations

import ipaddress
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.refs import Ref, default_ref
from policy.authorize import BadTarget, Client, Denied, NoRoute, Permit, PortAuthorizer
from policy.networks import Networks
from policy.wire import (
    Anyone,
    Authorization,
    GrpcMatch,
    HttpMatch,
    InboundPolicy,
    Meshed,
    Network,
    PathMatch,
    Route,
    Rule,
    ValueMatch,
)

SERVER = Ref("policy.pillion.dev", "Server", "shop", "web")
EVERYWHERE = (Network("0.0.0.0/0"), Network("::/0"))
CART = "spiffe://cluster.local/ns/shop/sa/cart"
EVE = "spiffe://cluster.local/ns/eve/sa/eve"
FOREIGN = "spiffe://elsewhere.org/ns/shop/sa/cart"


def grant(name: str, *identities: str, networks: tuple[Network, ...] = EVERYWHERE, audit: bool = False) -> Authorization:
    """Without identities: for anyone."""
    ref = Ref("policy.pillion.dev", "AuthorizationPolicy", "shop", name)
    return Authorization(ref, networks, Meshed(identities) if identities else Anyone(), audit)


def from_(*cidrs: str, excluded: tuple[str, ...] = ()) -> tuple[Network, ...]:
    return tuple(Network(cidr, excluded) for cidr in cidrs)


def route(name: str, *matches: HttpMatch | GrpcMatch, grants: tuple[Authorization, ...] = (), hosts: tuple[str, ...] = ()) -> Route:
    kind = "grpc" if any(isinstance(match, GrpcMatch) for match in matches) else "http"
    ref = Ref("gateway.networking.k8s.io", "HTTPRoute", "shop", name)
    return Route(ref, kind, hosts, (Rule(matches),), grants)  # type: ignore[arg-type]


def exact(path: str, method: str | None = None) -> HttpMatch:
    return HttpMatch(PathMatch("Exact", path), method=method)


def prefix(path: str, method: str | None = None) -> HttpMatch:
    return HttpMatch(PathMatch("PathPrefix", path), method=method)


def policy(*grants: Authorization, routes: tuple[Route, ...] = (), check_paths: bool = True, server: Ref = SERVER) -> InboundPolicy:
    return InboundPolicy(server, "http1", grants, routes, check_paths)


def port(*grants: Authorization, routes: tuple[Route, ...] = (), check_paths: bool = True) -> PortAuthorizer:
    return PortAuthorizer(policy(*grants, routes=routes, check_paths=check_paths), "cluster.local")


def client(identity: str | None = None, ip: str = "10.1.2.3") -> Client:
    return Client(ip, identity, "" if identity else "plaintext")


def ask(
    of: PortAuthorizer,
    target: str = "/",
    *,
    method: str = "GET",
    identity: str | None = None,
    ip: str = "10.1.2.3",
    host: str = "web.shop",
    headers: tuple[bytes | None, ...] | None = None,
) -> Permit | Denied | NoRoute | BadTarget:
    values = headers if headers is not None else (None,) * len(of.header_names)
    return of.for_client(client(identity, ip)).request(method.encode(), target.encode(), host.encode(), values)


def answer(of: PortAuthorizer, target: str = "/", **request: object) -> str:
    """``Permit route/authorization``, or what else it is."""
    decision = ask(of, target, **request)  # type: ignore[arg-type]
    if isinstance(decision, Permit):
        return f"Permit {decision.route.name if decision.route else '-'}/{decision.authorization.name if decision.authorization else '-'}"
    return type(decision).__name__


# --- Linkerd's default policies, and one authorization at a time (linkerd.md 3.2, 3.3 step 7) -------------------------------------------

CLUSTER = from_("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "fd00::/8")
DEFAULTS = {
    "all-unauthenticated": Authorization(default_ref("all-unauthenticated"), EVERYWHERE, Anyone()),
    "all-authenticated": Authorization(default_ref("all-authenticated"), EVERYWHERE, Meshed(("*",))),
    "cluster-unauthenticated": Authorization(default_ref("cluster-unauthenticated"), CLUSTER, Anyone()),
    "cluster-authenticated": Authorization(default_ref("cluster-authenticated"), CLUSTER, Meshed(("*",))),
    "audit": Authorization(default_ref("audit"), EVERYWHERE, Anyone(), audit=True),
}


@pytest.mark.parametrize(
    ("name", "near_plain", "near_meshed", "far_plain", "far_meshed"),
    [
        ("all-unauthenticated", True, True, True, True),
        ("all-authenticated", False, True, False, True),
        ("cluster-unauthenticated", True, True, False, False),
        ("cluster-authenticated", False, True, False, False),
        ("audit", True, True, True, True),
        ("deny", False, False, False, False),
    ],
)
def test_default_policies_let_in_whom_they_say(name: str, near_plain: bool, near_meshed: bool, far_plain: bool, far_meshed: bool) -> None:
    grants = (DEFAULTS[name],) if name in DEFAULTS else ()
    of = PortAuthorizer(policy(*grants, server=default_ref(name)), "cluster.local")
    for ip, identity, expected in [
        ("10.1.1.1", None, near_plain),
        ("fd00::1", None, near_plain),
        ("172.31.255.255", CART, near_meshed),
        ("8.8.8.8", None, far_plain),
        ("2001:db8::1", CART, far_meshed),
    ]:
        permitted = of.for_client(client(identity, ip)).connection()
        assert isinstance(permitted, Permit) == expected, (ip, identity)
        assert permitted.audit == (name == "audit")
        assert ask(of, "/any//path/../at%2fall", identity=identity, ip=ip) is permitted


@pytest.mark.parametrize(
    ("patterns", "identity", "expected"),
    [
        (("*",), CART, True),
        (("*",), FOREIGN, False),  # every identity of the trust domain
        (("*",), None, False),
        ((CART,), CART, True),
        ((CART,), EVE, False),
        ((CART,), None, False),
        ((CART,), CART + "2", False),
        ((EVE, CART), CART, True),
        (("spiffe://cluster.local/ns/shop/*",), CART, True),
        (("spiffe://cluster.local/ns/shop/*",), "spiffe://cluster.local/ns/shop2/sa/cart", False),
        (("spiffe://cluster.local/ns/sh*",), CART, False),  # a star stands after a slash or alone
        (("spiffe://*/ns/shop/sa/cart",), CART, False),
        (("spiffe://cluster.local/ns/shop/sa/*",), "spiffe://cluster.local/ns/shop/sa/other", True),
        ((CART.upper(),), CART, False),
    ],
)
def test_identities_match_exactly_or_below_a_slash(patterns: tuple[str, ...], identity: str | None, expected: bool) -> None:
    assert (answer(port(grant("p", *patterns)), identity=identity) == "Permit -/p") == expected


def test_meshed_without_identities_lets_in_nobody() -> None:
    none = Authorization(SERVER, EVERYWHERE, Meshed(()))
    assert answer(port(none), identity=CART) == "Denied"


@pytest.mark.parametrize(
    ("networks", "ip", "expected"),
    [
        (from_("10.0.0.0/8"), "10.255.255.255", True),
        (from_("10.0.0.0/8"), "11.0.0.0", False),
        (from_("10.0.0.0/8", excluded=("10.1.0.0/16",)), "10.1.2.3", False),
        (from_("10.0.0.0/8", excluded=("10.1.0.0/16",)), "10.2.0.0", True),
        (from_("10.0.0.0/8", excluded=("10.0.0.0/9", "10.1.0.0/16", "10.128.0.0/9")), "10.1.2.3", False),
        ((Network("10.0.0.0/8", ("10.1.0.0/16",)), Network("10.1.2.0/24")), "10.1.2.3", True),  # networks are alternatives
        (from_("10.1.2.2", "10.1.2.4"), "10.1.2.3", False),
        (from_("10.1.2.3"), "10.1.2.3", True),  # a bare address
        (from_("10.1.2.9/24"), "10.1.2.3", True),  # host bits are ignored
        (from_("0.0.0.0/0"), "fd00::1", False),
        (from_("::/0"), "10.0.0.1", False),
        (from_("10.0.0.0/8"), "::ffff:10.0.0.1", True),
        (from_("fd00::/8"), "fd12::1", True),
        (from_("fd00::/8"), "fe80::1%eth0", False),
        ((), "10.0.0.1", False),
        (from_("nonsense"), "10.0.0.1", False),
        (from_("0.0.0.0/0", excluded=("nonsense",)), "10.0.0.1", False),  # an exception we cannot read could be anybody
        (from_("0.0.0.0/0"), "nonsense", False),
    ],
)
def test_networks_minus_their_exceptions(networks: tuple[Network, ...], ip: str, expected: bool) -> None:
    assert (answer(port(grant("p", networks=networks)), ip=ip) == "Permit -/p") == expected


bits4 = st.integers(0, 2**32 - 1)
cidrs = st.tuples(bits4, st.integers(0, 32)).map(lambda pair: str(ipaddress.ip_network(pair, strict=False)))
networks = st.lists(st.builds(Network, cidrs, st.lists(cidrs, max_size=3).map(tuple)), max_size=3).map(tuple)


@given(networks, bits4, st.sampled_from([-1, 0, 1]))
def test_ranges_hold_what_networks_hold(some: tuple[Network, ...], random: int, offset: int) -> None:
    edges = [int(ipaddress.ip_network(text)[at]) for one in some for text in (one.cidr, *one.excluded) for at in (0, -1)]
    for number in [random, *(min(max(edge + offset, 0), 2**32 - 1) for edge in edges)]:
        ip = ipaddress.ip_address(number)
        expected = any(
            ip in ipaddress.ip_network(one.cidr) and not any(ip in ipaddress.ip_network(out) for out in one.excluded) for one in some
        )
        assert Networks(some).holds(4, number) == expected


def test_network_and_authentication_must_both_hold_and_authorizations_are_alternatives() -> None:
    of = port(grant("both", CART, networks=from_("10.0.0.0/8")), grant("other", EVE, networks=from_("11.0.0.0/8")))
    assert answer(of, identity=CART, ip="10.1.1.1") == "Permit -/both"
    assert answer(of, identity=CART, ip="11.1.1.1") == "Denied"
    assert answer(of, identity=EVE, ip="11.1.1.1") == "Permit -/other"
    assert answer(of, identity=EVE, ip="10.1.1.1") == "Denied"


def test_whoever_is_let_in_anyway_is_not_audited() -> None:
    of = port(grant("audited", audit=True), grant("real", CART))
    assert ask(of, identity=CART).audit is False
    assert ask(of, identity=EVE).audit is True
    assert answer(of, identity=EVE) == "Permit -/audited"


# --- localhost (step 6) -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ip", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::ffff:127.0.0.1", True), ("128.0.0.1", False), ("::2", False)],
)
def test_loopback_clients_are_authorized_on_server_and_routes(ip: str, expected: bool) -> None:
    want = "Permit {}/localhost" if expected else "Denied"
    assert answer(port(), ip=ip) == want.format("-")
    of = port(routes=(route("r", prefix("/a"), grants=(grant("p", CART),)),))
    assert answer(of, "/a", ip=ip) == want.format("r")
    assert answer(of, "/b", ip=ip) == "NoRoute"


# --- routes (steps 4, 5, 8; section 3.4) ------------------------------------------------------------------------------------------------


def test_with_routes_the_matched_routes_authorizations_decide_and_nothing_else() -> None:
    routes = (
        route("open", prefix("/public"), grants=(grant("anyone"), grant("server", CART))),
        route("narrow", prefix("/admin"), grants=(grant("eve", EVE),)),  # inherit: false, applied by the controller
        route("closed", exact("/closed")),
    )
    of = port(grant("server", CART), routes=routes)
    assert answer(of, "/public/x") == "Permit open/anyone"
    assert answer(of, "/admin", identity=EVE) == "Permit narrow/eve"
    assert answer(of, "/admin", identity=CART) == "Denied"
    assert answer(of, "/closed", identity=CART) == "Denied"
    assert answer(of, "/else", identity=CART) == "NoRoute"


def test_every_kind_of_condition_reaches_the_routes() -> None:
    by_header = HttpMatch(headers=(ValueMatch("Exact", "x-tier", "gold"),))
    by_query = HttpMatch(PathMatch("PathPrefix", "/q"), query=(ValueMatch("Exact", "v w", "1"),))
    routes = (
        route("host", prefix("/"), grants=(grant("p"),), hosts=("api.shop",)),
        route("header", by_header, grants=(grant("p"),)),
        route("query", by_query, grants=(grant("p"),)),
        route("method", prefix("/m", "PUT"), grants=(grant("p"),)),
        route("regex", HttpMatch(PathMatch("RegularExpression", "/v[0-9]+")), grants=(grant("p"),)),
    )
    of = port(routes=routes)
    assert of.header_names == (b"x-tier",)
    assert answer(of, "/", host="API.shop:8080") == "Permit host/p"
    assert answer(of, "/", headers=(b" gold\t",)) == "Permit header/p"
    assert answer(of, "/", headers=(b"silver",)) == "NoRoute"
    assert answer(of, "/q?%76+w=1&x=1&x=2") == "Permit query/p"
    assert answer(of, "/q?v+w=2&v+w=1") == "BadTarget"  # which of the two the app takes is not known
    assert answer(of, "/m", method="PUT") == "Permit method/p"
    assert answer(of, "/m", method="GET") == "NoRoute"
    assert answer(of, "/v12?a=%zz", headers=(None,)) == "BadTarget"  # some rule looks at the query
    assert answer(of, "/v12") == "Permit regex/p"


ROLES = (
    route("admin", HttpMatch(headers=(ValueMatch("Exact", "x-role", "admin"),)), grants=(grant("eve", EVE),)),
    route("user", HttpMatch(headers=(ValueMatch("Exact", "x-role", "user"),)), grants=(grant("anyone"),)),
    route("all", prefix("/"), grants=(grant("anyone"),)),
)


def test_other_spellings_are_looked_for_on_ports_whose_rules_look_at_headers() -> None:
    of = port(routes=ROLES)
    assert of.header_names == (b"x-role",) and of.spellings is not None and of.spellings.other(b"x_role")
    assert isinstance(of.for_client(client(EVE)).respelled, BadTarget)
    assert port(routes=ROLES, check_paths=False).spellings is None
    assert port(routes=(route("all", prefix("/"), grants=(grant("anyone"),)),)).spellings is None


def test_a_method_that_frameworks_write_in_capitals_does_not_lead_around_the_rule_about_it() -> None:
    rules = (
        route("all", prefix("/"), grants=(grant("anyone"),)),
        route("delete", prefix("/", "DELETE"), grants=(grant("eve", EVE),)),
    )
    of = port(routes=rules)
    for method in ("delete", "Delete", "deletE"):
        assert answer(of, method=method) == "BadTarget" == answer(of, method=method, identity=EVE)
    assert answer(of, method="get") == answer(of, method="PURGE") == "Permit all/anyone"
    assert answer(of, method="DELETE") == "Denied"
    assert answer(port(routes=rules, check_paths=False), method="delete") == "Permit all/anyone"


@pytest.mark.parametrize("value", [b"user\nadmin", b"admin\nuser", b"admin\nadmin", b"\nadmin"])
def test_no_second_field_leads_around_the_rule_about_the_first(value: bytes) -> None:
    assert answer(port(routes=ROLES), headers=(value,)) == "BadTarget"


def test_a_port_that_opted_out_takes_several_fields_for_one_value() -> None:
    match = HttpMatch(headers=(ValueMatch("Exact", "x-role", "user, admin"),))
    of = port(routes=(route("both", match, grants=(grant("anyone"),)),), check_paths=False)
    assert answer(of, headers=(b"user \n admin",)) == "Permit both/anyone"


def test_grpc_routes_decide_by_service_and_method() -> None:
    routes = (
        route("cart", GrpcMatch(service="shop.Cart"), grants=(grant("cart", CART),)),
        route("add", GrpcMatch(service="shop.Cart", method="Add"), grants=(grant("eve", EVE),)),
    )
    of = port(routes=routes)
    assert answer(of, "/shop.Cart/Get", method="POST", identity=CART) == "Permit cart/cart"
    assert answer(of, "/shop.Cart/Add", method="POST", identity=CART) == "Denied"
    assert answer(of, "/shop.Cart/Add", method="POST", identity=EVE) == "Permit add/eve"
    assert answer(of, "/shop.Other/Add", method="POST", identity=EVE) == "NoRoute"
    assert answer(of, "/shop.Cart/Get", method="GET", identity=CART) == "NoRoute"


def test_opaque_bytes_do_not_pass_a_port_with_routes() -> None:
    of = port(grant("anyone"), routes=(route("r", prefix("/"), grants=(grant("anyone"),)),))
    for ip in ("10.0.0.1", "127.0.0.1"):
        denied = of.for_client(client(CART, ip)).connection()
        assert isinstance(denied, Denied) and "bypass" in denied.reason
    assert answer(of, "/") == "Permit r/anyone"


# --- paths ------------------------------------------------------------------------------------------------------------------------------

NARROW = (
    route("all", prefix("/"), grants=(grant("anyone"),)),
    route("admin", prefix("/admin"), grants=(grant("eve", EVE),)),
    route("purge", exact("/v1/cart:purge"), grants=(grant("eve", EVE),)),
)


@pytest.mark.parametrize(
    "target",
    [
        "/public/../admin",
        "/public/%2e%2e/admin",
        "/public/..;/admin",
        "/public%2f..%2fadmin",
        "/public\\..\\admin",
        "//admin",
        "/%00/admin",
        "/admin;x=1",  # a Java server serves /admin
        "/%61dmin%3bx/users",
        "/v1/cart%3Apurge",  # nearly every framework serves cart:purge
        "/v1/cart%3apurge?x",
        "/admin#/",
        "admin",
    ],
)
def test_no_spelling_of_a_guarded_path_is_taken_for_another(target: str) -> None:
    assert answer(port(routes=NARROW), target) == "BadTarget"
    assert answer(port(routes=NARROW[::-1]), target) == "BadTarget"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/%61dmin/x", "Denied"),
        ("/admin", "Denied"),
        ("/v1/cart:purge", "Denied"),
        ("/users/me%40example.com", "Permit all/anyone"),  # both readings lead to the same route
        ("/list;sort=up", "Permit all/anyone"),
        ("/Admin", "Permit all/anyone"),
        ("/?next=/../admin%zz", "Permit all/anyone"),  # no rule looks at the query
        ("*", "Permit all/anyone"),
    ],
)
def test_harmless_spellings_are_not_refused(target: str, expected: str) -> None:
    assert answer(port(routes=NARROW), target) == expected


def test_a_rule_that_spells_an_escape_guards_the_decoded_spelling_too() -> None:
    routes = (route("all", prefix("/"), grants=(grant("anyone"),)), route("home", exact("/me%40home"), grants=(grant("eve", EVE),)))
    assert answer(port(routes=routes), "/me@home") == "BadTarget"
    assert answer(port(routes=routes), "/me%40home") == "Denied"
    assert answer(port(routes=routes), "/you@home") == "Permit all/anyone"


def test_a_port_that_opted_out_takes_the_reading_of_rfc_3986() -> None:
    of = port(routes=NARROW, check_paths=False)
    assert answer(of, "/public/%2e%2e/admin") == "Denied"
    assert answer(of, "//admin") == "Permit all/anyone"
    assert answer(of, "/a%2fb\\") == "Permit all/anyone"
    assert answer(of, "example.com:443", method="CONNECT") == "Permit all/anyone"


def test_without_routes_nothing_looks_at_the_path_and_nothing_is_refused_for_it() -> None:
    assert answer(port(grant("anyone")), "/..//%zz\\") == "Permit -/anyone"


# --- reasons ----------------------------------------------------------------------------------------------------------------------------


def test_a_denial_says_who_came_and_what_each_policy_would_have_needed() -> None:
    of = port(grant("cart", CART), grant("near", EVE, networks=from_("192.168.0.0/16")), grant("mesh", "*", networks=()))
    assert ask(of, identity=EVE).reason == (
        f"no policy of server shop/web admits {EVE}: authorizationpolicy shop/cart admits {CART} only; "
        "authorizationpolicy shop/near admits it from 192.168.0.0/16 only; authorizationpolicy shop/mesh admits it from no network only"
    )
    assert ask(of).reason.startswith(
        "no policy of server shop/web admits a client without identity (plaintext): authorizationpolicy shop/cart"
    )
    assert "shop/mesh admits any mesh identity only" in ask(of).reason


def test_a_denial_on_a_route_names_the_route_and_its_policies() -> None:
    denied = ask(port(grant("server"), routes=NARROW), "/admin", identity=CART)
    assert denied.route == NARROW[1].ref and denied.server == SERVER and denied.authorization is None
    assert (
        denied.reason
        == f"no policy of httproute shop/admin on server shop/web admits {CART}: authorizationpolicy shop/eve admits {EVE} only"
    )


def test_a_denial_by_default_names_the_default_policy() -> None:
    of = PortAuthorizer(policy(server=default_ref("deny")), "cluster.local")
    assert ask(of, identity=CART).reason == f"no policy of default policy deny admits {CART}: there is none but for loopback"


def test_permits_and_refusals_carry_their_reason() -> None:
    of = port(routes=NARROW[1:])
    permit = ask(of, "/admin", identity=EVE)
    assert permit.reason == "authorizationpolicy shop/eve admits the client to httproute shop/admin on server shop/web"
    assert "server shop/web" in ask(of, "/none").reason
    assert "dot segment" in ask(of, "/..").reason


def test_clients_that_share_a_memo_are_called_by_their_own_names() -> None:
    of = port(routes=NARROW)
    other = "spiffe://cluster.local/ns/shop/sa/other"
    assert CART in ask(of, "/admin", identity=CART).reason
    assert other in ask(of, "/admin", identity=other).reason
    assert "plaintext" in ask(of, "/admin").reason
    assert of.for_client(client(CART))._memo is of.for_client(client(other))._memo
    assert ask(of, "/", identity=CART) is ask(of, "/", identity=other)


@given(st.lists(st.text(max_size=300), max_size=8), st.text(max_size=3000))
def test_reasons_are_bounded(identities: list[str], identity: str) -> None:
    grants = [grant(f"p{index}" * 20, f"no:{text}", networks=from_(*["10.0.0.0/8"] * 9)) for index, text in enumerate(identities)]
    denied = ask(port(*grants), identity="spiffe:" + identity)
    assert isinstance(denied, Denied) and 0 < len(denied.reason) <= 500


# --- what cannot be evaluated lets nobody in --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "routes",
    [
        (*NARROW, route("broken", HttpMatch(PathMatch("RegularExpression", "/(")), grants=(grant("anyone"),))),
        (*NARROW, route("mixed", GrpcMatch(), grants=(grant("anyone"),))),
    ],
)
def test_routes_that_cannot_be_evaluated_deny_everything(routes: tuple[Route, ...]) -> None:
    of = port(grant("anyone"), routes=routes)
    for ip in ("10.1.2.3", "127.0.0.1"):
        denied = ask(of, "/", ip=ip)
        assert isinstance(denied, Denied) and "cannot be evaluated" in denied.reason
        assert of.for_client(client(ip=ip)).connection() is denied


# --- memory -----------------------------------------------------------------------------------------------------------------------------


def test_a_remembered_answer_is_the_same_object() -> None:
    of = port(routes=NARROW)
    for target in ("/", "/admin", "/.."):
        assert ask(of, target) is ask(of, target)
    assert ask(port(routes=NARROW), "/") is not ask(of, "/")  # nothing is shared with another policy
    assert len({ask(of, "/"), ask(of, "/admin"), ask(of, "/..")}) == 3  # hashed by identity


def test_what_rules_do_not_look_at_is_no_part_of_the_memory() -> None:
    of = port(routes=NARROW)
    for index in range(50):
        ask(of, f"/a?{index}", method=f"M{index}", host=f"h{index}")
    assert len(of.for_client(client())._memo) == 1
    constant = port(grant("anyone"))
    ask(constant, "/a")
    assert not constant.for_client(client())._memo


def test_what_rules_look_at_is() -> None:
    rules = HttpMatch(headers=(ValueMatch("Exact", "x", "1"),), query=(ValueMatch("Exact", "q", "1"),), method="PUT")
    of = port(routes=(route("r", rules, prefix("/h"), grants=(grant("p"),), hosts=("a", "b")),))
    requests = [
        ("/?q=1", "PUT", "a", b"1"),
        ("/?q=2", "PUT", "a", b"1"),
        ("/?q=1", "GET", "a", b"1"),
        ("/?q=1", "PUT", "c", b"1"),
        ("/?q=1", "PUT", "a", b"2"),
    ]
    for _ in range(2):
        answers = [answer(of, target, method=method, host=host, headers=(value,)) for target, method, host, value in requests]
        assert answers == ["Permit r/p", "NoRoute", "NoRoute", "NoRoute", "NoRoute"]
    assert len(of.for_client(client())._memo) == len(requests)


def test_a_client_that_never_repeats_a_path_cannot_make_us_remember_much() -> None:
    of = port(routes=NARROW)
    memo = of.for_client(client())._memo
    most = 0
    for index in range(5000):
        ask(of, f"/{index}")
        most = max(most, len(memo))
    assert most == 4096
    for index in range(3000):
        ask(of, f"/{index}/" + "x" * 1000)
        most = sum(len(key[1]) for key in memo)  # type: ignore[misc, arg-type]
        assert most <= 1 << 20
    before = len(memo)
    assert answer(of, "/" + "y" * 2048) == "Permit all/anyone"  # decided each time
    assert len(memo) == before


def test_the_number_of_remembered_clients_is_bounded() -> None:
    of = port(routes=NARROW)
    kept = of.for_client(client(EVE))
    for index in range(2500):
        of.for_client(client(f"{CART}{index}", f"10.0.{index % 256}.{index // 256}"))
    assert max(len(of._clients), len(of._authorizers), len(of._decisions)) <= 1024
    assert isinstance(kept.request(b"GET", b"/admin", b"", ()), Permit)  # a connection keeps what it holds


def test_equal_clients_get_the_same_object() -> None:
    of = port(routes=NARROW)
    assert of.for_client(client(CART)) is of.for_client(client(CART))
    assert of.for_client(client(CART)) is of.for_client(client(CART, "10.9.9.9"))
    assert of.for_client(client()) is of.for_client(client(ip="10.9.9.9"))
    assert of.for_client(client(CART)) is not of.for_client(client(CART, "127.0.0.1"))
    assert (
        "no-client-certificate"
        in of.for_client(Client("10.1.2.3", None, "no-client-certificate")).request(b"GET", b"/admin", b"", ()).reason
    )


# --- any bytes --------------------------------------------------------------------------------------------------------------------------

REMEMBERING = port(
    routes=(*NARROW, route("q", HttpMatch(query=(ValueMatch("Exact", "q", "1"),)), grants=(grant("p"),), hosts=("*.shop",)))
).for_client(client())
pieces = st.lists(st.sampled_from([b"/", b"admin", b"%2e", b".", b";", b"%3A", b"?q=1", b"%", b"v1", b"\xff", b"#", b"a"]), max_size=8)


@settings(deadline=None)
@given(st.binary(max_size=8), st.binary(max_size=40) | pieces.map(b"".join), st.binary(max_size=20))
def test_any_request_gets_a_decision_and_the_memory_never_changes_it(method: bytes, target: bytes, authority: bytes) -> None:
    known = REMEMBERING.request(method, target, authority, ())
    fresh = PortAuthorizer(REMEMBERING._port.policy, "cluster.local").for_client(client()).request(method, target, authority, ())
    assert (type(known), known.route, known.authorization, known.reason) == (type(fresh), fresh.route, fresh.authorization, fresh.reason)
    assert REMEMBERING.request(method, target, authority, ()) is known


def test_the_sidecar_pays_for_regular_expressions_only_when_a_policy_has_one() -> None:
    script = "import sys, policy.authorize; sys.exit(any(name in sys.modules for name in ('re2', 'trio', 'asyncio', 'ssl', 'logging')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
