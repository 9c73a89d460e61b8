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

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]{1,256}")
_VALUE = re.compile(r"[\t\x20-\x7e]{1,4096}")
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


class _Filter(msgspec.Struct, frozen=True, rename="camel"):
    type: str
    request_header_modifier: _Modifier | None = None


class _Rule(Protocol):
    @property
    def filters(self) -> tuple[Any, ...]: ...
    @property
    def backend_refs(self) -> tuple[Any, ...]: ...


class _Unsupported(Exception):
    """The text says what and where."""


def read_forwarding(parents: tuple[ServiceParent, ...], rules: Sequence[_Rule], namespace: str) -> Forwarding:
    """Read what a route with these Services as parents does; raises InvalidObject for what contradicts the Gateway API."""
    read: list[RuleForwarding] = []
    try:
        for number, rule in enumerate(rules):
            where = f"spec.rules[{number}]"
            for name in ("timeouts", "retry", "session_persistence"):
                if getattr(rule, name, None) is not None:
                    raise _Unsupported(f"{where}: {name.replace('session_p', 'sessionP')} is not supported")
            if len(rule.backend_refs) > 16:
                raise InvalidObject(f"{where}.backendRefs", "at most 16 backends", f"{len(rule.backend_refs)}")
            references = tuple(
                _reference(f"{where}.backendRefs[{position}]", raw, namespace) for position, raw in enumerate(rule.backend_refs)
            )
            read.append(RuleForwarding(references, _edit(where, rule.filters)))
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


def _edit(where: str, filters: Sequence[Any]) -> wire.FieldEdit | None:
    """The header changes of a list of filters; there is at most one of each type."""
    edit: wire.FieldEdit | None = None
    for position, raw in enumerate(filters):
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
