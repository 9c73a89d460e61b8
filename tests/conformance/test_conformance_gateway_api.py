"""The Gateway API's rules of matching, as cases of data: against the route table, and as manifests through the controller to a sidecar.

Only what a route of a Server can say: where requests go (backends, weights, filters, producer and consumer routes) is no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from policy import wire
from policy.admission import parse_object
from policy.authorize import BadTarget, Client, Denied, NoRoute, Permit, PortAuthorizer
from policy.gateway import InboundRoute
from policy.index import Index
from policy.match import RouteTable, host_untrusted
from policy.paths import normal_target_untrusted, query_values

GROUPS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "gateway_api_cases.yaml").read_text(encoding="utf-8"))
CASES = [pytest.param(group["given"], case, id=f"{group['name']}: {case['when']}") for group in GROUPS for case in group["cases"]]
POLICY = "policy.pillion.dev"
GATEWAY = "gateway.networking.k8s.io"
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "cart-0", "namespace": "shop", "labels": {"app": "cart"}},
    "spec": {"serviceAccountName": "cart", "containers": [{"name": "app", "ports": [{"name": "http", "containerPort": 8080}]}]},
    "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.5"}]},
}

Given = dict[str, dict[str, Any]]


def manifest(api: str, kind: str, name: str, spec: dict[str, Any], order: int = 0) -> dict[str, Any]:
    meta = {"name": name, "namespace": "shop", "creationTimestamp": f"2026-01-01T00:00:{order:02}Z"}
    return {"apiVersion": api, "kind": kind, "metadata": meta, "spec": spec}


def routes(given: Given) -> list[dict[str, Any]]:
    """The routes as manifests, each a second younger than the one before."""
    found = []
    for order, (name, entry) in enumerate(given.items()):
        spec = {key: value for key, value in entry.items() if key != "kind"}
        spec["parentRefs"] = [{"group": POLICY, "kind": "Server", "name": "cart"}]
        found.append(manifest(f"{GATEWAY}/v1", entry.get("kind", "HTTPRoute"), name, spec, order))
    return found


def split(given: Given) -> Given:
    """Each rule as a route of its own: by the Gateway API's tie breaking nothing changes, and a decision then names the rule."""
    return {
        f"{name}.{number}": {**entry, "rules": [rule]}
        for name, entry in given.items()
        for number, rule in enumerate(entry.get("rules", [{}]))
    }


def request(when: dict[str, Any]) -> tuple[bytes, bytes, bytes, dict[bytes, bytes]]:
    """method, target, authority and headers as a sidecar reads them."""
    headers = {name.lower().encode(): value.encode() for name, value in when.get("headers", {}).items()}
    method = "POST" if "grpc" in when else when.get("method", "GET")
    return method.encode(), when.get("grpc", when.get("path", "/")).encode(), when.get("host", "cart.shop").encode(), headers


@pytest.mark.parametrize(("given", "case"), CASES)
def test_the_route_table_finds_the_rule(given: Given, case: dict[str, Any]) -> None:
    parsed = [parse_object(raw) for raw in routes(given)]
    table = RouteTable([wire.Route(one.ref, one.kind, one.hostnames, one.rules, ()) for one in parsed if isinstance(one, InboundRoute)])
    method, target, authority, headers = request(case["when"])
    path, query = normal_target_untrusted(target)
    found = table.find(
        host_untrusted(authority),
        method.decode(),
        path,
        query_values(query, strict=True),
        [headers.get(name) for name in table.header_names],
    )
    assert (f"{found.route.ref.name}.{found.rule_index}" if found else "none") == case["expect"]


def objects(given: Given) -> Iterator[dict[str, Any]]:
    """A Server, its routes, and for each route a policy that lets exactly one service account in, named like the route."""
    yield POD
    yield manifest(f"{POLICY}/v1alpha1", "Server", "cart", {"podSelector": {"matchLabels": {"app": "cart"}}, "port": "http"})
    for route in routes(given):
        name = route["metadata"]["name"]
        yield route
        spec = {
            "targetRef": {"group": GATEWAY, "kind": route["kind"], "name": name},
            "requiredAuthenticationRefs": [{"kind": "ServiceAccount", "name": name.replace(".", "-")}],
        }
        yield manifest(f"{POLICY}/v1alpha1", "AuthorizationPolicy", name, spec)


@pytest.mark.parametrize(("given", "case"), CASES)
def test_who_may_use_the_rule_may_make_the_request_and_nobody_else(given: Given, case: dict[str, Any]) -> None:
    index = Index()
    rules = split(given)
    for raw in objects(rules):
        parsed = parse_object(raw)
        assert parsed is not None
        index.apply(parsed)
    line = wire.encode(wire.PortPolicy(8080, index.inbound_policy("shop", "cart-0", 8080)))
    message = wire.decode_to_sidecar_untrusted(line)
    assert isinstance(message, wire.PortPolicy)
    port = PortAuthorizer(message.policy, "cluster.local")
    method, target, authority, headers = request(case["when"])
    values = tuple(headers.get(name) for name in port.header_names)
    for name in rules:
        client = Client("10.0.0.9", f"spiffe://cluster.local/ns/shop/sa/{name.replace('.', '-')}")
        decision = port.for_client(client).request(method, target, authority, values)
        if case.get("inbound") == "refused":
            assert type(decision) is BadTarget
        elif case["expect"] == "none":
            assert type(decision) is NoRoute
        else:
            assert type(decision) is (Permit if name == case["expect"] else Denied)
            assert decision.route is not None and decision.route.name == case["expect"]
