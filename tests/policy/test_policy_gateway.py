from __future__ import annotations

import policy_lab as lab
import pytest

from policy import admission, wire
from policy.gateway import read_grpc_route, read_http_route


def _matching(**match: object) -> lab.Raw:
    return lab.route(matches=[match])


def test_a_rule_without_matches_matches_everything() -> None:
    route = read_http_route(lab.route(matches=[]))
    assert route.rules == (wire.Rule(),)
    bare = lab.route()
    del bare["spec"]["rules"]
    assert read_http_route(bare).rules == (wire.Rule(),)


def test_a_match_says_path_method_headers_and_query() -> None:
    route = read_http_route(
        _matching(
            path={"type": "Exact", "value": "/a%7eb"},
            method="POST",
            headers=[{"name": "X-Team", "value": "a"}, {"name": "x-team", "value": "ignored"}],
            queryParams=[{"type": "RegularExpression", "name": "Q", "value": "[0-9]+"}],
        )
    )
    assert route.rules[0].matches == (
        wire.HttpMatch(
            wire.PathMatch("Exact", "/a~b"),
            (wire.ValueMatch("Exact", "x-team", "a"),),
            (wire.ValueMatch("RegularExpression", "Q", "[0-9]+"),),
            "POST",
        ),
    )


@pytest.mark.parametrize(
    ("match", "words"),
    [
        (
            {"path": {"value": "/a/../b"}},
            'spec.rules[0].matches[0].path.value: expected a path with one reading (a dot segment), found "/a/../b"',
        ),
        (
            {"path": {"type": "Prefix"}},
            'spec.rules[0].matches[0].path.type: expected one of Exact, PathPrefix, RegularExpression, found "Prefix"',
        ),
        (
            {"method": "get"},
            'spec.rules[0].matches[0].method: expected one of GET, HEAD, POST, PUT, DELETE, CONNECT, OPTIONS, TRACE, PATCH, found "get"',
        ),
        (
            {"headers": [{"name": "a b", "value": "x"}]},
            'spec.rules[0].matches[0].headers[0].name: expected a token of at most 256 characters, found "a b"',
        ),
        ({"headers": [{"name": "a"}]}, "spec.rules[0].matches[0].headers[0].value: expected a value, found nothing"),
        ({"cookies": []}, "spec.rules[0].matches[0].cookies: expected no field of this name, found []"),
    ],
)
def test_a_wrong_match_is_refused_with_its_place(match: lab.Raw, words: str) -> None:
    assert admission.admit(_matching(**match)) == words


def test_a_regular_expression_must_be_one_that_sidecars_can_use() -> None:
    assert "RE2 syntax" in str(admission.admit(_matching(path={"type": "RegularExpression", "value": "(a)\\1"})))


def test_hostnames_are_lower_case_names() -> None:
    raw = lab.route()
    raw["spec"]["hostnames"] = ["Shop.Example", "*.example"]
    assert read_http_route(raw).hostnames == ("shop.example", "*.example")
    for wrong in ("10.0.0.1", "a.*.b", "shop:80", ""):
        raw["spec"]["hostnames"] = [wrong]
        assert str(admission.admit(raw)).startswith("spec.hostnames[0]: expected a host name")


@pytest.mark.parametrize(
    "rule",
    [
        {"filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {}}]},
        {"backendRefs": [{"name": "x", "port": 80}]},
        {"timeouts": {"request": "1s"}},
        {"retry": {}},
    ],
)
def test_what_cannot_be_enforced_in_front_of_an_app_makes_the_route_unsupported(rule: lab.Raw) -> None:
    route = read_http_route(lab.route(**rule))
    assert route.servers == ("cart",)
    assert route.unsupported.endswith("not supported on a route of a Server")
    assert next(iter(rule)) in route.unsupported


def test_a_route_with_neither_server_nor_service_as_parent_is_none_of_ours() -> None:
    raw = lab.route(parent={"name": "gateway"}, filters=[{"type": "URLRewrite"}], unheardOf=1)
    route = read_http_route(raw)
    assert not (route.servers or route.unattachable or route.rules)


def test_a_service_or_server_under_a_wrong_group_is_told_with_the_right_one() -> None:
    parents = [
        {"kind": "Service", "name": "cart", "port": 80},
        {"kind": "Service", "group": "core", "name": "cart"},
        {"kind": "Server", "group": "policy.linkerd.io", "name": "cart"},
        {"kind": "Service", "group": "", "name": "cart"},
        {"name": "gateway"},
    ]
    for kept in (parents, [*parents[:3], parents[4]]):
        raw = lab.route()
        raw["spec"]["parentRefs"] = kept
        assert read_http_route(raw).mistaken == (
            'spec.parentRefs[0]: no Service is in the group "gateway.networking.k8s.io", the one when none is given; write group: ""',
            'spec.parentRefs[1]: no Service is in the group "core"; write group: ""',
            'spec.parentRefs[2]: no Server is in the group "policy.linkerd.io"; write group: "policy.pillion.dev"',
        )


@pytest.mark.parametrize("field", [{"namespace": "other"}, {"port": 80}, {"sectionName": "x"}])
def test_a_parent_that_cannot_be_attached_to_is_told(field: lab.Raw) -> None:
    route = read_http_route(lab.route(parent={"group": lab.POLICY, "kind": "Server", "name": "cart", **field}))
    assert route.servers == ()
    assert route.unattachable[0].startswith("spec.parentRefs[0]")


def test_a_grpc_match_needs_a_service_or_a_method() -> None:
    def grpc(**match: object) -> lab.Raw:
        return lab.route(kind="GRPCRoute", matches=[match])

    assert read_grpc_route(grpc(method={"service": "shop.Cart", "method": "Add"})).rules[0].matches == (
        wire.GrpcMatch("Exact", "shop.Cart", "Add"),
    )
    assert read_grpc_route(grpc(headers=[{"name": "A", "value": "b"}])).rules[0].matches == (
        wire.GrpcMatch(headers=(wire.ValueMatch("Exact", "a", "b"),)),
    )
    assert admission.admit(grpc(method={})) == "spec.rules[0].matches[0].method: expected a service, a method or both, found neither"
    assert "the name of a gRPC service" in str(admission.admit(grpc(method={"service": "a/b"})))


def test_the_crds_limits_hold() -> None:
    raw = lab.route()
    raw["spec"]["rules"] = [{}] * 17
    assert admission.admit(raw) is not None
    raw["spec"]["rules"] = [{"matches": [{}] * 64}] * 3
    assert admission.admit(raw) == "spec.rules: expected at most 128 matches in all, found more"
