"""Routes of Services on a cluster: where requests go, what their status says, and that they stay in force while no controller is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.kube import Kube, Object, Space, client, container, pod_spec, service, until, workload

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CONTROLLER = "pillion.dev/policy-controller"


@pytest.fixture(scope="module")
def fork(make_space: Callable[..., Space]) -> Space:
    """``cart`` in front of everything, ``cart-v1`` and ``cart-v2`` in front of one pod each, called by ``client``."""
    made = make_space("fork")
    for name in ("v1", "v2"):
        made.apply(workload("Deployment", name, pod_spec(container("app", "serve", "--http", "8080"))))
        made.apply(service(f"cart-{name}", selector={"app": name}))
    made.apply(service("cart", selector={"app": "v1"}), client("client"))
    made.rolled_out("deployment/v1", "deployment/v2")
    made.ready("client")
    return made


@pytest.fixture
def clean(fork: Space) -> Iterator[Space]:
    """The fork without routes before and after."""
    yield fork
    fork.run("delete", "httproutes,grpcroutes", "--all")


def route(*rules: Object, name: str = "cart", parent: str = "cart") -> Object:
    spec = {"parentRefs": [{"group": "", "kind": "Service", "name": parent}], "rules": list(rules)}
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": name}, "spec": spec}


def to(name: str, **more: Any) -> Object:
    return {"name": name, "port": 80, **more}


def at(path: str, *backends: Object, **more: Any) -> Object:
    return {"matches": [{"path": {"type": "PathPrefix", "value": path}}], "backendRefs": list(backends), **more}


def ask(space: Space, path: str) -> tuple[int, str]:
    """Status, and which deployment answered."""
    seen = space.call("client", f"http://cart{path}")
    body = seen.get("body") or {}
    return seen.get("status", 0), str(body.get("pod", "")).rpartition("-")[0].rpartition("-")[0]


def becomes(space: Space, path: str, expected: tuple[int, str]) -> None:
    until(f"{path} answers {expected}", lambda: ask(space, path) == expected)


def said(space: Space, name: str = "cart") -> dict[str, tuple[str, str]]:
    """The conditions that Pillion wrote about a route with one parent."""
    parents = space.json("get", "httproute", name).get("status", {}).get("parents", [])
    ours = [parent for parent in parents if parent["controllerName"] == CONTROLLER]
    return {each["type"]: (each["status"], each["reason"]) for parent in ours for each in parent["conditions"]}


def test_rules_say_where_requests_go(clean: Space) -> None:
    assert ask(clean, "/v2") == (200, "v1")
    header = {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x-route", "value": "two"}]}}
    moved = {"type": "RequestRedirect", "requestRedirect": {"hostname": "example.org", "statusCode": 301}}
    redirect = at("/old", filters=[moved])
    del redirect["backendRefs"]
    clean.apply(route(at("/v1", to("cart-v1")), at("/v2", to("cart-v2"), filters=[header]), redirect))
    becomes(clean, "/v2/x", (200, "v2"))
    becomes(clean, "/v1", (200, "v1"))
    becomes(clean, "/", (404, ""))
    assert clean.call("client", "http://cart/v2")["body"]["headers"]["x-route"] == "two"
    assert clean.call("client", "http://cart/old/x")["status"] == 301
    until("the route says so", lambda: said(clean) == {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")})


def test_requests_and_answers_are_rewritten_and_have_their_time(clean: Space) -> None:
    path = {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}
    rewrite = {"type": "URLRewrite", "urlRewrite": {"hostname": "inner.example", "path": path}}
    answer = {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-route", "value": "two"}]}}
    clean.apply(route(at("/old", to("cart-v2"), filters=[rewrite, answer], timeouts={"request": "10s", "backendRequest": "5s"})))
    becomes(clean, "/old/x", (200, "v2"))
    seen = clean.call("client", "http://cart/old/x?y")
    assert (seen["body"]["path"], seen["body"]["headers"]["host"]) == ("/new/x?y", "inner.example")
    assert seen["headers"]["x-route"] == "two"


def test_weights_are_shares(clean: Space) -> None:
    clean.apply(route(at("/", to("cart-v1", weight=3), to("cart-v2", weight=1))))
    until("both are asked", lambda: {ask(clean, "/")[1] for _ in range(12)} == {"v1", "v2"})
    counted = Counter(ask(clean, "/")[1] for _ in range(60))
    assert 30 <= counted["v1"] <= 57, counted


def test_a_backend_that_is_not_there_is_an_error_and_said(clean: Space) -> None:
    clean.apply(route(at("/", to("nobody"))))
    becomes(clean, "/", (500, ""))
    until("the route says so", lambda: said(clean).get("ResolvedRefs") == ("False", "BackendNotFound"))


def test_what_cannot_be_done_is_not_applied_and_said(clean: Space) -> None:
    mirror = {"type": "RequestMirror", "requestMirror": {"backendRef": to("cart-v1")}}
    clean.apply(route(at("/", to("cart-v2"), filters=[mirror])), route(at("/", to("cart-v2")), name="lost", parent="nowhere"))
    until("the route says so", lambda: said(clean) == {"Accepted": ("False", "UnsupportedValue")})
    until("the lost one says so", lambda: said(clean, "lost") == {"Accepted": ("False", "NoMatchingParent")})
    assert ask(clean, "/") == (200, "v1")


def test_routes_stay_in_force_without_any_controller_and_two_take_over(clean: Space, kube: Kube, mesh: Space) -> None:
    clean.apply(route(at("/", to("cart-v2"))))
    becomes(clean, "/", (200, "v2"))
    try:
        mesh.run("scale", "deployment/pillion-policy", "--replicas=0")
        until("no controller is left", lambda: not mesh.json("get", "pods", "--selector=app.kubernetes.io/component=policy")["items"])
        assert [ask(clean, "/") for _ in range(5)] == [(200, "v2")] * 5
    finally:
        mesh.run("scale", "deployment/pillion-policy", "--replicas=2")
        mesh.rolled_out("deployment/pillion-policy")
    clean.apply(route(at("/", to("cart-v1"))))
    becomes(clean, "/", (200, "v1"))
    until("one of them writes", lambda: said(clean).get("Accepted") == ("True", "Accepted"))
    mesh.run("scale", "deployment/pillion-policy", "--replicas=1")
    mesh.rolled_out("deployment/pillion-policy")
