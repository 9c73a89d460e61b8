"""What a route of a Service says about where its requests go: backends with weights, what is changed on the way, how long it may take.

Decides which backendRefs and filters (policy.filters) can be done: a route with one that cannot is not attached, and its status says
which (``UnsupportedValue``); nothing of a route is skipped in silence. Whether a backend exists is policy.index's to say. Limits and
defaults are the CRD's (Gateway API 1.6). Pure. Called by policy.gateway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import msgspec

from core.k8s import fields
from core.k8s.fields import InvalidObject, Strict, shown
from policy import wire
from policy.durations import seconds_untrusted
from policy.filters import Filters, Unsupported, read_filters

_WEIGHT_MAX = 1_000_000
_ATTEMPTS_MAX = 100


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
    filters: Filters = Filters()


class RuleForwarding(msgspec.Struct, frozen=True):
    """Where the requests of a rule go."""

    references: tuple[Reference, ...]
    filters: Filters = Filters()
    timeouts: wire.Timeouts | None = None
    retry: wire.Retry | None = None


class Forwarding(msgspec.Struct, frozen=True):
    """What the route says to its Services. rules: one for each rule. unsupported: why it is not attached, "" when it is."""

    parents: tuple[ServiceParent, ...]
    rules: tuple[RuleForwarding, ...] = ()
    unsupported: str = ""


class _BackendRef(Strict, frozen=True):
    name: str
    group: str = ""
    kind: str = "Service"
    namespace: str | None = None
    port: int | None = None
    weight: int = 1
    filters: tuple[Any, ...] = ()


class _Timeouts(Strict, frozen=True):
    request: str = "0s"
    backend_request: str = "0s"


class _Retry(Strict, frozen=True):
    codes: Annotated[tuple[int, ...], msgspec.Meta(max_length=200)] = ()
    attempts: int = 1
    backoff: str = "25ms"


class _Rule(Protocol):
    @property
    def filters(self) -> tuple[Any, ...]: ...
    @property
    def backend_refs(self) -> tuple[Any, ...]: ...
    @property
    def matches(self) -> tuple[Any, ...]: ...


def read_forwarding(parents: tuple[ServiceParent, ...], rules: Sequence[_Rule], namespace: str) -> Forwarding:
    """Read what a route with these Services as parents does; raises InvalidObject for what contradicts the Gateway API."""
    read: list[RuleForwarding] = []
    try:
        for number, rule in enumerate(rules):
            where = f"spec.rules[{number}]"
            if getattr(rule, "session_persistence", None) is not None:
                raise Unsupported(f"{where}: sessionPersistence is not supported")
            if len(rule.backend_refs) > 16:
                raise InvalidObject(f"{where}.backendRefs", "at most 16 backends", f"{len(rule.backend_refs)}")
            references = tuple(
                _reference(f"{where}.backendRefs[{position}]", raw, namespace, rule.matches)
                for position, raw in enumerate(rule.backend_refs)
            )
            filters = read_filters(where, rule.filters, rule.matches)
            if filters.redirect is not None and references:
                raise InvalidObject(f"{where}.backendRefs", "nothing beside a RequestRedirect", f"{len(references)} backends")
            timeouts = _timeouts(f"{where}.timeouts", getattr(rule, "timeouts", None))
            retry = _retry(f"{where}.retry", getattr(rule, "retry", None))
            read.append(RuleForwarding(references, filters, timeouts, retry))
    except Unsupported as found:
        return Forwarding(parents, (), str(found))
    return Forwarding(parents, tuple(read))


def _reference(where: str, raw: object, namespace: str, matches: Sequence[Any]) -> Reference:
    ref = fields.read(raw, _BackendRef, where)
    if not 0 <= ref.weight <= _WEIGHT_MAX:
        raise InvalidObject(f"{where}.weight", f"0 to {_WEIGHT_MAX}", shown(ref.weight))
    if ref.port is not None and not 1 <= ref.port <= 65535:
        raise InvalidObject(f"{where}.port", "a port from 1 to 65535", shown(ref.port))
    name = fields.object_name(f"{where}.name", ref.name)
    filters = read_filters(where, ref.filters, matches, of_backend=True)
    return Reference(ref.namespace or namespace, name, ref.port, ref.weight, ref.group, ref.kind, filters)


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


def _retry(where: str, raw: object) -> wire.Retry | None:
    """Attempts and backoff that nobody names are ours to choose: one more, and 25 ms."""
    if raw is None:
        return None
    found = fields.read(raw, _Retry, where)
    for position, code in enumerate(found.codes):
        if not 400 <= code <= 599:
            raise InvalidObject(f"{where}.codes[{position}]", "a status from 400 to 599", shown(code))
    if len(set(found.codes)) < len(found.codes):
        raise InvalidObject(f"{where}.codes", "each status once", shown(found.codes))
    if found.attempts < 1:
        raise InvalidObject(f"{where}.attempts", "1 or more", shown(found.attempts))
    if found.attempts > _ATTEMPTS_MAX:
        raise Unsupported(f"{where}.attempts: more than {_ATTEMPTS_MAX} attempts are not supported")
    return wire.Retry(found.codes, found.attempts, seconds_untrusted(f"{where}.backoff", found.backoff))
