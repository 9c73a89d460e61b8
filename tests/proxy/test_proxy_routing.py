"""proxy.routing: which backend a request goes to, and what is changed in its head."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest

from core.refs import Ref
from policy import wire
from policy.wire import (
    Action,
    Backend,
    Destination,
    Endpoint,
    FieldEdit,
    GrpcMatch,
    HttpMatch,
    PathMatch,
    Rule,
    ServiceRoute,
    Share,
    ValueMatch,
)
from proxy.protocol.requests import HeadEdit
from proxy.rescue import Cause, Redirect
from proxy.routing import UNTOUCHED, Routing, RuleLimits, Way, location, retargeted

WEB = Ref("", "Service", "shop", "web")


class Head:
    """A request as an engine shows it."""

    grpc = False
    bodiless = True

    def __init__(self, target: str = "/", method: str = "GET", host: str = "web", **headers: str) -> None:
        self.target, self.method, self.authority = target.encode(), method.encode(), host.encode()
        self._headers = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}

    def values(self, names: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        return tuple(self._headers.get(name) for name in names)


def prefix(value: str) -> Rule:
    return Rule((HttpMatch(PathMatch("PathPrefix", value)),))


def backend(name: str, *addrs: str, problem: str = "") -> Backend:
    return Backend(Ref("", "Service", "shop", name), tuple(Endpoint(addr) for addr in addrs), problem)


def destination(rules: list[tuple[Rule, Action]], *backends: Backend, kind: str = "http") -> Destination:
    ref = Ref("gateway.networking.k8s.io", "HTTPRoute", "shop", "web")
    route = ServiceRoute(ref, kind, (), tuple(rule for rule, _ in rules), tuple(action for _, action in rules))  # type: ignore[arg-type]
    return Destination("service", WEB, "detect", (), (route,), backends)


def routing(found: Destination, random: Callable[[], float] = lambda: 0.0, before: Routing | None = None) -> Routing:
    return Routing(found, 80, before, random, 0.0)


def addr(way: Way | Redirect | Cause) -> str:
    assert isinstance(way, Way)
    load = way.balancer.choose(0.0)
    assert load is not None
    return load.endpoint.addr


TWO = destination(
    [(prefix("/v1"), Action((Share(0),))), (prefix("/v2"), Action((Share(1),)))], backend("v1", "10.0.0.1:80"), backend("v2", "10.0.0.2:80")
)


def test_the_rule_that_matches_says_where_and_nothing_is_changed() -> None:
    way = routing(TWO).choose(Head("/v2/x?y=1"))
    assert addr(way) == "10.0.0.2:80"
    assert isinstance(way, Way) and way.edit is UNTOUCHED


@pytest.mark.parametrize("target", ["/", "/v3", "/v1x", "*"])
def test_what_no_rule_wants_has_no_route(target: str) -> None:
    assert routing(TWO).choose(Head(target)) is Cause.NO_ROUTE


@pytest.mark.parametrize("target", ["/v1/../v2", "//v1", "/v1%2fa", "/v1/%zz", "\\v1", "/v1#x"])
def test_a_target_with_two_readings_is_nobodys_failure(target: str) -> None:
    routing(TWO).choose(Head(target))


def test_headers_method_and_query_decide_too() -> None:
    match = HttpMatch(headers=(ValueMatch("Exact", "release", "blue"),), query=(ValueMatch("Exact", "q", "1"),), method="POST")
    found = routing(destination([(Rule((match,)), Action((Share(0),)))], backend("v1", "10.0.0.1:80")))
    assert addr(found.choose(Head("/?q=1", "POST", release=" blue"))) == "10.0.0.1:80"
    for head in (Head("/?q=2", "POST", release="blue"), Head("/?q=1", "GET", release="blue"), Head("/?q=1", "POST", release="green")):
        assert found.choose(head) is Cause.NO_ROUTE


def test_grpc_methods_decide() -> None:
    found = routing(destination([(Rule((GrpcMatch(service="a.B"),)), Action((Share(0),)))], backend("v1", "10.0.0.1:80"), kind="grpc"))
    assert addr(found.choose(Head("/a.B/C", "POST"))) == "10.0.0.1:80"
    assert found.choose(Head("/a.X/C", "POST")) is Cause.NO_ROUTE


def test_weights_are_shares() -> None:
    rules = [(prefix("/"), Action((Share(0, 70), Share(1, 30))))]
    draws = cycle(number / 100 for number in range(100))
    found = routing(destination(rules, backend("v1", "10.0.0.1:80"), backend("v2", "10.0.0.2:80")), lambda: next(draws))
    counted: dict[str, int] = {}
    for _ in range(100):
        way = found.choose(Head())
        assert isinstance(way, Way)
        (load,) = way.balancer._loads
        counted[load.endpoint.addr] = counted.get(load.endpoint.addr, 0) + 1
    assert counted == {"10.0.0.1:80": 70, "10.0.0.2:80": 30}


def test_a_backend_that_does_not_exist_takes_its_share_as_an_error() -> None:
    rules = [(prefix("/"), Action((Share(0, 1), Share(1, 1))))]
    draws = cycle((0.0, 0.99))
    found = routing(destination(rules, backend("v1", "10.0.0.1:80"), backend("v2", problem="no such Service")), lambda: next(draws))
    first, second = found.choose(Head()), found.choose(Head())
    assert isinstance(first, Way) and second is Cause.NO_BACKEND


def test_a_rule_without_backends_is_an_error_and_a_backend_without_endpoints_is_none() -> None:
    rules = [(prefix("/none"), Action()), (prefix("/empty"), Action((Share(0),)))]
    found = routing(destination(rules, backend("v1")))
    assert found.choose(Head("/none")) is Cause.NO_BACKEND
    way = found.choose(Head("/empty"))
    assert isinstance(way, Way) and way.balancer.choose(0.0) is None


def test_the_changes_of_the_rule_come_before_those_of_the_backend() -> None:
    rule = FieldEdit(("x-set", "x-gone"), (("x-set", "rule"), ("x-add", "1")))
    share = FieldEdit(("x-set",), (("x-set", "backend"), ("x-add", "2")))
    way = routing(destination([(prefix("/"), Action((Share(0, 1, share),), rule))], backend("v1", "10.0.0.1:80"))).choose(Head())
    assert isinstance(way, Way)
    assert set(way.edit.strip) == {b"x-set", b"x-gone"}
    assert way.edit.add == ((b"x-add", b"1"), (b"x-set", b"backend"), (b"x-add", b"2"))
    assert way.edit != HeadEdit()


def test_the_answers_changes_of_the_backend_come_before_those_of_the_rule() -> None:
    rule = FieldEdit(("x-set",), (("x-set", "rule"), ("x-add", "1")))
    share = FieldEdit(("x-gone", "x-set"), (("x-set", "backend"), ("x-add", "2")))
    action = Action((Share(0, response=share), Share(1)), response=rule)
    found = routing(destination([(prefix("/"), action)], backend("v1", "10.0.0.1:80"), backend("v2", "10.0.0.2:80")))
    way = found.choose(Head())
    assert isinstance(way, Way) and way.edit.response is not None
    assert set(way.edit.response.strip) == {b"x-set", b"x-gone"}
    assert way.edit.response.add == ((b"x-add", b"2"), (b"x-set", b"rule"), (b"x-add", b"1"))
    assert (way.edit.strip, way.edit.add) == ((), ())


def test_a_rewrite_of_the_backend_stands_before_that_of_the_rule_part_by_part() -> None:
    rule = wire.Rewrite("rule.example", "/rule", "/a")

    def rewritten(share: wire.Rewrite | None) -> tuple[bytes, bytes]:
        action = Action((Share(0, rewrite=share),), rewrite=rule)
        way = routing(destination([(prefix("/a"), action)], backend("v1", "10.0.0.1:80"))).choose(Head("/a/b"))
        assert isinstance(way, Way) and way.edit.retarget is not None
        return way.edit.host, way.edit.retarget(b"/a/b?c")

    assert rewritten(None) == (b"rule.example", b"/rule/b?c")
    assert rewritten(wire.Rewrite("backend.example")) == (b"backend.example", b"/rule/b?c")
    assert rewritten(wire.Rewrite("", "/backend")) == (b"rule.example", b"/backend?c")


def test_a_rewrite_that_changes_nothing_costs_nothing() -> None:
    action = Action((Share(0, response=FieldEdit()),), FieldEdit(), rewrite=wire.Rewrite())
    way = routing(destination([(prefix("/"), action)], backend("v1", "10.0.0.1:80"))).choose(Head())
    assert isinstance(way, Way) and way.edit is UNTOUCHED and way.limits is None


@pytest.mark.parametrize(
    ("path", "of", "target", "expected"),
    [
        ("/full", None, "/a/b?c=d", "/full?c=d"),
        ("", None, "/a", "/"),
        ("/xyz", "/foo", "/foo/bar", "/xyz/bar"),
        ("/xyz/", "/foo", "/foo/bar", "/xyz/bar"),
        ("/xyz", "/foo/", "/foo/bar", "/xyz/bar"),
        ("/xyz/", "/foo/", "/foo/bar", "/xyz/bar"),
        ("/xyz", "/foo", "/foo", "/xyz"),
        ("/xyz", "/foo", "/foo/", "/xyz/"),
        ("", "/foo", "/foo", "/"),
        ("/", "/foo", "/foo", "/"),
        ("", "/foo", "/foo/bar", "/bar"),
        ("/", "/foo", "/foo/bar", "/bar"),
        ("/xyz", "/", "/foo?q", "/xyz/foo?q"),
        ("/xyz", "/~a", "/%7ea/b", "/xyz/b"),
        ("/xyz", "/caf%c3%a9", "/caf%C3%A9/b", "/xyz/b"),
        ("/xyz", "/foo", "/foo/a%2fb", "/xyz/a%2Fb"),
        ("/xyz", "/foo", "/foo/./a/../b", "/xyz/b"),
        ("/xyz", "/foo", "/foo/bar?/foo/bar", "/xyz/bar?/foo/bar"),
    ],
)
def test_what_becomes_of_a_path(path: str, of: str | None, target: str, expected: str) -> None:
    assert retargeted(path, of, target.encode()) == expected.encode()


def test_a_replacement_keeps_what_is_known_about_endpoints() -> None:
    first = routing(TWO)
    way = first.choose(Head("/v1"))
    assert isinstance(way, Way)
    before = way.balancer.choose(0.0)
    again = routing(TWO, before=first).choose(Head("/v1"))
    assert isinstance(again, Way) and again.balancer.choose(0.0) is before


def test_a_replacement_keeps_the_budgets_of_its_rules() -> None:
    def limits(found: Routing, path: str) -> RuleLimits:
        way = found.choose(Head(path))
        assert isinstance(way, Way) and way.limits is not None
        return way.limits

    retry, timeouts = Action((Share(0),), retry=wire.Retry()), Action((Share(0),), timeouts=wire.Timeouts(1.0))
    made = destination([(prefix("/a"), retry), (prefix("/b"), timeouts)], backend("v1", "10.0.0.1:80"))
    first = routing(made)
    again = routing(made, before=first)
    assert limits(again, "/a").budget is limits(first, "/a").budget
    assert limits(again, "/a").budget is not limits(again, "/b").budget
    assert (limits(first, "/a").retry, limits(first, "/a").timeouts) == (wire.Retry(), wire.Timeouts())
    assert (limits(first, "/b").retry, limits(first, "/b").timeouts) == (None, wire.Timeouts(1.0))


@pytest.mark.parametrize(
    ("redirect", "target", "port", "expected"),
    [
        (wire.Redirect(hostname="example.org"), "/a?b=c", 80, "http://example.org/a?b=c"),
        (wire.Redirect(), "/a", 8080, "http://web:8080/a"),
        (wire.Redirect(scheme="https"), "/a", 8080, "https://web/a"),
        (wire.Redirect(scheme="https", port=443), "/", 80, "https://web/"),
        (wire.Redirect(scheme="https", port=80), "/", 80, "https://web:80/"),
        (wire.Redirect(port=8083), "/", 80, "http://web:8083/"),
        (wire.Redirect(port=80), "/", 8080, "http://web/"),
        (wire.Redirect(path="/full"), "/a/b?c", 80, "http://web/full?c"),
        (wire.Redirect(path="/xyz", prefix="/foo"), "/foo/bar", 80, "http://web/xyz/bar"),
        (wire.Redirect(path="/xyz/", prefix="/foo"), "/foo/bar", 80, "http://web/xyz/bar"),
        (wire.Redirect(path="/xyz", prefix="/foo/"), "/foo/bar", 80, "http://web/xyz/bar"),
        (wire.Redirect(path="/xyz", prefix="/foo"), "/foo", 80, "http://web/xyz"),
        (wire.Redirect(path="/xyz", prefix="/foo"), "/foo/", 80, "http://web/xyz/"),
        (wire.Redirect(path="", prefix="/foo"), "/foo", 80, "http://web/"),
        (wire.Redirect(path="/", prefix="/foo"), "/foo", 80, "http://web/"),
        (wire.Redirect(path="", prefix="/foo"), "/foo/bar", 80, "http://web/bar"),
        (wire.Redirect(path="/xyz", prefix="/"), "/foo", 80, "http://web/xyz/foo"),
    ],
)
def test_where_a_redirect_leads(redirect: wire.Redirect, target: str, port: int, expected: str) -> None:
    assert location(redirect, Head(target, host="WEB:8080"), port) == Redirect(302, expected.encode())


@pytest.mark.parametrize("host", ["", "a b", "evil/..", "a@b", "[::1", "x" * 300])
def test_a_host_of_nonsense_is_not_repeated(host: str) -> None:
    assert location(wire.Redirect(), Head(host=host), 80) is Cause.BAD_REQUEST
    assert isinstance(location(wire.Redirect(hostname="web"), Head(host=host), 80), Redirect)


def test_a_rule_that_redirects_needs_no_backend() -> None:
    found = routing(destination([(prefix("/"), Action(redirect=wire.Redirect(301, hostname="example.org")))]))
    assert found.choose(Head("/a")) == Redirect(301, b"http://example.org/a")


def test_patterns_that_do_not_compile_send_nothing_anywhere() -> None:
    match = HttpMatch(PathMatch("RegularExpression", "("))
    assert routing(destination([(Rule((match,)), Action((Share(0),)))], backend("v1", "10.0.0.1:80"))).choose(Head()) is Cause.INTERNAL


def test_what_is_remembered_is_bounded() -> None:
    found = routing(TWO)
    for number in range(3000):
        found.choose(Head(f"/v1/{number}"))
    assert len(found._memo) <= 1024
