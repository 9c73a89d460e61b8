from __future__ import annotations

from copy import deepcopy
from typing import Any

import policy_lab as lab
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.k8s.fields import InvalidObject
from policy import admission, model


def _with(raw: lab.Raw, path: str, value: object) -> lab.Raw:
    """A copy with the field at a dotted path replaced, or removed when the value is ``...``."""
    changed = deepcopy(raw)
    *parents, last = path.split(".")
    place: Any = changed
    for step in parents:
        place = place[int(step)] if step.isdigit() else place[step]
    if value is ...:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return changed


SERVER = lab.server()
POLICY = lab.policy("allow", lab.ref("MeshTLSAuthentication", "friends"))
MESH = lab.mesh_tls("friends", "*")
NETS = lab.networks("office", "10.0.0.0/8", excluded=("10.1.0.0/16",))
URI = '"*", a SPIFFE URI (spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>), or one cut at a slash and ended with *'

REFUSED = [
    (SERVER, "spec", ..., "spec: expected a value, found nothing"),
    (SERVER, "spec", [], "spec: expected an object, found []"),
    (SERVER, "metadata.name", ..., "metadata.name: expected a value, found nothing"),
    (SERVER, "metadata.name", "Cart", 'metadata.name: expected a DNS name of at most 253 lower-case characters, found "Cart"'),
    (SERVER, "spec.podSelector", ..., "spec.podSelector: expected a value, found nothing"),
    (SERVER, "spec.podSelector", None, "spec.podSelector: expected object, found null"),
    (SERVER, "spec.port", 0, "spec.port: expected a port from 1 to 65535 or the name of a container port, found 0"),
    (SERVER, "spec.port", "80", 'spec.port: expected a port from 1 to 65535 or the name of a container port, found "80"'),
    (SERVER, "spec.port", 1.5, "spec.port: expected int | str, found 1.5"),
    (SERVER, "spec.proxyProtocol", "http", 'spec.proxyProtocol: expected one of unknown, HTTP/1, HTTP/2, gRPC, opaque, TLS, found "http"'),
    (
        SERVER,
        "spec.accessPolicy",
        "allow",
        "spec.accessPolicy: expected one of deny, audit, all-unauthenticated, all-authenticated, cluster-unauthenticated, "
        'cluster-authenticated, found "allow"',
    ),
    (SERVER, "spec.acessPolicy", "deny", 'spec.acessPolicy: expected no field of this name, found "deny"'),
    (SERVER, "spec.podSelector.matchLabel", {}, "spec.podSelector.matchLabel: expected no field of this name, found {}"),
    (SERVER, "apiVersion", "policy.pillion.dev/v1", "apiVersion: expected policy.pillion.dev/v1alpha1, found policy.pillion.dev/v1"),
    (POLICY, "spec.requiredAuthenticationRefs", ..., "spec.requiredAuthenticationRefs: expected a value, found nothing"),
    (POLICY, "spec.requiredAuthenticationRefs", None, "spec.requiredAuthenticationRefs: expected a value, found nothing"),
    (POLICY, "spec.inherit", "no", 'spec.inherit: expected bool, found "no"'),
    (
        POLICY,
        "spec.targetRef.kind",
        "Deployment",
        "spec.targetRef: expected one of GRPCRoute.gateway.networking.k8s.io, HTTPRoute.gateway.networking.k8s.io, Namespace, "
        'Server.policy.pillion.dev, found "Deployment.policy.pillion.dev"',
    ),
    (POLICY, "spec.targetRef.namespace", "other", 'spec.targetRef.namespace: expected the policy\'s own namespace shop, found "other"'),
    (
        POLICY,
        "spec.requiredAuthenticationRefs.0.kind",
        "Role",
        "spec.requiredAuthenticationRefs[0]: expected one of MeshTLSAuthentication.policy.pillion.dev, "
        'NetworkAuthentication.policy.pillion.dev, ServiceAccount, found "Role.policy.pillion.dev"',
    ),
    (MESH, "spec.identities", [], "spec.identities: expected array of length >= 1, found []"),
    (MESH, "spec", {}, "spec: expected either identities or identityRefs, found neither"),
    (MESH, "spec.identities.0", "*.shop", f'spec.identities[0]: expected {URI}, found "*.shop"'),
    (MESH, "spec.identities.0", "spiffe://a/ns/b*", f'spec.identities[0]: expected {URI}, found "spiffe://a/ns/b*"'),
    (NETS, "spec.networks.0.cidr", "10.0.0.0/99", 'spec.networks[0].cidr: expected an IP address or a CIDR, found "10.0.0.0/99"'),
    (
        NETS,
        "spec.networks.0.cidr",
        "10.0.0.1/8",
        'spec.networks[0].cidr: expected a network address such as 10.0.0.0/8, found "10.0.0.1/8"',
    ),
    (
        NETS,
        "spec.networks.0.cidr",
        "::ffff:10.0.0.0/104",
        "spec.networks[0].cidr: expected IPv4 spelt as IPv4 (clients in IPv4-mapped IPv6 are compared as IPv4), "
        'found "::ffff:10.0.0.0/104"',
    ),
    (
        NETS,
        "spec.networks.0.except.0",
        "11.0.0.0/16",
        'spec.networks[0].except[0]: expected a network inside 10.0.0.0/8 and smaller than it, found "11.0.0.0/16"',
    ),
    (
        NETS,
        "spec.networks.0.except.0",
        "10.0.0.0/8",
        'spec.networks[0].except[0]: expected a network inside 10.0.0.0/8 and smaller than it, found "10.0.0.0/8"',
    ),
    (NETS, "spec.networks", [], "spec.networks: expected array of length >= 1, found []"),
    (
        NETS,
        "kind",
        "Netauth",
        "kind: expected one of AuthorizationPolicy, MeshTLSAuthentication, NetworkAuthentication, Server, found Netauth",
    ),
]


