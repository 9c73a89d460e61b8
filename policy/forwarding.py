"""What a route of a Service says about where its requests go: backends with weights, and the header changes on the way. Pure.

Decides which backendRefs and filters can be done: a route with one that cannot is not attached, and its status says which
(``UnsupportedValue``); nothing of a route is skipped in silence. Whether a backend exists is policy.index's to say. Limits and defaults
are the CRD's (Gateway API 1.5). Called by policy.gateway.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import msgspec

from core.k8s import fields
from core.k8s.fields import InvalidObject, shown
from policy import wire
from policy.durations import seconds_untrusted

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]{1,256}")
_VALUE = re.compile(r"[\t\x20-\x7e]{1,4096}")
_HOSTNAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PATH = re.compile(r"([/A-Za-z0-9\-._~!$&'()*+,;=:@]|%[0-9A-Fa-f]{2}){0,1024}")
_REDIRECTS = (301, 302, 303, 307, 308)
_WEIGHT_MAX = 1_000_000
_FRAMING = frozenset(
    {"connection", "content-length", "expect", "host", "http2-settings", "keep-alive", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
"""Fields that say how a message is carried, or to whom: changing them would make two readings of one request."""


class ServiceParent(NamedTuple):
    """A Service as parentRef. port: number of the Service's port, section: its name; without both every port."""

    namespace: str
    name: str
    port: int | None
    section: str | None


class Reference(msgspec.Struct, frozen=True):
    """One backendRef. kind and group as given: other kinds than a Service are an unresolved reference, not an error."""

    namespace: str
    name: str
    port: int | None
    weight: int
    group: str
    kind: str
    edit: wire.FieldEdit | None = None


class RuleForwarding(msgspec.Struct, frozen=True):
    """Where the requests of a rule go."""

    references: tuple[Reference, ...]
    edit: wire.FieldEdit | None = None
    redirect: wire.Redirect | None = None
    timeouts: wire.Timeouts | None = None


class Forwarding(msgspec.Struct, frozen=True):
    """What the route says to its Services. rules: one for each rule. unsupported: why it is not attached, "" when it is."""

    parents: tuple[ServiceParent, ...]
    rules: tuple[RuleForwarding, ...] = ()
    unsupported: str = ""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    pass


class _BackendRef(_Strict, frozen=True):
    name: str
    group: str = ""
    kind: str = "Service"
    namespace: str | None = None
    port: int | None = None
    weight: int = 1
    filters: tuple[Any, ...] = ()


class _Field(_Strict, frozen=True):
    name: str
    value: str


_Fields = Annotated[tuple[_Field, ...], msgspec.Meta(max_length=16)]


class _Modifier(_Strict, frozen=True):
    set: _Fields = ()
    add: _Fields = ()
    remove: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)] = ()


class _RedirectPath(_Strict, frozen=True):
    type: str
    replace_full_path: str | None = None
    replace_prefix_match: str | None = None


class _Redirect(_Strict, frozen=True):
    scheme: str = ""
    hostname: str = ""
    path: _RedirectPath | None = None
    port: int | None = None
    status_code: int = 302


class _Filter(msgspec.Struct, frozen=True, rename="camel"):
    type: str
    request_header_modifier: _Modifier | None = None
    request_redirect: _Redirect | None = None


class _Timeouts(_Strict, frozen=True):
    request: str = "0s"
    backend_request: str = "0s"


class _Rule(Protocol):
    @property
    def filters(self) -> tuple[Any, ...]: ...
    @property
    def backend_refs(self) -> tuple[Any, ...]: ...
    @property
    def matches(self) -> tuple[Any, ...]: ...


class _Unsupported(Exception):
    """The text says what and where."""


def read_forwarding(parents: tuple[ServiceParent, ...], rules: Sequence[_Rule], namespace: str) -> Forwarding:
    """Read what a route with these Services as parents does; raises InvalidObject for what contradicts the Gateway API."""
    read: list[RuleForwarding] = []
    try:
        for number, rule in enumerate(rules):
            where = f"spec.rules[{number}]"
            for name in ("retry", "session_persistence"):
                if getattr(rule, name, None) is not None:
                    raise _Unsupported(f"{where}: {name.replace('session_p', 'sessionP')} is not supported")
            if len(rule.backend_refs) > 16:
                raise InvalidObject(f"{where}.backendRefs", "at most 16 backends", f"{len(rule.backend_refs)}")
            references = tuple(
                _reference(f"{where}.backendRefs[{position}]", raw, namespace) for position, raw in enumerate(rule.backend_refs)
            )
            redirect, others = _redirect(where, rule)
            timeouts = _timeouts(f"{where}.timeouts", getattr(rule, "timeouts", None))
            read.append(RuleForwarding(references, _edit(where, others), redirect, timeouts))
    except _Unsupported as found:
        return Forwarding(parents, (), str(found))
    return Forwarding(parents, tuple(read))


def _reference(where: str, raw: object, namespace: str) -> Reference:
    ref = fields.read(raw, _BackendRef, where)
    if not 0 <= ref.weight <= _WEIGHT_MAX:
        raise InvalidObject(f"{where}.weight", f"0 to {_WEIGHT_MAX}", shown(ref.weight))
    if ref.port is not None and not 1 <= ref.port <= 65535:
        raise InvalidObject(f"{where}.port", "a port from 1 to 65535", shown(ref.port))
    name = fields.object_name(f"{where}.name", ref.name)
    return Reference(ref.namespace or namespace, name, ref.port, ref.weight, ref.group, ref.kind, _edit(where, ref.filters))


