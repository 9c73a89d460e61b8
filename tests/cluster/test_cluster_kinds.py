"""What the API server itself says about a policy before anybody else sees it, and that the policy controller would say no less."""

from __future__ import annotations

from typing import Any

import pytest

from policy.admission import admit
from tests.cluster.kube import Kube, Object, Refused, Space

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ACCOUNT = {"kind": "ServiceAccount", "name": "a"}
MESH = {"group": "policy.pillion.dev", "kind": "MeshTLSAuthentication", "name": "m"}
NETWORK = {"group": "policy.pillion.dev", "kind": "NetworkAuthentication", "name": "n"}
SERVER = {"group": "policy.pillion.dev", "kind": "Server", "name": "s"}
SELECTOR: dict[str, Any] = {"podSelector": {}}


def policy(**spec: Any) -> dict[str, Any]:
    return {"targetRef": SERVER, "requiredAuthenticationRefs": [], **spec}


REFUSED = [
    ("Server", {**SELECTOR, "port": 0}, "a port from 1 to 65535"),
    ("Server", {**SELECTOR, "port": 65536}, "a port from 1 to 65535"),
    ("Server", {**SELECTOR, "port": ""}, "a port from 1 to 65535"),
    ("Server", {**SELECTOR, "port": "8080"}, "a port number is written without quotes"),
    ("Server", {**SELECTOR, "port": 80, "proxyProtocol": "HTTP/3"}, "Unsupported value"),
    ("Server", {"port": 80}, "spec.podSelector: Required value"),
    ("Server", {"port": 80, "podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}, "In and NotIn need values"),
    ("AuthorizationPolicy", policy(targetRef={"kind": "Namespace", "name": "default"}, inherit=False), "has nothing to inherit from"),
    ("AuthorizationPolicy", policy(targetRef={"kind": "Server", "name": "s"}), "Server is of policy.pillion.dev"),
    ("AuthorizationPolicy", policy(targetRef={**SERVER, "kind": "HTTPRoute"}), "GRPCRoute of gateway.networking.k8s.io"),
    ("AuthorizationPolicy", policy(requiredAuthenticationRefs=[MESH, ACCOUNT]), "at most one MeshTLSAuthentication or ServiceAccount"),
    ("AuthorizationPolicy", policy(requiredAuthenticationRefs=[NETWORK, NETWORK]), "at most one NetworkAuthentication"),
    ("AuthorizationPolicy", policy(requiredAuthenticationRefs=[{**MESH, "group": ""}]), "are of policy.pillion.dev"),
    ("MeshTLSAuthentication", {}, "either identities or identityRefs"),
    ("MeshTLSAuthentication", {"identities": ["*"], "identityRefs": [ACCOUNT]}, "either identities or identityRefs"),
    ("MeshTLSAuthentication", {"identities": ["cart.shop"]}, "a SPIFFE URI"),
    ("MeshTLSAuthentication", {"identityRefs": [{"kind": "Namespace", "name": "a", "namespace": "b"}]}, "has no namespace"),
    ("NetworkAuthentication", {"networks": []}, "should have at least 1 items"),
    ("NetworkAuthentication", {"networks": [{"cidr": "10.0.0.256"}]}, "networks[0].cidr"),
    ("NetworkAuthentication", {"networks": [{"cidr": "10.0.0.0/33"}]}, "networks[0].cidr"),
    ("NetworkAuthentication", {"networks": [{"cidr": "fd00::/129"}]}, "networks[0].cidr"),
    ("NetworkAuthentication", {"networks": [{"cidr": "10.0.0.0/8", "except": ["ten"]}]}, "networks[0].except[0]"),
]

ACCEPTED = [
    ("Server", {**SELECTOR, "port": 1}),
    ("Server", {**SELECTOR, "port": 65535, "proxyProtocol": "gRPC", "accessPolicy": "audit"}),
    ("Server", {"port": "http", "podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["x"]}]}}),
    ("AuthorizationPolicy", policy(requiredAuthenticationRefs=[MESH, NETWORK], inherit=False)),
    ("AuthorizationPolicy", policy(targetRef={"kind": "Namespace", "name": "NAMESPACE"})),
    ("AuthorizationPolicy", policy(targetRef={"group": "gateway.networking.k8s.io", "kind": "GRPCRoute", "name": "r"})),
    ("MeshTLSAuthentication", {"identities": ["*"]}),
    ("MeshTLSAuthentication", {"identities": ["spiffe://cluster.local/ns/shop/*"]}),
    ("MeshTLSAuthentication", {"identityRefs": [ACCOUNT, {"kind": "Namespace", "name": "a"}]}),
    ("NetworkAuthentication", {"networks": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}, {"cidr": "fd00::/8"}, {"cidr": "::1"}]}),
    ("NetworkAuthentication", {"networks": [{"cidr": "0.0.0.0/0"}, {"cidr": "192.168.1.1"}]}),
]


def object_of(kind: str, spec: dict[str, Any], namespace: str) -> Object:
    spec = {**spec, "targetRef": {**spec["targetRef"]}} if "targetRef" in spec else spec
    if spec.get("targetRef", {}).get("name") == "NAMESPACE":
        spec["targetRef"]["name"] = namespace
    meta = {"name": "tried", "namespace": namespace}
    return {"apiVersion": "policy.pillion.dev/v1alpha1", "kind": kind, "metadata": meta, "spec": spec}


def try_out(kube: Kube, tried: Object) -> str:
    """What the API server says about creating it, empty when it would."""
    import json

    try:
        kube.run("create", "--dry-run=server", "-f", "-", input=json.dumps(tried))
    except Refused as refused:
        return str(refused)
    return ""


@pytest.fixture(scope="module")
def place(mesh: Space) -> str:
    return "default"


@pytest.mark.parametrize(("kind", "spec", "told"), REFUSED)
def test_the_schema_refuses_and_says_why(kube: Kube, place: str, kind: str, spec: dict[str, Any], told: str) -> None:
    tried = object_of(kind, spec, place)
    said = try_out(kube, tried)
    assert told in said
    assert "is invalid" in said and "admission webhook" not in said, "the schema says so, also while no controller answers"
    assert admit(tried), "what the schema refuses, the controller refuses"


@pytest.mark.parametrize(("kind", "spec"), ACCEPTED)
def test_the_schema_takes_what_the_controller_understands(kube: Kube, place: str, kind: str, spec: dict[str, Any]) -> None:
    tried = object_of(kind, spec, place)
    assert admit(tried) is None
    assert try_out(kube, tried) == ""


def test_what_only_the_controller_can_judge_is_refused_by_its_webhook(kube: Kube, place: str) -> None:
    from cli.check.certificates import PROBE_POLICY

    tried = object_of("MeshTLSAuthentication", PROBE_POLICY["spec"], place)
    said = try_out(kube, tried)
    assert 'admission webhook "policy.pillion.dev" denied the request' in said
    assert str(admit(tried)) in said


def test_kinds_have_short_names_columns_and_a_category(kube: Kube, mesh: Space) -> None:
    resources = kube.run("api-resources", "--categories=pillion", "--no-headers")
    assert {line.split()[1] for line in resources.splitlines()} == {"psrv", "pauthz", "pmtls", "pnet"}
    kube.apply(object_of("Server", {**SELECTOR, "port": 8080}, "default"))
    try:
        heading, row = kube.run("get", "psrv", "tried", "-n", "default").splitlines()
        assert heading.split() == ["NAME", "PORT", "PROTOCOL", "ACCESS", "ACCEPTED", "AGE"]
        assert row.split()[:4] == ["tried", "8080", "unknown", "deny"]
    finally:
        kube.run("delete", "psrv", "tried", "-n", "default")
