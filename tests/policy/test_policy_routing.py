"""Routes of Services: whose act for whom, where they lead, and who hears of a change."""

from __future__ import annotations

from typing import Any

import policy_lab as lab
import pytest
from policy_lab import CART_VIP, indexed, parsed

from core.k8s.fields import InvalidObject
from core.k8s.objects import Service, ServicePort
from policy import wire
from policy.filters import Filters, Unsupported
from policy.gateway import read_http_route
from policy.index import Index, IpKey
from policy.index.report import problems
from policy.index.routing import routing

ADDR = "10.96.0.1:80"
SERVICE = {"group": "", "kind": "Service", "name": "cart"}


def to(name: str, weight: int | None = None, **fields: Any) -> dict[str, Any]:
    return {"name": name, "port": 80, **({} if weight is None else {"weight": weight}), **fields}


def route(name: str = "web", *backends: dict[str, Any], in_namespace: str = "shop", **fields: Any) -> dict[str, Any]:
    parent = fields.pop("parent", SERVICE) | ({"namespace": "shop"} if in_namespace != "shop" else {})
    raw = lab.route(name, parent=parent, backendRefs=list(backends), **fields)
    raw["metadata"]["namespace"] = in_namespace
    return raw


def shop(*raws: dict[str, Any]) -> Index:
    """Services cart, v1 and v2, each with one pod behind it."""
    services = [lab.service(), lab.service("v1", "10.96.0.2"), lab.service("v2", "10.96.0.3")]
    slices = [
        lab.endpoints(name=f"{of}-1", of=of, **{f"{of}_0": f"10.0.1.{number}"}) for number, of in enumerate(("cart", "v1", "v2"), start=1)
    ]
    pods = [lab.pod(f"{of}-0", f"10.0.1.{number}", labels={}) for number, of in enumerate(("cart", "v1", "v2"), start=1)]
    return indexed(*services, *slices, *pods, *raws)


def names(destination: wire.Destination) -> list[str]:
    return [found.ref.name for found in destination.routes]


def addresses(destination: wire.Destination) -> list[list[str]]:
    return [[endpoint.addr for endpoint in backend.endpoints] for backend in destination.backends]


def test_a_service_without_routes_is_what_it_was() -> None:
    found = shop().destination(ADDR)
    assert (found.routes, found.backends) == ((), ())
    assert [endpoint.addr for endpoint in found.endpoints] == ["10.0.1.1:8080"]


def test_rules_lead_to_backends_with_weights_and_identities() -> None:
    found = shop(route("web", to("v1", 70), to("v2", 30))).destination(ADDR)
    assert addresses(found) == [["10.0.1.2:8080"], ["10.0.1.3:8080"]]
    assert found.backends[0].endpoints[0].identity == "spiffe://cluster.local/ns/shop/sa/cart"
    ((action,),) = [one.actions for one in found.routes]
    assert [(share.backend, share.weight) for share in action.shares] == [(0, 70), (1, 30)]
    assert wire.decode_to_sidecar_untrusted(wire.encode(wire.AddressDestination(ADDR, found))) == wire.AddressDestination(ADDR, found)


def test_a_backend_that_does_not_exist_keeps_its_share_and_one_of_weight_0_does_no_harm() -> None:
    found = shop(route("web", to("v1"), to("nobody"), to("neither", 0))).destination(ADDR)
    assert [bool(backend.problem) for backend in found.backends] == [False, True]
    assert len(found.routes[0].actions[0].shares) == 2


def test_only_the_port_that_a_parent_names_is_meant() -> None:
    assert names(shop(route(parent=SERVICE | {"port": 81})).destination(ADDR)) == []
    assert names(shop(route(parent=SERVICE | {"sectionName": "web"})).destination(ADDR)) == ["web"]
    assert names(shop(route(parent=SERVICE | {"sectionName": "web", "port": 81})).destination(ADDR)) == []


def test_a_pods_own_address_has_no_routes() -> None:
    assert shop(route("web", to("v1"))).destination("10.0.1.1:8080").routes == ()


def test_routes_of_a_backend_are_not_looked_at() -> None:
    inner = route("inner", to("v2"), parent={**SERVICE, "name": "v1"})
    assert addresses(shop(route("web", to("v1")), inner).destination(ADDR)) == [["10.0.1.2:8080"]]


