"""HTTPRoute and GRPCRoute of ``gateway.networking.k8s.io/v1`` whose parent is a Server or a Service: from an untrusted dict to rules.

Decides what a route matches and what of it cannot be done; who may use it, and where it leads, is policy.index's to say. A route without
such a parent is none of ours: it is read only far enough to know that. Pure.

Three outcomes. *Refused* (InvalidObject): the object contradicts the Gateway API's own rules. *Unsupported*: a valid route with a field
that has no meaning in front of an app (filters, timeouts, ...); it stays attached but lets nobody in, because a route that was ignored
would leave its requests to the wider rules of the Server; to a Service it is not attached at all (policy.forwarding). *Good*. Limits and
defaults are the CRD's (Gateway API 1.5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from core.k8s import fields
from core.k8s.fields import InvalidObject, Raw, Strict, one_of, shown
from core.k8s.objects import ObjectMeta
from core.refs import Ref
from policy import paths, patterns, wire
from policy.forwarding import Forwarding, ServiceParent, read_forwarding
from policy.model import GATEWAY_GROUP, GROUP, read_spec

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_PATH_TYPES = ("Exact", "PathPrefix", "RegularExpression")
_VALUE_TYPES = ("Exact", "RegularExpression")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
_HOSTNAME = re.compile(r"(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_IPV4 = re.compile(r"[0-9]+(\.[0-9]+){3}")
_GRPC_SERVICE = re.compile(r"[A-Za-z_][A-Za-z_0-9]*(\.[A-Za-z_][A-Za-z_0-9]*)*")
_GRPC_METHOD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_MATCHES_MAX = 128  # of all rules of one route


class InboundRoute(msgspec.Struct, frozen=True):
    """A route as far as Servers and Services are concerned.

    servers: names of the Servers, all in the route's own namespace, it wants to attach to. unattachable: a sentence for every parent
    that is a Server but cannot be attached to. unsupported: why the route lets nobody in, "" when it is good. forwarding: what it says
    about the Services among its parents, None when there are none. mistaken: a sentence for every parent that looks like one of ours and
    is none, by its group.
    """

    metadata: ObjectMeta
    kind: Literal["http", "grpc"]
    servers: tuple[str, ...] = ()
    unattachable: tuple[str, ...] = ()
    hostnames: tuple[str, ...] = ()
    rules: tuple[wire.Rule, ...] = ()
    unsupported: str = ""
    forwarding: Forwarding | None = None
    mistaken: tuple[str, ...] = ()

    @property
    def ref(self) -> Ref:
        """gateway.networking.k8s.io/HTTPRoute or GRPCRoute."""
        return Ref(GATEWAY_GROUP, "HTTPRoute" if self.kind == "http" else "GRPCRoute", self.metadata.namespace, self.metadata.name)


class _Parent(Strict, frozen=True):
    name: str
    group: str = GATEWAY_GROUP
    kind: str = "Gateway"
    namespace: str | None = None
    section_name: str | None = None
    port: int | None = None


class _Path(Strict, frozen=True):
    type: str = "PathPrefix"
    value: str = "/"


class _Value(Strict, frozen=True):
    name: str
    value: str
    type: str = "Exact"


_Values = Annotated[tuple[_Value, ...], msgspec.Meta(max_length=16)]


class _HttpMatch(Strict, frozen=True):
    path: _Path = _Path()
    headers: _Values = ()
    query_params: _Values = ()
    method: str | None = None


class _GrpcMethod(Strict, frozen=True):
    type: str = "Exact"
    service: str = ""
    method: str = ""


class _GrpcMatch(Strict, frozen=True):
    method: _GrpcMethod | None = None
    headers: _Values = ()


class _HttpRule(Strict, frozen=True):
    name: str | None = None
    matches: Annotated[tuple[_HttpMatch, ...], msgspec.Meta(max_length=64)] = ()
    filters: tuple[Any, ...] = ()
    backend_refs: tuple[Any, ...] = ()
    timeouts: Any = None
    retry: Any = None
    session_persistence: Any = None


class _GrpcRule(Strict, frozen=True):
    name: str | None = None
    matches: Annotated[tuple[_GrpcMatch, ...], msgspec.Meta(max_length=64)] = ()
    filters: tuple[Any, ...] = ()
    backend_refs: tuple[Any, ...] = ()
    session_persistence: Any = None


_Parents = Annotated[tuple[_Parent, ...], msgspec.Meta(max_length=32)]
_Hostnames = Annotated[tuple[str, ...], msgspec.Meta(max_length=16)]


class _AnySpec(msgspec.Struct, frozen=True, rename="camel"):
    parent_refs: _Parents = ()


class _HttpSpec(Strict, frozen=True):
    parent_refs: _Parents = ()
    hostnames: _Hostnames = ()
    rules: Annotated[tuple[_HttpRule, ...], msgspec.Meta(max_length=16)] = (_HttpRule(),)
    use_default_gateways: str | None = None


class _GrpcSpec(Strict, frozen=True):
    parent_refs: _Parents = ()
    hostnames: _Hostnames = ()
    rules: Annotated[tuple[_GrpcRule, ...], msgspec.Meta(max_length=16)] = (_GrpcRule(),)
    use_default_gateways: str | None = None


def read_http_route(raw: Raw) -> InboundRoute:
    """Read an HTTPRoute; raises InvalidObject."""
    return _read(raw, "http", _HttpSpec, _http_match)


def read_grpc_route(raw: Raw) -> InboundRoute:
    """Read a GRPCRoute; raises InvalidObject."""
    return _read(raw, "grpc", _GrpcSpec, _grpc_match)


_Spec = TypeVar("_Spec", _HttpSpec, _GrpcSpec)
_ReadMatch = Callable[[str, Any], wire.HttpMatch | wire.GrpcMatch]


def _read(
    raw: Raw, kind: Literal["http", "grpc"], spec_type: type[_Spec], match: Callable[[str, Any], wire.HttpMatch | wire.GrpcMatch]
) -> InboundRoute:
    meta, spec = read_spec(raw)
    parents = fields.read(spec, _AnySpec, "spec").parent_refs
    services = service_parents(parents, meta.namespace)
    mistaken = tuple(_mistaken(parents))
    if not services and not any(_is_server(parent) for parent in parents):
        return InboundRoute(meta, kind, mistaken=mistaken)
    servers, unattachable = _attachments(parents, meta.namespace)
    try:
        checked = fields.read(spec, spec_type, "spec")
        return _understood(InboundRoute(meta, kind, servers, unattachable, mistaken=mistaken), parents, services, checked, match)
    except InvalidObject as error:
        # It was meant to narrow who may do what; without it the Server's own, wider policies would decide about its requests.
        error.instead = InboundRoute(meta, kind, servers, unattachable, unsupported=str(error))
        raise


def _understood(
    route: InboundRoute,
    parents: Sequence[_Parent],
    services: tuple[ServiceParent, ...],
    checked: _Spec,
    match: Callable[[str, Any], wire.HttpMatch | wire.GrpcMatch],
) -> InboundRoute:
    if sum(len(rule.matches) for rule in checked.rules) > _MATCHES_MAX:
        raise InvalidObject("spec.rules", f"at most {_MATCHES_MAX} matches in all", "more")
    rules = tuple(_rule(f"spec.rules[{number}]", rule, match) for number, rule in enumerate(checked.rules))
    hostnames = tuple(_hostname(f"spec.hostnames[{number}]", name) for number, name in enumerate(checked.hostnames))
    only_servers = all(_is_server(parent) for parent in parents)
    unsupported = next((found for n, rule in enumerate(checked.rules) if (found := _unsupported(n, rule, only_servers))), "")
    forwarding = read_forwarding(services, checked.rules, route.metadata.namespace) if services else None
    return msgspec.structs.replace(route, hostnames=hostnames, rules=rules, unsupported=unsupported, forwarding=forwarding)


def service_parents(parents: Sequence[_Parent], namespace: str) -> tuple[ServiceParent, ...]:
    """The Services among the parents."""
    return tuple(
        ServiceParent(parent.namespace or namespace, parent.name, parent.port, parent.section_name)
        for parent in parents
        if (parent.group, parent.kind) == ("", "Service")
    )


def _is_server(parent: _Parent) -> bool:
    return (parent.group, parent.kind) == (GROUP, "Server")


def _mistaken(parents: Sequence[_Parent]) -> Iterator[str]:
    """The group of a parent is the Gateway API's when none is given, which surprises whoever writes ``kind: Service`` alone."""
    for number, parent in enumerate(parents):
        group = {"Service": "", "Server": GROUP}.get(parent.kind, parent.group)
        if parent.group != group:
            default = ", the one when none is given" if parent.group == GATEWAY_GROUP else ""
            found = f"no {parent.kind} is in the group {shown(parent.group)}{default}"
            yield f"spec.parentRefs[{number}]: {found}; write group: {shown(group)}"


