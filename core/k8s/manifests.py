"""From the text of a manifest file to the objects in it: YAML (several documents) or JSON, ``List`` kinds opened up. Pure.

Stricter than kubectl where leniency would hide a mistake in a policy: a repeated key is an error. What the API's own JSON cannot carry is
refused or stays text (timestamps, ``22:22``). Aliases and merges cannot make a small file large: the expanded size is bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_FILE_BYTES = 8 << 20  # an EndpointSlice of 1,000 endpoints is 0.3 MB; a file far beyond that is a mistake
_MAX_NODES = 1_000_000  # scalars and containers of one document with every alias expanded
_MAX_NUMBER_CHARS = 64  # reading a number takes the square of its length
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")
_YAML = "tag:yaml.org,2002:"


class InvalidManifest(ValueError):
    """Text that is not a sequence of objects; the message says where."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without timestamps and numbers to the base 60, with an error for repeated keys, and bounded."""

    _merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key_node, value_node in node.value:
            if key_node.tag != f"{_YAML}merge":
                continue
            for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if isinstance(source, yaml.MappingNode):
                    self.flatten_mapping(source)  # first, or it would be counted before it has grown
                    self._merged += 1 + len(source.value)
                if self._merged > _MAX_NODES:
                    raise yaml.constructor.ConstructorError(None, None, f"more than {_MAX_NODES} merged values", key_node.start_mark)
        super().flatten_mapping(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag in _NUMBERS and len(node.value) > _MAX_NUMBER_CHARS:
            problem = f"a number of more than {_MAX_NUMBER_CHARS} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_YAML}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key that is not a string", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_NUMBERS = {
    f"{_YAML}int": re.compile(r"[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    f"{_YAML}float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"
    ),
}
"""PyYAML's patterns without the base 60."""
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers if tag != f"{_YAML}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_manifests(text: bytes, *, is_json: bool) -> list[dict[str, Any]]:
    """All objects of a file, in order; raises InvalidManifest. What is inside an object is not looked at."""
    if len(text) > MAX_FILE_BYTES:
        raise InvalidManifest(f"expected at most {MAX_FILE_BYTES} bytes, found {len(text)}")
    try:
        documents = [_json(text)] if is_json else list(yaml.load_all(text, _Loader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        told = " ".join(str(error).split()).replace('in "<byte string>", line', "at line")
        raise InvalidManifest(told or type(error).__name__) from None
    for document in documents:
        _expanded_size(document, {}, 0)
    return [object_ for number, document in enumerate(documents) if document is not None for object_ in _objects(document, number)]


def _json(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeated_keys)


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} twice")
        found[key] = value
    return found


def _objects(document: object, number: int) -> Iterator[dict[str, Any]]:
    if not isinstance(document, dict):
        raise InvalidManifest(f"document {number + 1}: expected an object, found {type(document).__name__}")
    if not str(document.get("kind", "")).endswith("List") or not isinstance(document.get("items"), list):
        yield document
        return
    for item in document["items"]:
        yield from _objects(item, number)


def _expanded_size(node: object, known: dict[int, int], depth: int) -> int:
    """Nodes below ``node`` counting an alias as often as it is used; ``known`` makes that linear in the text."""
    if not isinstance(node, dict | list):
        _check_scalar(node)
        return 1
    size = known.get(id(node))
    if size is None:
        if depth > 200 or known.setdefault(id(node), -1) != -1:
            raise InvalidManifest("expected at most 200 levels")
        children = node.values() if isinstance(node, dict) else node
        if isinstance(node, dict):
            for key in node:
                if not isinstance(key, str):
                    raise InvalidManifest("a key that is not a string")
                _check_scalar(key)
        size = known[id(node)] = 1 + sum(_expanded_size(child, known, depth + 1) for child in children)
    if size < 0:
        raise InvalidManifest("an alias inside the value it stands for")
    if size > _MAX_NODES:
        raise InvalidManifest(f"expected at most {_MAX_NODES} values after aliases are expanded")
    return size


def _check_scalar(value: object) -> None:
    """Whoever passes an object on writes JSON: what that cannot carry is refused here, and not where it is written."""
    if isinstance(value, str):
        fits = value.isascii() or not _HALF_A_PAIR.search(value)
    elif isinstance(value, int):
        fits = -(1 << 63) <= value < 1 << 64
    else:
        fits = value is None or (isinstance(value, float) and math.isfinite(value))
    if not fits:
        raise InvalidManifest(f"expected a value that the API's JSON can carry, found {type(value).__name__} {ascii(value)[:40]}")