def test_a_consumers_routes_act_for_its_own_namespace_and_then_alone() -> None:
    index = shop(route("producer", to("v1")), route("consumer", to("v2", namespace="shop"), in_namespace="front"))
    assert names(index.destination(ADDR, "front")) == ["consumer"]
    assert (
        names(index.destination(ADDR, "shop")) == names(index.destination(ADDR, "other")) == names(index.destination(ADDR)) == ["producer"]
    )
    assert (index.scope("10.96.0.1", "front"), index.scope("10.96.0.1", "shop"), index.scope("10.9.9.9", "front")) == ("front", "", "")


def test_a_grpc_route_displaces_http_routes_and_the_oldest_comes_first() -> None:
    http = route("http", created="2020-01-01T00:00:00Z")
    older = lab.route("older", kind="GRPCRoute", parent=SERVICE, created="2021-01-01T00:00:00Z")
    younger = lab.route("younger", kind="GRPCRoute", parent=SERVICE, created="2022-01-01T00:00:00Z")
    assert names(shop(younger, http, older).destination(ADDR)) == ["older", "younger"]


def test_a_route_that_cannot_be_done_is_not_attached() -> None:
    assert names(shop(route("web", to("v1"), filters=[{"type": "RequestMirror"}])).destination(ADDR)) == []


def test_everybody_who_may_be_affected_hears_of_it() -> None:
    index = shop()
    made = route("web", to("v1"))
    assert index.apply(parsed(made)) == {CART_VIP}
    assert CART_VIP in index.apply(parsed(lab.endpoints(name="v1-1", of="v1", v1_0="10.0.1.9")))
    assert CART_VIP in index.delete(parsed(lab.service("v1", "10.96.0.2")).ref)
    assert index.destination(ADDR).backends[0].problem == "there is no Service v1 in namespace shop"
    assert CART_VIP in index.apply(parsed(lab.service("v1", "10.96.0.2")))
    assert index.delete(parsed(made).ref) == {CART_VIP}
    assert IpKey("10.96.0.2") in index.apply(parsed(lab.service("v1", "10.96.0.2", port=81)))
    assert not index.store.routes_by_service and not index.store.routes_by_backend


def test_what_does_not_act_as_meant_is_reported() -> None:
    def reported(made: dict[str, Any]) -> list[tuple[str, str]]:
        return [(problem.reason, problem.message) for problem in problems(shop(made))]

    assert reported(route("web", to("v1"))) == []
    assert reported(route("web", to("nobody"))) == [
        ("unresolved-backend", "there is no Service nobody in namespace shop; its share of the requests gets an error")
    ]
    assert reported(route(parent={**SERVICE, "name": "nobody"})) == [("no-such-parent", "there is no Service nobody in namespace shop")]
    assert reported(route(parent=SERVICE | {"port": 81})) == [("no-such-parent", "service shop/cart has no port that the route names")]
    ((reason, message),) = reported(route("web", filters=[{"type": "RequestMirror"}]))
    assert reason == "unsupported" and message.endswith("the route is not applied to its Services")


def modified(*filters: dict[str, Any]) -> wire.FieldEdit | None:
    read = read_http_route(route("web", to("v1"), filters=list(filters)))
    assert read.forwarding is not None and not read.forwarding.unsupported, read.forwarding
    return read.forwarding.rules[0].filters.request


def test_header_changes_are_read_in_lower_case_and_set_replaces() -> None:
    change = {"set": [{"name": "X-Set", "value": "a"}], "add": [{"name": "X-Add", "value": "b"}], "remove": ["X-Gone"]}
    edit = modified({"type": "RequestHeaderModifier", "requestHeaderModifier": change})
    assert edit == wire.FieldEdit(("x-gone", "x-set"), (("x-set", "a"), ("x-add", "b")))


@pytest.mark.parametrize("name", ["Host", "Content-Length", "Transfer-Encoding", "TE", "Connection"])
def test_what_says_how_a_request_is_carried_is_not_changed(name: str) -> None:
    modifier = {"type": "RequestHeaderModifier", "requestHeaderModifier": {"remove": [name]}}
    read = read_http_route(route("web", to("v1"), filters=[modifier]))
    assert read.forwarding is not None and "cannot be changed" in read.forwarding.unsupported


@pytest.mark.parametrize(
    "change",
    [
        {"set": [{"name": "a b", "value": "x"}]},
        {"set": [{"name": "a", "value": "x\r\ny: z"}]},
        {"set": [{"name": "a", "value": " x"}]},
        {"set": [{"name": "a", "value": ""}]},
        {"set": [{"name": "a", "value": "x"}], "remove": ["A"]},
        {"unheardOf": []},
    ],
)
def test_a_wrong_change_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidObject, match=r"spec\.rules\[0\]\.filters\[0\]\.requestHeaderModifier"):
        modified({"type": "RequestHeaderModifier", "requestHeaderModifier": change})


