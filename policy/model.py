"""The four kinds of ``policy.pillion.dev/v1alpha1`` as values: from an untrusted dict to a checked object, or a refusal with its place.

Decides what a well-formed policy object is, and nothing about other objects: whether a reference resolves is policy.index's to say.
Admission constructs these same values, so what was admitted is what is understood. An unknown field in ``spec`` or at the top is
refused (as ``kubectl apply --validate=strict`` does): a misspelt field of a security object must not be dropped in silence. Fields of
``metadata`` and ``status`` that nobody here reads are skipped. Pure.

Kinds and defaults follow Linkerd's Server v1beta3, AuthorizationPolicy, MeshTLSAuthentication and NetworkAuthentication; the differences
are ``AuthorizationPolicy.spec.inherit`` and identities that are SPIFFE URIs.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

import msgspec

from core.k8s import fields
from core.k8s.fields import InvalidObject, Raw, Strict, one_of, shown
from core.k8s.objects import ObjectMeta, read_meta
from core.k8s.selector import LabelSelector, read_selector
from core.names import InvalidName, parse_workload_id
from core.refs import Ref
from policy import wire

GROUP = "policy.pillion.dev"
VERSION = "v1alpha1"
GATEWAY_GROUP = "gateway.networking.k8s.io"

ACCESS_POLICIES = ("deny", "audit", "all-unauthenticated", "all-authenticated", "cluster-unauthenticated", "cluster-authenticated")
"""Values of Server.spec.accessPolicy and of the annotation ``config.pillion.dev/default-inbound-policy``."""

PROXY_PROTOCOLS: dict[str, wire.Protocol] = {
    "unknown": "detect",
    "HTTP/1": "http1",
    "HTTP/2": "http2",
    "gRPC": "grpc",
    "opaque": "opaque",
    "TLS": "tls",
}

_TARGETS = {("", "Namespace"), (GROUP, "Server"), (GATEWAY_GROUP, "HTTPRoute"), (GATEWAY_GROUP, "GRPCRoute")}
_IDENTITY_KINDS = {("", "ServiceAccount"), (GROUP, "MeshTLSAuthentication")}
_LIST_MAX = 1024  # entries of one list in one object; etcd's 1.5 MiB per object would allow some 20,000


class Server(msgspec.Struct, frozen=True):
    """A port of some pods of its namespace, and who may use it when no AuthorizationPolicy says more.

    port: number, or name of a container port. access: one of ACCESS_POLICIES.
    """

    metadata: ObjectMeta
    pod_selector: LabelSelector
    port: int | str
    protocol: wire.Protocol
    access: str

    @property
    def ref(self) -> Ref:
        """policy.pillion.dev/Server."""
        return Ref(GROUP, "Server", self.metadata.namespace, self.metadata.name)


class AuthorizationPolicy(msgspec.Struct, frozen=True):
    """Lets in, at ``target``, whoever meets all of ``required`` (none: everybody).

    target: a Server, HTTPRoute or GRPCRoute of its own namespace, or that Namespace. inherit: False on a route's policy means that
    only the route's own policies count; on a Server's policy that those of the Namespace do not.
    """

    metadata: ObjectMeta
    target: Ref
    required: tuple[Ref, ...]
    inherit: bool

    @property
    def ref(self) -> Ref:
        """policy.pillion.dev/AuthorizationPolicy."""
        return Ref(GROUP, "AuthorizationPolicy", self.metadata.namespace, self.metadata.name)


class MeshTLSAuthentication(msgspec.Struct, frozen=True):
    """A set of workload identities: either URIs and patterns, or service accounts and namespaces (``accounts``, name "*" = all)."""

    metadata: ObjectMeta
    identities: tuple[str, ...]
    accounts: tuple[tuple[str, str], ...]

    @property
    def ref(self) -> Ref:
        """policy.pillion.dev/MeshTLSAuthentication."""
        return Ref(GROUP, "MeshTLSAuthentication", self.metadata.namespace, self.metadata.name)


class NetworkAuthentication(msgspec.Struct, frozen=True):
    """A set of networks that clients may come from."""

    metadata: ObjectMeta
    networks: tuple[wire.Network, ...]

    @property
    def ref(self) -> Ref:
        """policy.pillion.dev/NetworkAuthentication."""
        return Ref(GROUP, "NetworkAuthentication", self.metadata.namespace, self.metadata.name)


class _Envelope(Strict, frozen=True):
    api_version: str
    kind: str
    metadata: msgspec.Raw | Any
    spec: Any
    status: Any = None


class _ServerSpec(Strict, frozen=True):
    pod_selector: Any
    port: int | str
    proxy_protocol: str = "unknown"
    access_policy: str = "deny"


class _RefSpec(Strict, frozen=True):
    kind: str
    name: str
    group: str = ""
    namespace: str | None = None


class _AuthorizationPolicySpec(Strict, frozen=True):
    target_ref: _RefSpec
    required_authentication_refs: tuple[_RefSpec, ...]
    inherit: bool = True


class _AccountSpec(Strict, frozen=True):
    kind: str
    name: str
    group: str = ""
    namespace: str | None = None


_SomeStrings = Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=_LIST_MAX)]
_SomeAccounts = Annotated[tuple[_AccountSpec, ...], msgspec.Meta(min_length=1, max_length=_LIST_MAX)]


class _MeshTLSSpec(Strict, frozen=True):
    identities: _SomeStrings | None = None
    identity_refs: _SomeAccounts | None = None


class _NetworkSpec(Strict, frozen=True):
    cidr: str
    except_: tuple[str, ...] = msgspec.field(default=(), name="except")


class _NetworksSpec(Strict, frozen=True):
    networks: Annotated[tuple[_NetworkSpec, ...], msgspec.Meta(min_length=1, max_length=_LIST_MAX)]


def read_spec(raw: Raw) -> tuple[ObjectMeta, Any]:
    """metadata and spec of an object with no field that its kind does not have; raises InvalidObject."""
    envelope = fields.read(raw, _Envelope)
    meta = read_meta(raw)
    if not isinstance(envelope.spec, dict):
        raise InvalidObject("spec", "an object", shown(envelope.spec))
    return meta, envelope.spec


def read_server(raw: Raw) -> Server:
    """Read a Server; raises InvalidObject."""
    meta, spec = read_spec(raw)
    checked = fields.read(spec, _ServerSpec, "spec")
    port = checked.port
    if isinstance(port, int) and not 1 <= port <= 65535:
        raise InvalidObject("spec.port", "a port from 1 to 65535 or the name of a container port", shown(port))
    if isinstance(port, str) and (not 1 <= len(port) <= 63 or port.isdigit()):
        raise InvalidObject("spec.port", "a port from 1 to 65535 or the name of a container port", shown(port))
    one_of("spec.proxyProtocol", checked.proxy_protocol, PROXY_PROTOCOLS)
    return Server(
        meta,
        read_selector(checked.pod_selector, "spec.podSelector"),
        port,
        PROXY_PROTOCOLS[checked.proxy_protocol],
        one_of("spec.accessPolicy", checked.access_policy, ACCESS_POLICIES),
    )


def read_authorization_policy(raw: Raw) -> AuthorizationPolicy:
    """Read an AuthorizationPolicy; raises InvalidObject."""
    meta, spec = read_spec(raw)
    checked = fields.read(spec, _AuthorizationPolicySpec, "spec")
    target = _target(checked.target_ref, meta.namespace)
    if not checked.inherit and target.kind == "Namespace":
        raise InvalidObject("spec.inherit", "true for a policy that targets a Namespace (there is nothing above it)", "false")
    required: list[Ref] = []
    seen: dict[str, int] = {}
    for number, ref in enumerate(checked.required_authentication_refs):
        where = f"spec.requiredAuthenticationRefs[{number}]"
        if (ref.group, ref.kind) in _IDENTITY_KINDS:
            sort = "MeshTLSAuthentication or ServiceAccount"
        elif (ref.group, ref.kind) == (GROUP, "NetworkAuthentication"):
            sort = "NetworkAuthentication"
        else:
            raise InvalidObject(where, _options(_IDENTITY_KINDS | {(GROUP, "NetworkAuthentication")}), shown(_named(ref)))
        if sort in seen:
            raise InvalidObject(where, f"at most one {sort} (all refs must hold at once)", f"a second one beside [{seen[sort]}]")
        seen[sort] = number
        required.append(_ref(ref, where, ref.namespace or meta.namespace))
    return AuthorizationPolicy(meta, target, tuple(required), checked.inherit)


def _target(ref: _RefSpec, namespace: str) -> Ref:
    where = "spec.targetRef"
    if (ref.group, ref.kind) not in _TARGETS:
        raise InvalidObject(where, _options(_TARGETS), shown(_named(ref)))
    if ref.namespace not in (None, namespace):
        raise InvalidObject(f"{where}.namespace", f"the policy's own namespace {namespace}", shown(ref.namespace))
    if ref.kind != "Namespace":
        return _ref(ref, where, namespace)
    if ref.name != namespace:
        raise InvalidObject(f"{where}.name", f"the policy's own namespace {namespace}", shown(ref.name))
    return Ref("", "Namespace", "", namespace)


def _ref(ref: _RefSpec, where: str, namespace: str) -> Ref:
    fields.object_name(f"{where}.namespace", namespace)
    return Ref(ref.group, ref.kind, namespace, fields.object_name(f"{where}.name", ref.name))


def _named(ref: _RefSpec | _AccountSpec) -> str:
    return f"{ref.kind}.{ref.group}" if ref.group else ref.kind


def _options(kinds: set[tuple[str, str]]) -> str:
    return "one of " + ", ".join(sorted(f"{kind}.{group}" if group else kind for group, kind in kinds))


def read_mesh_tls_authentication(raw: Raw) -> MeshTLSAuthentication:
    """Read a MeshTLSAuthentication; raises InvalidObject."""
    meta, spec = read_spec(raw)
    checked = fields.read(spec, _MeshTLSSpec, "spec")
    if (checked.identities is None) == (checked.identity_refs is None):
        found = "neither" if checked.identities is None else "both"
        raise InvalidObject("spec", "either identities or identityRefs", found)
    identities = tuple(_identity(f"spec.identities[{n}]", text) for n, text in enumerate(checked.identities or ()))
    accounts = tuple(_account(f"spec.identityRefs[{n}]", ref, meta.namespace) for n, ref in enumerate(checked.identity_refs or ()))
    return MeshTLSAuthentication(meta, identities, accounts)


def _identity(where: str, text: str) -> str:
    try:
        if text == "*" or (text.endswith("/*") and _is_prefix(text.removesuffix("/*").split("/"))):
            return text
        return parse_workload_id(text).uri
    except InvalidName:
        expected = '"*", a SPIFFE URI (spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>), or one cut at a slash and ended with *'
        raise InvalidObject(where, expected, shown(text)) from None


def _is_prefix(parts: list[str]) -> bool:
    """``spiffe://td``, ``spiffe://td/ns/x`` or ``spiffe://td/ns/x/sa``, each with names that an identity can have; else InvalidName."""
    whole = parts + ["", "ns", "x", "sa", "x"][len(parts) - 2 :]
    parse_workload_id("/".join(whole[:7]))
    return len(parts) in (3, 5, 6)