def _attachments(parents: Sequence[_Parent], namespace: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    servers: list[str] = []
    problems: list[str] = []
    for number, parent in enumerate(parents):
        where = f"spec.parentRefs[{number}]"
        if not _is_server(parent):
            continue
        if parent.namespace not in (None, namespace):
            problems.append(f"{where}.namespace: a Server is a parent only in its own namespace {namespace}, found {parent.namespace}")
        elif parent.port is not None or parent.section_name is not None:
            problems.append(f"{where}: a Server has one port, so port and sectionName name nothing")
        elif parent.name not in servers:
            servers.append(fields.object_name(f"{where}.name", parent.name))
    return tuple(servers), tuple(problems)


def _unsupported(number: int, rule: _HttpRule | _GrpcRule, only_servers: bool) -> str:
    where = f"spec.rules[{number}]"
    for position, entry in enumerate(rule.filters):
        name = entry.get("type") if isinstance(entry, dict) else entry
        return f"{where}.filters[{position}]: filter {shown(name)} is not supported on a route of a Server"
    present = [name for name in ("timeouts", "retry", "session_persistence") if getattr(rule, name, None) is not None]
    if only_servers and rule.backend_refs:  # beside a Service they are meant for that parent
        present.append("backendRefs")
    return f"{where}: {', '.join(present)} not supported on a route of a Server" if present else ""


def _rule(where: str, rule: _HttpRule | _GrpcRule, match: _ReadMatch) -> wire.Rule:
    return wire.Rule(tuple(match(f"{where}.matches[{n}]", entry) for n, entry in enumerate(rule.matches)), rule.name)


def _http_match(where: str, match: _HttpMatch) -> wire.HttpMatch:
    if match.method is not None:
        one_of(f"{where}.method", match.method, _METHODS)
    query: dict[str, wire.ValueMatch] = {}
    for number, entry in enumerate(match.query_params):
        query.setdefault(entry.name, _value(f"{where}.queryParams[{number}]", entry, entry.name))
    return wire.HttpMatch(_path(f"{where}.path", match.path), _headers(where, match.headers), tuple(query.values()), match.method)


def _path(where: str, path: _Path) -> wire.PathMatch:
    type_ = one_of(f"{where}.type", path.type, _PATH_TYPES)
    if type_ == "RegularExpression":
        _pattern(f"{where}.value", path.value)
        return wire.PathMatch("RegularExpression", path.value)
    if len(path.value) > 1024:
        raise InvalidObject(f"{where}.value", "at most 1024 characters", f"{len(path.value)}")
    try:
        value = paths.normal_path(path.value)
    except paths.AmbiguousPath as error:
        raise InvalidObject(f"{where}.value", f"a path with one reading ({error.reason})", shown(path.value)) from None
    return wire.PathMatch("Exact" if type_ == "Exact" else "PathPrefix", value)


def _headers(where: str, entries: Sequence[_Value]) -> tuple[wire.ValueMatch, ...]:
    """Names in lower case; of a repeated name the first entry counts (HTTPHeaderMatch.name)."""
    headers: dict[str, wire.ValueMatch] = {}
    for number, entry in enumerate(entries):
        name = entry.name.lower()
        headers.setdefault(name, _value(f"{where}.headers[{number}]", entry, name))
    return tuple(headers.values())


def _value(where: str, entry: _Value, name: str) -> wire.ValueMatch:
    if not _TOKEN.fullmatch(entry.name):
        raise InvalidObject(f"{where}.name", "a token of at most 256 characters", shown(entry.name))
    if not 1 <= len(entry.value) <= patterns.MAX_PATTERN_CHARS:
        raise InvalidObject(f"{where}.value", f"1 to {patterns.MAX_PATTERN_CHARS} characters", f"{len(entry.value)}")
    if one_of(f"{where}.type", entry.type, _VALUE_TYPES) == "Exact":
        return wire.ValueMatch("Exact", name, entry.value)
    _pattern(f"{where}.value", entry.value)
    return wire.ValueMatch("RegularExpression", name, entry.value)


def _pattern(where: str, value: str) -> None:
    """What is admitted must compile in every sidecar."""
    try:
        patterns.compile_pattern(value)
    except patterns.InvalidPattern as error:
        raise InvalidObject(where, f"a regular expression in RE2 syntax ({error})", shown(value)) from None


def _grpc_match(where: str, match: _GrpcMatch) -> wire.GrpcMatch:
    headers = _headers(where, match.headers)
    if match.method is None:
        return wire.GrpcMatch(headers=headers)
    service, method = match.method.service or None, match.method.method or None
    if service is None and method is None:
        raise InvalidObject(f"{where}.method", "a service, a method or both", "neither")
    regular = one_of(f"{where}.method.type", match.method.type, _VALUE_TYPES) == "RegularExpression"
    for field, value, name in (("service", service, _GRPC_SERVICE), ("method", method, _GRPC_METHOD)):
        if value is None:
            continue
        if regular:
            _pattern(f"{where}.method.{field}", value)
        elif len(value) > 1024 or not name.fullmatch(value):
            raise InvalidObject(f"{where}.method.{field}", f"the name of a gRPC {field}", shown(value))
    return wire.GrpcMatch("RegularExpression" if regular else "Exact", service, method, headers)


def _hostname(where: str, name: str) -> str:
    lower = name.lower()
    if len(lower) > 253 or not _HOSTNAME.fullmatch(lower) or _IPV4.fullmatch(lower):
        raise InvalidObject(where, "a host name, optionally with the first label *", shown(name))
    return lower
