"""From the text of a manifest file to the objects in it: YAML (several documents) or JSON, ``List`` kinds opened up. Pure.

Stricter than kubectl where leniency would hide a mistake in a policy: a repeated key is an error. YAML timestamps stay text, as in the
API's own JSON. Aliases cannot make a small file large: the expanded size is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import yaml

MAX_FILE_BYTES = 8 << 20  # an EndpointSlice of 1,000 endpoints is 0.3 MB; a file far beyond that is a mistake
_MAX_NODES = 1_000_000  # scalars and containers of one document with every alias expanded


class InvalidManifest(ValueError):
    """Text that is not a sequence of objects; the message says where."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without timestamps and with an error for repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key that is not a string", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_manifests(text: bytes, *, is_json: bool) -> list[dict[str, Any]]:
    """All objects of a file, in order; raises InvalidManifest. What is inside an object is not looked at."""
    if len(text) > MAX_FILE_BYTES:
        raise InvalidManifest(f"expected at most {MAX_FILE_BYTES} bytes, found {len(text)}")
    try:
        documents = [msgspec.json.decode(text)] if is_json else list(yaml.load_all(text, _Loader))
    except (msgspec.DecodeError, yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidManifest(" ".join(str(error).split()) or type(error).__name__) from None
    for document in documents:
        _expanded_size(document, {}, 0)
    return [object_ for number, document in enumerate(documents) if document is not None for object_ in _objects(document, number)]


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
        return 1
    size = known.get(id(node))
    if size is None:
        if depth > 200 or known.setdefault(id(node), -1) != -1:
            raise InvalidManifest("expected at most 200 levels")
        children = node.values() if isinstance(node, dict) else node
        size = known[id(node)] = 1 + sum(_expanded_size(child, known, depth + 1) for child in children)
    if size < 0:
        raise InvalidManifest("an alias inside the value it stands for")
    if size > _MAX_NODES:
        raise InvalidManifest(f"expected at most {_MAX_NODES} values after aliases are expanded")
    return size