def _account(where: str, ref: _AccountSpec, namespace: str) -> tuple[str, str]:
    if ref.group or ref.kind not in ("ServiceAccount", "Namespace"):
        raise InvalidObject(where, "one of Namespace, ServiceAccount", shown(_named(ref)))
    name = fields.object_name(f"{where}.name", ref.name)
    if ref.kind == "ServiceAccount":
        return fields.object_name(f"{where}.namespace", ref.namespace or namespace), name
    if ref.namespace is not None:
        raise InvalidObject(f"{where}.namespace", "no namespace for a ref of kind Namespace", shown(ref.namespace))
    return name, "*"


def read_network_authentication(raw: Raw) -> NetworkAuthentication:
    """Read a NetworkAuthentication; raises InvalidObject."""
    meta, spec = read_spec(raw)
    checked = fields.read(spec, _NetworksSpec, "spec")
    networks: list[wire.Network] = []
    for number, entry in enumerate(checked.networks):
        where = f"spec.networks[{number}]"
        network = _network(f"{where}.cidr", entry.cidr)
        excluded = []
        for position, text in enumerate(entry.except_):
            inner = _network(f"{where}.except[{position}]", text)
            if inner.version != network.version or inner == network or not inner.subnet_of(network):  # type: ignore[arg-type]
                raise InvalidObject(f"{where}.except[{position}]", f"a network inside {network} and smaller than it", shown(text))
            excluded.append(str(inner))
        networks.append(wire.Network(str(network), tuple(excluded)))
    return NetworkAuthentication(meta, tuple(networks))


def _network(where: str, text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise InvalidObject(where, "an IP address or a CIDR", shown(text)) from None
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise InvalidObject(where, "IPv4 spelt as IPv4 (clients in IPv4-mapped IPv6 are compared as IPv4)", shown(text))
    if "/" in text and ipaddress.ip_address(text.partition("/")[0]) != network.network_address:
        raise InvalidObject(where, f"a network address such as {network}", shown(text))
    return network
