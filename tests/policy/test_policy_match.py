"""policy.match: the precedence of the Gateway API, by cases and against an implementation that sorts everything."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.refs import Ref
from policy.match import HEADER_NAMES_MAX, NAME_SETS_MAX, PATTERNS_MAX, Found, MixedKinds, RouteTable, host_untrusted
from policy.patterns import InvalidPattern, compile_pattern
from policy.wire import GrpcMatch, HttpMatch, PathMatch, Route, Rule, ValueMatch


def http(name: str, *rules: tuple[HttpMatch, ...], hosts: tuple[str, ...] = ()) -> Route:
    return Route(Ref("gateway.networking.k8s.io", "HTTPRoute", "shop", name), "http", hosts, tuple(Rule(rule) for rule in rules), ())


def grpc(name: str, *rules: tuple[GrpcMatch, ...], hosts: tuple[str, ...] = ()) -> Route:
    return Route(Ref("gateway.networking.k8s.io", "GRPCRoute", "shop", name), "grpc", hosts, tuple(Rule(rule) for rule in rules), ())


def exact(path: str, **more: object) -> HttpMatch:
    return HttpMatch(PathMatch("Exact", path), **more)  # type: ignore[arg-type]


def prefix(path: str, **more: object) -> HttpMatch:
    return HttpMatch(PathMatch("PathPrefix", path), **more)  # type: ignore[arg-type]


def regex(path: str, **more: object) -> HttpMatch:
    return HttpMatch(PathMatch("RegularExpression", path), **more)  # type: ignore[arg-type]


def header(name: str, value: str) -> ValueMatch:
    return ValueMatch("Exact", name, value)


def find(
    routes: list[Route],
    path: str = "/",
    *,
    method: str = "GET",
    host: str = "",
    headers: dict[bytes, bytes] | None = None,
    query: dict[str, str] | None = None,
) -> Found | None:
    table = RouteTable(routes)
    return table.find(host, method, path, query or {}, [(headers or {}).get(name) for name in table.header_names])


def winner(routes: list[Route], path: str = "/", **request: object) -> str | None:
    found = find(routes, path, **request)  # type: ignore[arg-type]
    return f"{found.route.ref.name}.{found.rule_index}" if found else None


# --- one rule at a time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "path", "matches"),
    [
        ("/foo", "/foo", True),
        ("/foo", "/foo/", True),
        ("/foo", "/foo/bar", True),
        ("/foo/", "/foo", True),  # the trailing slash of a prefix is ignored
        ("/foo/", "/foo/bar", True),
        ("/foo", "/foobar", False),  # by path element
        ("/foo", "/FOO", False),  # case-sensitive
        ("/foo", "/fo", False),
        ("/foo/bar", "/foo", False),
        ("/", "/anything/at/all", True),
        ("/", "/", True),
        ("/", "*", True),
        ("/foo", "*", False),
    ],
)
def test_a_prefix_matches_by_path_element(value: str, path: str, matches: bool) -> None:
    assert (find([http("r", (prefix(value),))], path) is not None) == matches


@pytest.mark.parametrize(
    ("value", "path", "matches"), [("/a", "/a", True), ("/a", "/a/", False), ("/a/", "/a", False), ("/a", "/A", False)]
)
def test_an_exact_path_is_exact_to_the_byte(value: str, path: str, matches: bool) -> None:
    assert (find([http("r", (exact(value),))], path) is not None) == matches


@pytest.mark.parametrize(("path", "matches"), [("/v1/x", True), ("/v12/x", True), ("/v1/x/y", False), ("/a/v1/x", False), ("/v/x", False)])
def test_a_regular_expression_covers_the_whole_path(path: str, matches: bool) -> None:
    assert (find([http("r", (regex("/v[0-9]+/[^/]*"),))], path) is not None) == matches


def test_a_target_without_a_path_belongs_to_the_catch_all_and_to_expressions_that_cover_it() -> None:
    assert winner([http("r", (prefix("/"),), (regex("/.*"),))], "*", method="OPTIONS") == "r.0"
    assert winner([http("r", (prefix("/"),), (regex("[*]"),))], "*", method="OPTIONS") == "r.1"


def test_a_rule_without_matches_takes_everything_and_a_route_without_rules_nothing() -> None:
    assert winner([http("r", ())], "/x", method="PURGE") == "r.0"
    assert winner([http("r")], "/") is None
    assert winner([grpc("r", ())], "/s/m", method="POST") == "r.0"


def test_matches_of_a_rule_are_alternatives_and_parts_of_a_match_conditions() -> None:
    routes = [http("r", (exact("/a"), prefix("/b", method="POST", headers=(header("x", "1"),))))]
    assert winner(routes, "/a") == "r.0"
    assert winner(routes, "/b", method="POST", headers={b"x": b"1"}) == "r.0"
    assert winner(routes, "/b", method="POST") is None
    assert winner(routes, "/b", method="GET", headers={b"x": b"1"}) is None
    assert winner(routes, "/b", method="POST", headers={b"x": b"2"}) is None


def test_methods_and_values_are_compared_case_sensitively() -> None:
    routes = [http("r", (prefix("/", method="GET", headers=(header("x", "One"),)),))]
    assert winner(routes, method="get", headers={b"x": b"One"}) is None
    assert winner(routes, method="GET", headers={b"x": b"one"}) is None


def test_of_repeated_names_in_a_match_only_the_first_counts() -> None:
    twice = prefix("/", headers=(header("x", "1"), header("x", "2")), query=(header("q", "1"), header("q", "2")))
    assert winner([http("r", (twice,))], headers={b"x": b"1"}, query={"q": "1"}) == "r.0"
    assert winner([http("r", (twice,))], headers={b"x": b"2"}, query={"q": "1"}) is None


def test_patterns_of_headers_and_query_cover_the_whole_value() -> None:
    match = prefix("/", headers=(ValueMatch("RegularExpression", "x", "a+"),), query=(ValueMatch("RegularExpression", "q", "[0-9]*"),))
    assert winner([http("r", (match,))], headers={b"x": b"aa"}, query={"q": ""}) == "r.0"
    assert winner([http("r", (match,))], headers={b"x": b"aab"}, query={"q": "1"}) is None
    assert winner([http("r", (match,))], headers={b"x": b"aa"}) is None
    assert winner([http("r", (match,))], query={"q": "1"}) is None
    assert winner([http("r", (match,))], headers={b"x": b"\xff"}, query={"q": "1"}) is None


# --- precedence, one criterion after the other (the better candidate always stands last, so that order alone would choose the other) ----


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (prefix("/a/b"), exact("/a/b")),
        (prefix("/a/b", method="GET", headers=(header("x", "1"),), query=(header("q", "1"),)), exact("/a/b")),
        (regex("/a/b"), exact("/a/b")),
        (prefix("/a/b"), regex("/a/.*")),  # or a catch-all would shadow a rule that narrows
        (prefix("/", method="GET", headers=(header("x", "1"),)), regex(".*")),
        (prefix("/"), prefix("/a")),
        (prefix("/a", method="GET"), prefix("/a/b")),
        (prefix("/a"), prefix("/a", method="GET")),
        (prefix("/a", headers=(header("x", "1"), header("y", "1"))), prefix("/a", method="GET")),
        (prefix("/a", headers=(header("x", "1"),)), prefix("/a", headers=(header("x", "1"), header("y", "1")))),
        (prefix("/a", query=(header("q", "1"), header("r", "1"))), prefix("/a", headers=(header("x", "1"),))),
        (prefix("/a", query=(header("q", "1"),)), prefix("/a", query=(header("q", "1"), header("r", "1")))),
        (regex("/a.*"), regex("/a.*", method="GET")),
        (regex("/a.*", headers=(header("x", "1"),)), regex("/.*", headers=(header("x", "1"), header("y", "1")))),
    ],
)
def test_the_more_specific_match_wins_over_an_older_route(worse: HttpMatch, better: HttpMatch) -> None:
    request = {"headers": {b"x": b"1", b"y": b"1"}, "query": {"q": "1", "r": "1"}}
    assert winner([http("old", (worse,)), http("new", (better,))], "/a/b", **request) == "new.0"
    assert winner([http("one", (worse,), (better,))], "/a/b", **request) == "one.1"
    assert winner([http("new", (better,)), http("old", (worse,))], "/a/b", **request) == "new.0"


def test_equal_matches_go_to_the_older_route_then_to_the_first_rule() -> None:
    same = prefix("/a", headers=(header("x", "1"),))
    assert winner([http("old", (prefix("/b"),), (same,)), http("new", (same,), (same,))], "/a", headers={b"x": b"1"}) == "old.1"
    other = prefix("/a", headers=(header("y", "1"),))
    assert winner([http("old", (other,)), http("new", (same,))], "/a", headers={b"x": b"1", b"y": b"1"}) == "old.0"
    assert winner([http("old", (same,)), http("new", (other,))], "/a", headers={b"x": b"1", b"y": b"1"}) == "old.0"


def test_each_match_of_a_rule_ranks_alone() -> None:
    routes = [http("a", (prefix("/"), exact("/y"))), http("b", (prefix("/x"), prefix("/y")))]
    assert winner(routes, "/x") == "b.0"
    assert winner(routes, "/y") == "a.0"


def test_a_better_ranked_match_whose_conditions_fail_shadows_nothing() -> None:
    routes = [http("r", (exact("/a/b", method="POST"),), (prefix("/a/b", headers=(header("x", "1"),)),), (prefix("/a"),))]
    assert winner(routes, "/a/b", method="GET") == "r.2"
    assert winner(routes, "/a/b", method="GET", headers={b"x": b"1"}) == "r.1"


def test_a_pattern_that_does_not_cover_the_value_leaves_the_request_to_the_next_of_the_same_rank() -> None:
    first, second = (prefix("/", headers=(ValueMatch("RegularExpression", "x", pattern),)) for pattern in ("a+", "b+"))
    assert winner([http("r", (first,), (second,), (second,))], headers={b"x": b"b"}) == "r.1"


# --- hostnames --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("a.example.com", "exact.0"),
        ("b.example.com", "near.0"),
        ("x.y.example.com", "near.0"),
        ("example.com", "far.0"),
        ("example.org", "any.0"),
        ("", "any.0"),
        ("x" * 250 + ".example.com", "any.0"),
    ],
)
def test_the_hostname_ranks_before_everything_else(host: str, expected: str) -> None:
    routes = [
        http("any", (exact("/a", method="GET"),)),
        http("far", (exact("/a", method="GET"),), hosts=("*.com",)),
        http("near", (prefix("/a"),), hosts=("*.example.com",)),
        http("exact", (prefix("/"),), hosts=("a.example.com", "unused.example.com")),
    ]
    assert winner(routes, "/a", host=host) == expected


def test_a_wildcard_needs_at_least_one_label_more() -> None:
    routes = [http("r", (prefix("/"),), hosts=("*.example.com",))]
    assert winner(routes, host="example.com") is None
    assert winner(routes, host="notexample.com") is None
    assert winner(routes, host=".example.com") is None


def test_a_route_of_a_better_hostname_that_does_not_match_leaves_the_request_to_the_others() -> None:
    routes = [http("any", (prefix("/"),)), http("host", (prefix("/a"),), hosts=("example.com",))]
    assert winner(routes, "/b", host="example.com") == "any.0"


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        (b"Example.COM", "example.com"),
        (b"example.com:8080", "example.com"),
        (b"example.com.", "example.com"),
        (b"example.com.:80", "example.com"),
        (b"10.0.0.1:80", "10.0.0.1"),
        (b"[FD00::1]:80", "[fd00::1]"),
        (b"[broken", ""),
        (b"", ""),
    ],
)
def test_the_host_of_an_authority_is_without_port_case_and_final_dot(authority: bytes, host: str) -> None:
    assert host_untrusted(authority) == host


@given(st.binary(max_size=60))
def test_any_authority_has_a_host_that_can_be_looked_up(authority: bytes) -> None:
    routes = [http("r", (prefix("/"),), hosts=("*.example.com", "example.org"))]
    host = host_untrusted(authority)
    assert host == host.lower()
    found = find(routes, host=host)
    assert (found is not None) == (host == "example.org" or (host.endswith(".example.com") and host != ".example.com"))


# --- gRPC -------------------------------------------------------------------------------------------------------------------------------


def call(service: str | None = None, method: str | None = None, *headers: ValueMatch) -> GrpcMatch:
    return GrpcMatch("Exact", service, method, headers)


def call_like(service: str | None = None, method: str | None = None, *headers: ValueMatch) -> GrpcMatch:
    return GrpcMatch("RegularExpression", service, method, headers)


@pytest.mark.parametrize(
    ("match", "path", "matches"),
    [
        (call("shop.Cart", "Add"), "/shop.Cart/Add", True),
        (call("shop.Cart", "Add"), "/shop.Cart/Remove", False),
        (call("shop.Cart"), "/shop.Cart/Remove", True),
        (call("shop.Cart"), "/shop.cart/Remove", False),
        (call(None, "Add"), "/shop.Other/Add", True),
        (call(None, "Add"), "/shop.Other/Remove", False),
        (call(), "/shop.Cart/Add", True),
        (call("shop.Cart"), "/shop.Cart", False),
        (call("shop.Cart"), "/shop.Cart/", False),
        (call("shop.Cart"), "/shop.Cart/Add/x", False),
        (call("shop.Cart"), "/x/shop.Cart/Add", False),
        (call_like("shop[.].*"), "/shop.Cart/Add", True),
        (call_like("shop[.]"), "/shop.Cart/Add", False),  # the whole name
        (call_like(None, "A.*"), "/shop.Cart/Add", True),
        (call_like("shop[.].*", "A"), "/shop.Cart/Add", False),
    ],
)
def test_a_grpc_match_looks_at_service_and_method(match: GrpcMatch, path: str, matches: bool) -> None:
    assert (find([grpc("r", (match,))], path, method="POST") is not None) == matches


def test_what_is_not_posted_is_no_grpc_call() -> None:
    assert winner([grpc("r", (call(),))], "/shop.Cart/Add", method="GET") is None


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (call(None, "Add"), call("shop.Cart")),
        (call("shop.Cart", None, header("x", "1")), call("shop.Cart", "Add")),
        (call(None, None, header("x", "1")), call(None, "Add")),
        (call("shop.Cart"), call("shop.Cart", None, header("x", "1"))),
        (call_like("shop.*", "Add", header("x", "1")), call("shop.Cart", "Add")),
        (call("shop.Cart"), call_like("shop.*", "Add")),
        (call_like("shop.*"), call("shop.Cart")),
        (call_like("shop.*"), call_like(".*", None, header("x", "1"))),
        (call(), call_like(".*")),
    ],
)
def test_the_more_specific_grpc_match_wins_over_an_older_route(worse: GrpcMatch, better: GrpcMatch) -> None:
    for routes in ([grpc("old", (worse,)), grpc("new", (better,))], [grpc("new", (better,)), grpc("old", (worse,))]):
        assert winner(routes, "/shop.Cart/Add", method="POST", headers={b"x": b"1"}) == "new.0"
    assert winner([grpc("a", (worse,)), grpc("b", (worse,))], "/shop.Cart/Add", method="POST", headers={b"x": b"1"}) == "a.0"


def test_http_and_grpc_routes_do_not_share_a_port() -> None:
    with pytest.raises(MixedKinds):
        RouteTable([http("h", (prefix("/"),)), grpc("g", (call(),))])


# --- against an implementation that sorts everything ------------------------------------------------------------------------------------

Key = tuple[object, ...]


def host_rank(hostname: str | None, host: str) -> tuple[int, int] | None:
    """Smaller is better; None does not match."""
    if hostname is None:
        return (2, 0)
    if hostname.startswith("*."):
        return (1, -len(hostname)) if host.endswith(hostname[1:]) and len(host) > len(hostname) - 1 else None
    return (0, -len(hostname)) if host == hostname else None


def values_hold(matches: tuple[ValueMatch, ...], get: Callable[[str], str | None]) -> bool:
    for one in matches:
        value = get(one.name)
        if value is None or not (value == one.value if one.type == "Exact" else re.fullmatch(one.value, value)):
            return False
    return True


def http_rank(match: HttpMatch, method: str, path: str, headers: dict[str, str], query: dict[str, str]) -> Key | None:
    wanted = match.path.value
    if match.path.type == "Exact":
        path_rank = (0, 0) if path == wanted else None
    elif match.path.type == "PathPrefix":
        elements, found = wanted.strip("/").split("/"), path.strip("/").split("/")
        path_rank = (2, -len(wanted.rstrip("/"))) if wanted == "/" or found[: len(elements)] == elements else None
    else:
        path_rank = (1, 0) if re.fullmatch(wanted, path) else None
    if path_rank is None or match.method not in (None, method):
        return None
    if not values_hold(match.headers, headers.get) or not values_hold(match.query, query.get):
        return None
    return (path_rank, match.method is None, -len(match.headers), -len(match.query))


def grpc_rank(match: GrpcMatch, method: str, path: str, headers: dict[str, str], query: dict[str, str]) -> Key | None:
    parts = path.split("/")
    call_ok = len(parts) == 3 and all(parts[1:])
    sizes = []
    for wanted, name in ((match.service, parts[1] if call_ok else ""), (match.method, parts[2] if call_ok else "")):
        if wanted is not None and (not call_ok or not (wanted == name if match.type == "Exact" else re.fullmatch(wanted, name))):
            return None
        sizes.append(-len(name) if wanted is not None else 0)
    if method != "POST" or not values_hold(match.headers, headers.get):
        return None
    return (*sizes, match.type != "Exact", -len(match.headers))


def by_sorting(
    routes: list[Route], host: str, method: str, path: str, headers: dict[str, str], query: dict[str, str]
) -> tuple[int, int] | None:
    candidates = []
    for route_index, route in enumerate(routes):
        for rule_index, rule in enumerate(route.rules):
            for match_index, match in enumerate(rule.matches):
                if isinstance(match, HttpMatch):
                    conditions = http_rank(match, method, path, headers, query)
                else:
                    conditions = grpc_rank(match, method, path, headers, query)
                for hostname in route.hostnames or (None,):
                    hosted = host_rank(hostname, host)
                    if conditions is not None and hosted is not None:
                        candidates.append((hosted, conditions, route_index, rule_index, match_index))
    return min(candidates)[2:4] if candidates else None


paths = st.lists(st.sampled_from(["a", "b", "ab"]), max_size=3).map(lambda parts: "/" + "/".join(parts))
request_paths = st.tuples(paths, st.booleans()).map(lambda pair: pair[0] + "/" if pair[1] and pair[0] != "/" else pair[0])
methods = st.sampled_from(["GET", "POST"])
hosts = st.sampled_from(["", "a.com", "b.a.com", "c.b.a.com", "b.org"])
hostnames = st.lists(st.sampled_from(["a.com", "b.a.com", "*.a.com", "*.b.a.com", "*.com"]), max_size=2, unique=True).map(tuple)
some_values = st.one_of(
    st.builds(ValueMatch, st.just("Exact"), st.sampled_from(["x", "y", "z"]), st.sampled_from(["1", "2"])),
    st.builds(ValueMatch, st.just("RegularExpression"), st.sampled_from(["x", "y", "z"]), st.sampled_from(["[12]", "1?", "2"])),
)
value_matches = st.lists(some_values, max_size=3, unique_by=lambda one: one.name).map(tuple)
path_matches = st.one_of(
    st.builds(PathMatch, st.just("Exact"), request_paths),
    st.builds(PathMatch, st.just("PathPrefix"), request_paths),
    st.builds(PathMatch, st.just("RegularExpression"), st.sampled_from(["/a.*", "/[ab]", ".*", "/a/b/?"])),
)
http_matches = st.builds(HttpMatch, path_matches, value_matches, value_matches, st.one_of(st.none(), methods))
names = st.one_of(st.none(), st.sampled_from(["a", "b", "ab"]))
grpc_matches = st.builds(GrpcMatch, st.sampled_from(["Exact", "RegularExpression"]), names, names, value_matches)


def route_lists(matches: st.SearchStrategy[object], kind: str) -> st.SearchStrategy[list[Route]]:
    rules = st.lists(st.builds(Rule, st.lists(matches, min_size=1, max_size=3).map(tuple)), max_size=3).map(tuple)
    return st.lists(st.builds(Route, st.just(Ref("", "", "", "r")), st.just(kind), hostnames, rules, st.just(())), max_size=4)


present = st.dictionaries(st.sampled_from(["x", "y", "z"]), st.sampled_from(["1", "2"]))


@settings(max_examples=80, deadline=None)
@given(route_lists(http_matches, "http") | route_lists(grpc_matches, "grpc"), hosts, methods, request_paths, present, present)
def test_the_table_finds_what_sorting_all_candidates_finds(
    routes: list[Route], host: str, method: str, path: str, headers: dict[str, str], query: dict[str, str]
) -> None:
    raw = {name.encode(): value.encode() for name, value in headers.items()}
    found = find(routes, path, host=host, method=method, headers=raw, query=query)
    expected = by_sorting(routes, host, method, path, headers, query)
    assert (found and found[1:]) == expected


# --- cost -------------------------------------------------------------------------------------------------------------------------------


def calls_of_a_lookup(table: RouteTable, *request: object) -> int:
    """Function calls, built-in ones included: the work of a lookup without a clock."""
    count = 0

    def observe(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # a collection may call back into anything that watches collections
    sys.setprofile(observe)
    try:
        table.find(*request)  # type: ignore[arg-type]
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def many(number: int) -> list[Route]:
    return [
        http(
            f"r{index}",
            (exact(f"/e{index:04}/x", method="GET"), prefix(f"/p{index:04}"), prefix("/t", headers=(header("tenant", str(index)),))),
            (prefix("/m", method=f"M{index}"), prefix("/q", query=(header("id", str(index)),))),
            hosts=(f"h{index}.com",) if index % 2 else (),
        )
        for index in range(number)
    ]


@pytest.mark.parametrize(
    "request_",
    [
        ("", "GET", "/e0000/x", {}, (None,)),
        ("", "GET", "/p0000/a/b/c", {}, (None,)),
        ("", "GET", "/t", {}, (b"0",)),
        ("", "M0", "/m", {}, (None,)),
        ("", "GET", "/q", {"id": "0"}, (None,)),
        ("", "GET", "/none", {}, (b"none",)),
        ("h1.com", "GET", "/e0001/x", {}, (None,)),
    ],
)
def test_a_lookup_does_the_same_work_whatever_the_number_of_routes(request_: tuple[object, ...]) -> None:
    assert {calls_of_a_lookup(RouteTable(many(number)), *request_) for number in (4, 10, 100, 1000)} == {
        calls_of_a_lookup(RouteTable(many(4)), *request_)
    }


def test_a_deep_path_costs_what_the_deepest_rule_costs() -> None:
    table = RouteTable([http("r", (prefix("/a/b"),))])
    shallow = calls_of_a_lookup(table, "", "GET", "/x/x/x", {}, ())
    assert calls_of_a_lookup(table, "", "GET", "/x" * 30_000, {}, ()) <= shallow + 2


# --- patterns ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["(", r"(a)\1", "(?=a)", "x{1001}", "((x{100}){100}){100}", "x" * 4097, "\ud800", "[[:nope:]]"])
def test_a_pattern_that_cannot_be_bounded_is_refused(text: str) -> None:
    with pytest.raises(InvalidPattern, match="regular expression"):
        compile_pattern(text)


def test_a_hostile_value_takes_time_linear_in_its_length() -> None:
    assert not compile_pattern("(a+)+b")(b"a" * 100_000)  # Python's re would not return in this universe
    assert not compile_pattern("(a|b)*a(a|b){12}c")(b"ab" * 50_000)


def test_a_pattern_reads_utf_8() -> None:
    accented = "\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert compile_pattern("caf.")(f"caf{accented}".encode())
    assert not compile_pattern("caf.")(b"caf\xff")


_SAME = (ValueMatch("RegularExpression", "x", "same.*"),)


@pytest.mark.parametrize(
    "made",
    [
        lambda text: HttpMatch(PathMatch("RegularExpression", text), headers=_SAME),
        lambda text: HttpMatch(headers=(ValueMatch("RegularExpression", "x", text),), query=_SAME),
        lambda text: HttpMatch(headers=_SAME, query=(ValueMatch("RegularExpression", "x", text),)),
        lambda text: GrpcMatch("RegularExpression", method=text, headers=_SAME),
        lambda text: GrpcMatch("RegularExpression", service=text, headers=_SAME),
    ],
    ids=["path", "header", "parameter", "method", "service"],
)
def test_a_table_takes_a_thousand_different_patterns_and_no_more(made: Callable[[str], HttpMatch | GrpcMatch]) -> None:
    def table(count: int) -> RouteTable:
        matches = tuple(made(f"/{at}.*") for at in range(count))
        kind = "grpc" if isinstance(matches[0], GrpcMatch) else "http"
        return RouteTable([Route(Ref("", kind, "shop", str(number)), kind, (), (Rule(matches),), ()) for number in range(2)])  # type: ignore[arg-type]

    table(PATTERNS_MAX - 1)  # and `_SAME`
    with pytest.raises(InvalidPattern, match="more than 1000 regular expressions"):
        table(PATTERNS_MAX)


def test_a_table_takes_a_hundred_different_header_names_and_no_more() -> None:
    def table(count: int) -> RouteTable:
        names = [f"x-{at}" for at in range(count)]
        matches = [HttpMatch(headers=tuple(ValueMatch("Exact", name, "1") for name in names[at : at + 10])) for at in range(0, count, 10)]
        return RouteTable([http("r", (*matches, *matches))])

    assert len(table(HEADER_NAMES_MAX).header_names) == HEADER_NAMES_MAX
    with pytest.raises(InvalidPattern, match="more than 100 header names"):
        table(HEADER_NAMES_MAX + 10)


def test_a_table_takes_a_thousand_different_sets_of_names_and_no_more() -> None:
    def table(count: int) -> RouteTable:
        return RouteTable([http("r", tuple(HttpMatch(query=(ValueMatch("Exact", f"q{at}", "1"),)) for at in range(count)))])

    table(NAME_SETS_MAX)
    with pytest.raises(InvalidPattern, match="more than 1000 sets of names"):
        table(NAME_SETS_MAX + 1)


def test_a_broken_pattern_breaks_the_table_instead_of_never_matching() -> None:
    for match in (regex("("), prefix("/", headers=(ValueMatch("RegularExpression", "x", "("),))):
        with pytest.raises(InvalidPattern):
            RouteTable([http("r", (match,))])