def redirected(matches: list[dict[str, Any]] | None = None, **redirect: Any) -> wire.Redirect | None:
    raw = route("web", filters=[{"type": "RequestRedirect", "requestRedirect": redirect}], path="/old")
    del raw["spec"]["rules"][0]["backendRefs"]
    if matches is not None:
        raw["spec"]["rules"][0]["matches"] = matches
    read = read_http_route(raw)
    assert read.forwarding is not None and not read.forwarding.unsupported, read.forwarding
    return read.forwarding.rules[0].filters.redirect


def test_redirects_are_read() -> None:
    assert redirected() == wire.Redirect()
    assert redirected(hostname="example.org", statusCode=308, port=8080, scheme="https") == wire.Redirect(308, "https", "example.org", 8080)
    assert redirected(path={"type": "ReplaceFullPath", "replaceFullPath": "/new"}) == wire.Redirect(path="/new")
    assert redirected(path={"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}) == wire.Redirect(path="/new", prefix="/old")
    assert redirected([], path={"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}) == wire.Redirect(path="/new", prefix="/")


@pytest.mark.parametrize(
    "redirect",
    [
        {"hostname": "*.example.org"},
        {"hostname": "a\r\nb"},
        {"port": 0},
        {"path": {"type": "ReplaceFullPath"}},
        {"path": {"type": "ReplaceFullPath", "replaceFullPath": "/a\r\nb: c"}},
        {"unheardOf": 1},
    ],
)
def test_a_wrong_redirect_is_refused(redirect: dict[str, Any]) -> None:
    with pytest.raises(InvalidObject, match=r"spec\.rules\[0\]\.filters\[0\]\.requestRedirect"):
        redirected(**redirect)


def test_a_prefix_can_only_be_replaced_where_there_is_one() -> None:
    path = {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}
    for matches in ([{"path": {"type": "Exact", "value": "/a"}}], [{"path": {"value": "/a"}}, {"path": {"value": "/b"}}]):
        with pytest.raises(InvalidObject, match="exactly one match"):
            redirected(matches, path=path)


@pytest.mark.parametrize("redirect", [{"scheme": "gopher"}, {"statusCode": 418}])
def test_a_redirect_that_cannot_be_done_is_said(redirect: dict[str, Any]) -> None:
    read = read_http_route(route("web", filters=[{"type": "RequestRedirect", "requestRedirect": redirect}]))
    assert read.forwarding is not None and "is not supported" in read.forwarding.unsupported


@pytest.mark.parametrize("backend", [{"weight": -1}, {"weight": 1_000_001}, {"port": 0}, {"name": ""}, {"unheardOf": 1}])
def test_a_wrong_backend_is_refused(backend: dict[str, Any]) -> None:
    with pytest.raises(InvalidObject, match=r"spec\.rules\[0\]\.backendRefs\[0\]"):
        read_http_route(route("web", to("v1") | backend))


def read_filters(*filters: dict[str, Any], of_backend: bool = False, **rule: Any) -> Filters:
    backend = to("v1", filters=list(filters)) if of_backend else to("v1")
    read = read_http_route(route("web", backend, filters=[] if of_backend else list(filters), **rule))
    assert read.forwarding is not None
    if read.forwarding.unsupported:
        raise Unsupported(read.forwarding.unsupported)
    rule_ = read.forwarding.rules[0]
    return rule_.references[0].filters if of_backend else rule_.filters


def response(**change: Any) -> dict[str, Any]:
    return {"type": "ResponseHeaderModifier", "responseHeaderModifier": change}


def rewrite(**change: Any) -> dict[str, Any]:
    return {"type": "URLRewrite", "urlRewrite": change}


@pytest.mark.parametrize("of_backend", [False, True])
def test_changes_of_answers_are_read_on_rules_and_on_backends(of_backend: bool):
    found = read_filters(response(set=[{"name": "X-Set", "value": "a"}], remove=["Server"]), of_backend=of_backend)
    assert found == Filters(response=wire.FieldEdit(("server", "x-set"), (("x-set", "a"),)))


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Grpc-Status", "Pillion-Proxy-Error"])
def test_what_says_how_an_answer_is_carried_is_not_changed(name: str):
    with pytest.raises(Unsupported, match="cannot be changed"):
        read_filters(response(remove=[name]))


@pytest.mark.parametrize("of_backend", [False, True])
def test_rewrites_are_read_on_rules_and_on_backends(of_backend: bool):
    prefix, full = {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}, {"type": "ReplaceFullPath", "replaceFullPath": "/full"}
    for change, expected in (
        ({"hostname": "inner.example"}, wire.Rewrite("inner.example")),
        ({"path": full}, wire.Rewrite("", "/full")),
        ({"path": prefix}, wire.Rewrite("", "/new", "/old")),
        ({"hostname": "a", "path": prefix}, wire.Rewrite("a", "/new", "/old")),
        ({}, wire.Rewrite()),
    ):
        assert read_filters(rewrite(**change), of_backend=of_backend, path="/old").rewrite == expected


@pytest.mark.parametrize(
    "change",
    [
        {"hostname": "*.example.org"},
        {"hostname": "Inner"},
        {"hostname": "a:80"},
        {"hostname": "a\r\nx: y"},
        {"path": {"type": "ReplaceFullPath"}},
        {"path": {"type": "ReplaceFullPath", "replaceFullPath": "/a b"}},
        {"path": {"type": "ReplaceFullPath", "replaceFullPath": "/a?b"}},
        {"path": {"type": "ReplaceFullPath", "replaceFullPath": "/a", "replacePrefixMatch": "/b"}},
        {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/" + "a" * 1024}},
        {"unheardOf": 1},
    ],
)
@pytest.mark.parametrize("of_backend", [False, True])
def test_a_wrong_rewrite_is_refused(change: dict[str, Any], of_backend: bool):
    with pytest.raises(InvalidObject, match=r"spec\.rules\[0\].*filters\[0\]\.urlRewrite"):
        read_filters(rewrite(**change), of_backend=of_backend)


def test_a_rewrite_of_a_prefix_needs_one_prefix():
    change = rewrite(path={"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"})
    with pytest.raises(InvalidObject, match="exactly one match"):
        read_filters(change, matches=[{"path": {"type": "Exact", "value": "/a"}}])
    with pytest.raises(InvalidObject, match="exactly one match"):
        read_filters(change, of_backend=True, matches=[{"path": {"type": "RegularExpression", "value": "/a"}}])


@pytest.mark.parametrize(
    "filters",
    [
        [rewrite(hostname="a"), rewrite(hostname="b")],
        [rewrite(hostname="a"), {"type": "RequestRedirect", "requestRedirect": {}}],
        [response(remove=["a"]), response(remove=["b"])],
        [{"type": "URLRewrite"}],
        [{"type": "URLRewrite", "requestRedirect": {}, "urlRewrite": {}}],
        [{"type": "RequestRedirect", "requestRedirect": {}}],  # beside a backend
        [response(remove=["a"])] * 17,
    ],
)
def test_filters_that_contradict_each_other_or_their_type_are_refused(filters: list[dict[str, Any]]):
    with pytest.raises(InvalidObject, match=r"spec\.rules\[0\]\."):
        read_filters(*filters)


@pytest.mark.parametrize("kind", ["RequestMirror", "CORS", "ExtensionRef", "ExternalAuth", "Unheard"])
@pytest.mark.parametrize("of_backend", [False, True])
def test_a_filter_that_cannot_be_done_is_said(kind: str, of_backend: bool):
    with pytest.raises(Unsupported, match=rf'filter "{kind}" is not supported on a {"backend" if of_backend else "route"} of a Service'):
        read_filters({"type": kind}, of_backend=of_backend)


def test_a_redirect_of_a_backend_and_one_with_changed_answers_are_not_supported():
    with pytest.raises(Unsupported, match="RequestRedirect"):
        read_filters({"type": "RequestRedirect", "requestRedirect": {}}, of_backend=True)
    read = read_http_route(route("web", filters=[{"type": "RequestRedirect", "requestRedirect": {}}, response(remove=["a"])]))
    assert read.forwarding is not None and "ResponseHeaderModifier beside a RequestRedirect" in read.forwarding.unsupported


def test_filters_reach_the_sidecar():
    backend = to("v1", filters=[response(remove=["b"]), rewrite(hostname="b")])
    made = route("web", backend, filters=[response(remove=["a"]), rewrite(hostname="a")])
    (found,) = shop(made).destination(ADDR).routes
    (action,) = found.actions
    assert (action.response, action.rewrite) == (wire.FieldEdit(("a",)), wire.Rewrite("a"))
    assert (action.shares[0].response, action.shares[0].rewrite) == (wire.FieldEdit(("b",)), wire.Rewrite("b"))


def timed(timeouts: dict[str, Any]) -> wire.Timeouts | None:
    read = read_http_route(route("web", to("v1"), timeouts=timeouts))
    assert read.forwarding is not None and not read.forwarding.unsupported, read.forwarding
    return read.forwarding.rules[0].timeouts


def test_timeouts_are_read_and_zero_is_none():
    assert timed({"request": "10s", "backendRequest": "500ms"}) == wire.Timeouts(10.0, 0.5)
    assert timed({"request": "1m"}) == wire.Timeouts(60.0, 0.0)
    assert timed({"request": "0s", "backendRequest": "2s"}) == wire.Timeouts(0.0, 2.0)
    assert timed({"request": "2s", "backendRequest": "2s"}) == wire.Timeouts(2.0, 2.0)
    assert timed({"request": "0s"}) is None
    assert timed({}) is None
    (found,) = shop(route("web", to("v1"), timeouts={"request": "3s"})).destination(ADDR).routes
    assert found.actions[0].timeouts == wire.Timeouts(3.0)


@pytest.mark.parametrize(
    ("timeouts", "place"),
    [
        ({"request": "1.5s"}, "request"),
        ({"request": "-1s"}, "request"),
        ({"request": 5}, "request"),
        ({"backendRequest": "soon"}, "backendRequest"),
        ({"request": "1s", "backendRequest": "1001ms"}, "backendRequest"),
        ({"unheardOf": "1s"}, "unheardOf"),
    ],
)
def test_wrong_timeouts_are_refused(timeouts: dict[str, Any], place: str):
    with pytest.raises(InvalidObject, match=rf"spec\.rules\[0\]\.timeouts\.{place}"):
        timed(timeouts)


def retried(**retry: Any) -> wire.Retry | None:
    read = read_http_route(route("web", to("v1"), retry=retry))
    assert read.forwarding is not None
    if read.forwarding.unsupported:
        raise Unsupported(read.forwarding.unsupported)
    return read.forwarding.rules[0].retry


def test_retries_are_read_and_what_nobody_says_has_a_default():
    assert retried(codes=[500, 503], attempts=3, backoff="100ms") == wire.Retry((500, 503), 3, 0.1)
    assert retried() == wire.Retry((), 1, 0.025)
    assert retried(backoff="0s") == wire.Retry((), 1, 0.0)
    assert retried(codes=[400, 599]) == wire.Retry((400, 599))
    (found,) = shop(route("web", to("v1"), retry={"attempts": 2})).destination(ADDR).routes
    assert found.actions[0].retry == wire.Retry((), 2)


@pytest.mark.parametrize(
    ("retry", "place"),
    [
        ({"codes": [200]}, r"codes\[0\]"),
        ({"codes": [503, 600]}, r"codes\[1\]"),
        ({"codes": [503, 503]}, "codes"),
        ({"codes": ["503"]}, r"codes\[0\]"),
        ({"attempts": 0}, "attempts"),
        ({"attempts": -1}, "attempts"),
        ({"attempts": "3"}, "attempts"),
        ({"backoff": "1.5s"}, "backoff"),
        ({"unheardOf": 1}, "unheardOf"),
    ],
)
def test_wrong_retries_are_refused(retry: dict[str, Any], place: str):
    with pytest.raises(InvalidObject, match=rf"spec\.rules\[0\]\.retry\.{place}"):
        retried(**retry)


def test_more_attempts_than_anybody_needs_are_not_supported():
    assert retried(attempts=100) is not None
    with pytest.raises(Unsupported, match=r"spec\.rules\[0\]\.retry\.attempts: more than 100"):
        retried(attempts=101)


def test_a_backend_is_looked_up_once_however_many_rules_name_it() -> None:
    index = shop(*(route(f"web{number}", *[to("v1"), to("v2"), to("v1"), to("gone")] * 4) for number in range(9)))
    service = index.store.services["shop"]["cart"]
    asked: list[str] = []

    def ready(of: Service, port: ServicePort) -> tuple[wire.Endpoint, ...]:
        asked.append(of.metadata.name)
        return ()

    routes, backends = routing(index.store, service, service.spec.ports[0], "", ready)
    assert asked == ["v1", "v2"]
    assert [backend.ref.name for backend in backends] == ["v1", "v2", "gone"]
    assert all([share.backend for share in route.actions[0].shares] == [0, 1, 0, 2] * 4 for route in routes)
