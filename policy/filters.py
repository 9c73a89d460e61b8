"""The filters of a rule and of a backendRef: header changes of requests and responses, URLRewrite, RequestRedirect. Pure.

A filter that cannot be done raises `Unsupported`, which costs the route its Services; what contradicts the Gateway API raises
InvalidObject. Nothing is skipped in silence. Limits and defaults are the CRD's (Gateway API 1.6). Called by policy.forwarding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from core.k8s import fields
from core.k8s.fields import InvalidObject, Strict, shown
from policy import wire

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]{1,256}")
_VALUE = re.compile(r"[\t\x20-\x7e]{1,4096}")
_HOSTNAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PATH = re.compile(r"([/A-Za-z0-9\-._~!$&'()*+,;=:@]|%[0-9A-Fa-f]{2}){0,1024}")
_REDIRECTS = (301, 302, 303, 307, 308)
_FRAMING = frozenset(
    {"connection", "content-length", "expect", "host", "http2-settings", "keep-alive", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
"""Fields that say how a message is carried, or to whom: changing them would make two readings of one message."""
_OURS = frozenset({"grpc-status", "pillion-proxy-error"})
"""Fields of a response that sidecars read themselves."""


class Filters(msgspec.Struct, frozen=True):
    """What the filters of one rule or backendRef do; at most one of each type."""

    request: wire.FieldEdit | None = None
    response: wire.FieldEdit | None = None
    rewrite: wire.Rewrite | None = None
    redirect: wire.Redirect | None = None


class Unsupported(Exception):
    """The text says what and where."""


class _Field(Strict, frozen=True):
    name: str
    value: str


_Fields = Annotated[tuple[_Field, ...], msgspec.Meta(max_length=16)]


class _Modifier(Strict, frozen=True):
    set: _Fields = ()
    add: _Fields = ()
    remove: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)] = ()


class _PathModifier(Strict, frozen=True):
    type: str
    replace_full_path: str | None = None
    replace_prefix_match: str | None = None


class _Redirect(Strict, frozen=True):
    scheme: str = ""
    hostname: str = ""
    path: _PathModifier | None = None
    port: int | None = None
    status_code: int = 302


class _Rewrite(Strict, frozen=True):
    hostname: str = ""
    path: _PathModifier | None = None


class _Filter(msgspec.Struct, frozen=True, rename="camel"):
    type: str
    request_header_modifier: _Modifier | None = None
    response_header_modifier: _Modifier | None = None
    request_redirect: _Redirect | None = None
    url_rewrite: _Rewrite | None = None


_MEMBERS = {
    "RequestHeaderModifier": ("request_header_modifier", "requestHeaderModifier"),
    "ResponseHeaderModifier": ("response_header_modifier", "responseHeaderModifier"),
    "RequestRedirect": ("request_redirect", "requestRedirect"),
    "URLRewrite": ("url_rewrite", "urlRewrite"),
}


def read_filters(where: str, raws: Sequence[Any], matches: Sequence[Any], *, of_backend: bool = False) -> Filters:
    """Read a list of filters. matches: those of the rule, for what replaces the matched prefix. Raises Unsupported, InvalidObject."""
    if len(raws) > 16:
        raise InvalidObject(f"{where}.filters", "at most 16 filters", f"{len(raws)}")
    found: dict[str, tuple[str, Any]] = {}
    for position, raw in enumerate(raws):
        place = f"{where}.filters[{position}]"
        one = fields.read(raw, _Filter, place)
        if one.type not in _MEMBERS or (of_backend and one.type == "RequestRedirect"):
            what = "backend" if of_backend else "route"
            raise Unsupported(f"{place}: filter {shown(one.type)} is not supported on a {what} of a Service")
        if one.type in found:
            raise InvalidObject(place, f"one {one.type} at most", "a second one")
        found[one.type] = _member(place, one)
    if "RequestRedirect" in found and "URLRewrite" in found:
        raise InvalidObject(f"{where}.filters", "either a RequestRedirect or a URLRewrite", "both")
    if "RequestRedirect" in found and "ResponseHeaderModifier" in found:
        raise Unsupported(f"{where}.filters: a ResponseHeaderModifier beside a RequestRedirect is not supported")
    return Filters(
        _modifier(*found["RequestHeaderModifier"], _FRAMING) if "RequestHeaderModifier" in found else None,
        _modifier(*found["ResponseHeaderModifier"], _FRAMING | _OURS) if "ResponseHeaderModifier" in found else None,
        _rewrite(*found["URLRewrite"], matches) if "URLRewrite" in found else None,
        _redirect(*found["RequestRedirect"], matches) if "RequestRedirect" in found else None,
    )


def _member(place: str, one: _Filter) -> tuple[str, Any]:
    """Where the field that the type names is, and its value; no other may be there."""
    for type_, (attribute, name) in _MEMBERS.items():
        if type_ != one.type and getattr(one, attribute) is not None:
            raise InvalidObject(f"{place}.{name}", f"nothing in a filter of type {one.type}", "a value")
    attribute, name = _MEMBERS[one.type]
    value = getattr(one, attribute)
    if value is None:
        raise InvalidObject(f"{place}.{name}", "a value", "nothing")
    return f"{place}.{name}", value


def _redirect(where: str, redirect: _Redirect, matches: Sequence[Any]) -> wire.Redirect:
    if redirect.scheme not in ("", "http", "https"):
        raise Unsupported(f"{where}.scheme: {shown(redirect.scheme)} is not supported")
    if redirect.status_code not in _REDIRECTS:
        raise Unsupported(f"{where}.statusCode: {redirect.status_code} is not supported")
    if redirect.port is not None and not 1 <= redirect.port <= 65535:
        raise InvalidObject(f"{where}.port", "a port from 1 to 65535", shown(redirect.port))
    hostname = _hostname(f"{where}.hostname", redirect.hostname)
    path, prefix = _path(f"{where}.path", redirect.path, matches)
    return wire.Redirect(redirect.status_code, redirect.scheme, hostname, redirect.port, path, prefix)


def _rewrite(where: str, rewrite: _Rewrite, matches: Sequence[Any]) -> wire.Rewrite:
    return wire.Rewrite(_hostname(f"{where}.hostname", rewrite.hostname), *_path(f"{where}.path", rewrite.path, matches))


def _hostname(where: str, name: str) -> str:
    if name and not _HOSTNAME.fullmatch(name):
        raise InvalidObject(where, "a host name in lower case, without wildcard", shown(name))
    return name


def _path(where: str, path: _PathModifier | None, matches: Sequence[Any]) -> tuple[str | None, str | None]:
    """What takes the place of the path, and of which prefix of it; None: of all of it."""
    if path is None:
        return None, None
    full = path.type == "ReplaceFullPath"
    if not full and path.type != "ReplacePrefixMatch":
        raise Unsupported(f"{where}.type: {shown(path.type)} is not supported")
    value, other = path.replace_full_path, path.replace_prefix_match
    if not full:
        value, other = other, value
    if value is None or not _PATH.fullmatch(value) or other is not None:
        found = shown(value if other is None else other)
        raise InvalidObject(where, f"only a path of at most 1024 characters of a URI for {path.type}", found)
    if full:
        return value, None
    paths = [getattr(match, "path", None) for match in matches]
    if len(paths) > 1 or any(match is None or match.type != "PathPrefix" for match in paths):
        raise InvalidObject(where, "ReplacePrefixMatch beside exactly one match, of type PathPrefix", f"{len(paths)} matches")
    return value, next((match.value for match in paths if match is not None), "/")


def _modifier(where: str, modifier: _Modifier, kept: frozenset[str]) -> wire.FieldEdit:
    replaced = [(_name(f"{where}.set[{n}]", entry.name), _text(f"{where}.set[{n}]", entry.value)) for n, entry in enumerate(modifier.set)]
    added = [(_name(f"{where}.add[{n}]", entry.name), _text(f"{where}.add[{n}]", entry.value)) for n, entry in enumerate(modifier.add)]
    removed = [_name(f"{where}.remove[{n}]", name) for n, name in enumerate(modifier.remove)]
    names = [*(name for name, _ in (*replaced, *added)), *removed]
    for name in names:
        if name in kept:
            raise Unsupported(f"{where}: {name} says how a message is carried and cannot be changed")
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
