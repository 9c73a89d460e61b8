"""Reading untrusted dicts into typed values, refusing with the path inside the object, what was expected and what was found.

Decides the shape of an object only; what a value means is for the caller (core.k8s.objects, policy.model, policy.gateway). Pure.
Called for every object of every source, so the ordinary case is one call into msgspec's C code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

Raw = Mapping[str, Any]
"""An object as JSON or YAML gave it: nothing about it is known yet."""

_WHERE = re.compile(r"(?P<what>.*?)(?: - at `(?:key` in `)?\$(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_EXPECTED = re.compile(r"Expected (.*?)(?:, got (.*))?", re.DOTALL)
_UNQUOTED = ("`int`", "`float`", "`bool`")  # what YAML makes of a text that stands there without quotes
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]")
_FOUND_MAX = 80  # characters of a found value that are repeated; an object may carry megabytes
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class InvalidObject(ValueError):
    """An object that is refused. path: where inside the object (``spec.networks[1].cidr``), "" for the object itself.

    instead: a typed object to be in force when no version of it was ever understood, because nothing in its place would let more happen
    than any reading of it. None: nothing.
    """

    instead: Any = None

    def __init__(self, path: str, expected: str, found: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}" if path else f"expected {expected}, found {found}")
        self.path = path
        self.expected = expected
        self.found = found


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Base of parts of objects in which a field that does not exist is an error: a misspelt one must not be dropped in silence."""


def shown(value: object) -> str:
    """A value for an error message: JSON, cut off, so that a hostile object cannot fill a log."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except (ValueError, RecursionError, TypeError):
        text = type(value).__name__
    return text if len(text) <= _FOUND_MAX else text[:_FOUND_MAX] + "..."


def read(raw: object, type_: type[T], path: str = "") -> T:
    """Convert ``raw`` (at ``path`` inside its object) to a msgspec type; null means absent, as the API server has it."""
    try:
        return msgspec.convert(raw, type_)
    except msgspec.ValidationError as error:
        if "got `null`" not in str(error):
            raise _refusal(raw, path, str(error)) from None
    try:
        return msgspec.convert(without_nulls(raw), type_)
    except msgspec.ValidationError as error:
        raise _refusal(raw, path, str(error)) from None


def without_nulls(raw: object) -> object:
    """A copy in which a field with null does not exist."""
    if isinstance(raw, dict):
        return {key: without_nulls(value) for key, value in raw.items() if value is not None}
    if isinstance(raw, list):
        return [without_nulls(value) for value in raw]
    return raw


def without_managed_fields(object_: dict[str, Any]) -> dict[str, Any]:
    """The same object without metadata.managedFields, which nobody here reads and which is half of many; a PUT without them keeps them."""
    metadata = object_.get("metadata")
    if isinstance(metadata, dict):
        metadata.pop("managedFields", None)
    return object_


def _refusal(raw: object, base: str, message: str) -> InvalidObject:
    match = _WHERE.fullmatch(message)
    what, inner = (match["what"], match["path"] or "") if match else (message, "")
    path = join(base, inner.lstrip("."))
    if missing := _MISSING.fullmatch(what):
        return InvalidObject(join(path, missing[1]), "a value", "nothing")
    if unknown := _UNKNOWN.fullmatch(what):
        return InvalidObject(join(path, unknown[1]), "no field of this name", shown(_at(_at(raw, inner), "." + unknown[1])))
    expected = _EXPECTED.fullmatch(what)
    if not expected:
        return InvalidObject(path, what, shown(_at(raw, inner)))
    quotes = " in quotes" if expected[1].startswith("`str") and expected[2] in _UNQUOTED else ""
    return InvalidObject(path, expected[1].replace("`", "") + quotes, shown(_at(raw, inner)))


def _at(raw: object, path: str) -> object:
    for step in _STEP.finditer(path):
        if step[1] is not None and isinstance(raw, Mapping):
            raw = raw.get(step[1])
        elif step[2] is not None and isinstance(raw, list) and int(step[2]) < len(raw):
            raw = raw[int(step[2])]
    return raw


def join(path: str, field: str) -> str:
    """``spec`` and ``port`` make ``spec.port``; an index joins without a dot."""
    if not path or not field:
        return path or field
    return path + field if field.startswith("[") else f"{path}.{field}"


def one_of(path: str, value: str, options: Collection[str]) -> str:
    """``value`` if it is one of ``options``; raises InvalidObject that lists them."""
    if value not in options:
        raise InvalidObject(path, "one of " + ", ".join(options), shown(value))
    return value


def object_name(path: str, value: str) -> str:
    """``value`` if it can name an API object (DNS subdomain, RFC 1123); names end up in log fields, labels and identities."""
    if not _NAME.fullmatch(value):
        raise InvalidObject(path, "a DNS name of at most 253 lower-case characters", shown(value))
    return value