@pytest.mark.parametrize(("raw", "path", "value", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_refuses_with_the_place_what_was_expected_and_what_was_found(raw: lab.Raw, path: str, value: object, words: str) -> None:
    assert admission.admit(raw) is None
    assert admission.admit(_with(raw, path, value)) == words


def test_defaults_are_those_of_the_documentation() -> None:
    server = model.read_server(lab.server())
    assert (server.protocol, server.access) == ("detect", "deny")
    assert model.read_authorization_policy(lab.policy()).inherit is True
    assert model.read_server(_with(SERVER, "metadata.namespace", ...)).ref.namespace == "default"


@pytest.mark.parametrize(
    ("words", "protocol"),
    [("unknown", "detect"), ("HTTP/1", "http1"), ("HTTP/2", "http2"), ("gRPC", "grpc"), ("opaque", "opaque"), ("TLS", "tls")],
)
def test_proxy_protocol_becomes_the_wire_protocol(words: str, protocol: str) -> None:
    assert model.read_server(lab.server(proxyProtocol=words)).protocol == protocol


def test_at_most_one_identity_and_one_network_may_be_required() -> None:
    mesh, account, network = lab.ref("MeshTLSAuthentication", "a"), lab.ref("ServiceAccount", "b"), lab.ref("NetworkAuthentication", "c")
    assert admission.admit(lab.policy("p", mesh, network)) is None
    assert admission.admit(lab.policy("p", account, network)) is None
    assert admission.admit(lab.policy("p", mesh, account)) == (
        "spec.requiredAuthenticationRefs[1]: expected at most one MeshTLSAuthentication or ServiceAccount (all refs must hold at once), "
        "found a second one beside [0]"
    )
    assert "at most one NetworkAuthentication" in str(admission.admit(lab.policy("p", network, network)))


def test_a_namespace_target_is_the_own_one_and_inherits_from_nothing() -> None:
    assert admission.admit(lab.policy(at=lab.target("Namespace", "shop"))) is None
    assert "own namespace shop" in str(admission.admit(lab.policy(at=lab.target("Namespace", "other"))))
    assert str(admission.admit(lab.policy(at=lab.target("Namespace", "shop"), inherit=False))).startswith("spec.inherit: expected true")


def test_identity_refs_are_accounts_and_namespaces() -> None:
    refs = [
        {"kind": "ServiceAccount", "name": "front"},
        {"kind": "ServiceAccount", "name": "x", "namespace": "b"},
        {"kind": "Namespace", "name": "ops"},
    ]
    found = model.read_mesh_tls_authentication(lab.mesh_tls(refs=refs))
    assert found.accounts == (("shop", "front"), ("b", "x"), ("ops", "*"))
    wrong = lab.mesh_tls(refs=[{"kind": "Namespace", "name": "ops", "namespace": "b"}])
    assert admission.admit(wrong) == 'spec.identityRefs[0].namespace: expected no namespace for a ref of kind Namespace, found "b"'


@pytest.mark.parametrize("pattern", ["spiffe://cluster.local/*", "spiffe://cluster.local/ns/shop/*", "spiffe://cluster.local/ns/shop/sa/*"])
def test_patterns_end_at_a_slash(pattern: str) -> None:
    assert admission.admit(lab.mesh_tls("m", pattern)) is None


def test_a_bare_address_is_a_network_of_one() -> None:
    found = model.read_network_authentication(lab.networks("n", "10.0.0.7", "fd00::1"))
    assert [network.cidr for network in found.networks] == ["10.0.0.7/32", "fd00::1/128"]


def test_kinds_of_others_are_of_no_interest() -> None:
    assert admission.parse_object({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}}) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([SERVER, POLICY, MESH, NETS, lab.route(), lab.pod(), lab.service(), lab.endpoints("a")]), st.data())
def test_any_object_is_understood_or_refused(raw: lab.Raw, data: st.DataObject) -> None:
    changed = deepcopy(raw)
    place: Any = changed
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(_JSON)
    try:
        admission.parse_object(changed)
    except InvalidObject as error:
        assert error.expected and str(error).count("expected")