def _timeouts(where: str, raw: object) -> wire.Timeouts | None:
    """0 means none, as a field that is absent does."""
    if raw is None:
        return None
    found = fields.read(raw, _Timeouts, where)
    request = seconds_untrusted(f"{where}.request", found.request)
    attempt = seconds_untrusted(f"{where}.backendRequest", found.backend_request)
    if 0 < request < attempt:
        raise InvalidObject(f"{where}.backendRequest", "no more time than for the whole request", shown(found.backend_request))
    return wire.Timeouts(request, attempt) if request or attempt else None


def _redirect(where: str, rule: _Rule) -> tuple[wire.Redirect | None, list[Any]]:
    """The redirect among a rule's filters, and the other filters (None in its place)."""
    others: list[Any] = list(rule.filters)
    redirect: wire.Redirect | None = None
    for position, raw in enumerate(rule.filters):
        place = f"{where}.filters[{position}]"
        found = fields.read(raw, _Filter, place)
        if found.type != "RequestRedirect":
            continue
        if found.request_redirect is None:
            raise InvalidObject(f"{place}.requestRedirect", "a value", "nothing")
        if redirect is not None or rule.backend_refs:
            raise InvalidObject(place, "one RequestRedirect, and no backendRefs beside it", "more")
        redirect = _read_redirect(f"{place}.requestRedirect", found.request_redirect, rule)
        others[position] = None
    return redirect, others


def _read_redirect(where: str, redirect: _Redirect, rule: _Rule) -> wire.Redirect:
    if redirect.scheme not in ("", "http", "https"):
        raise _Unsupported(f"{where}.scheme: {shown(redirect.scheme)} is not supported")
    if redirect.status_code not in _REDIRECTS:
        raise _Unsupported(f"{where}.statusCode: {redirect.status_code} is not supported")
    if redirect.hostname and not _HOSTNAME.fullmatch(redirect.hostname):
        raise InvalidObject(f"{where}.hostname", "a host name in lower case, without wildcard", shown(redirect.hostname))
    if redirect.port is not None and not 1 <= redirect.port <= 65535:
        raise InvalidObject(f"{where}.port", "a port from 1 to 65535", shown(redirect.port))
    path, prefix = _read_redirect_path(f"{where}.path", redirect.path, rule) if redirect.path is not None else (None, None)
    return wire.Redirect(redirect.status_code, redirect.scheme, redirect.hostname, redirect.port, path, prefix)


def _read_redirect_path(where: str, path: _RedirectPath, rule: _Rule) -> tuple[str, str | None]:
    full = path.type == "ReplaceFullPath"
    if not full and path.type != "ReplacePrefixMatch":
        raise _Unsupported(f"{where}.type: {shown(path.type)} is not supported")
    value = path.replace_full_path if full else path.replace_prefix_match
    if value is None or not _PATH.fullmatch(value):
        raise InvalidObject(where, f"a path of at most 1024 characters of a URI for {path.type}", shown(value))
    if full:
        return value, None
    matches = [getattr(match, "path", None) for match in rule.matches]
    if len(matches) > 1 or any(match is None or match.type != "PathPrefix" for match in matches):
        raise InvalidObject(where, "ReplacePrefixMatch beside exactly one match, of type PathPrefix", f"{len(matches)} matches")
    return value, next((match.value for match in matches if match is not None), "/")


def _edit(where: str, filters: Sequence[Any]) -> wire.FieldEdit | None:
    """The header changes of a list of filters; there is at most one of each type."""
    edit: wire.FieldEdit | None = None
    for position, raw in enumerate(filters):
        if raw is None:
            continue
        place = f"{where}.filters[{position}]"
        found = fields.read(raw, _Filter, place)
        if found.type != "RequestHeaderModifier":
            raise _Unsupported(f"{place}: filter {shown(found.type)} is not supported on a route of a Service")
        if found.request_header_modifier is None:
            raise InvalidObject(f"{place}.requestHeaderModifier", "a value", "nothing")
        if edit is not None:
            raise InvalidObject(place, "one RequestHeaderModifier at most", "a second one")
        edit = _modifier(f"{place}.requestHeaderModifier", found.request_header_modifier)
    return edit


def _modifier(where: str, modifier: _Modifier) -> wire.FieldEdit:
    replaced = [(_name(f"{where}.set[{n}]", entry.name), _text(f"{where}.set[{n}]", entry.value)) for n, entry in enumerate(modifier.set)]
    added = [(_name(f"{where}.add[{n}]", entry.name), _text(f"{where}.add[{n}]", entry.value)) for n, entry in enumerate(modifier.add)]
    removed = [_name(f"{where}.remove[{n}]", name) for n, name in enumerate(modifier.remove)]
    names = [*(name for name, _ in (*replaced, *added)), *removed]
    for name in names:
        if name in _FRAMING:
            raise _Unsupported(f"{where}: {name} says how a request is carried and cannot be changed")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidObject(where, "one change for each header", f"more for {twice}")
    return wire.FieldEdit((*removed, *(name for name, _ in replaced)), (*replaced, *added))


def _name(where: str, name: str) -> str:
    lower = name.lower()
    if not _TOKEN.fullmatch(lower):
        raise InvalidObject(f"{where}.name", "a token of at most 256 characters", shown(name))
    return lower


def _text(where: str, value: str) -> str:
    if not _VALUE.fullmatch(value) or value != value.strip(" \t"):
        raise InvalidObject(f"{where}.value", "1 to 4096 printable ASCII characters without spaces at the ends", shown(value))
    return value
