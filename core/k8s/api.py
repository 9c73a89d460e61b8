"""Talking to the Kubernetes API server from trio: get, list, watch, create, replace, patch, delete, with objects as plain dicts.

Moves objects and decides nothing about them. The server's answers are decoded object by object, without ``metadata.managedFields``, so that
a list of ten thousand pods never stands in memory as dicts. Requests are made by `core.k8s.client`. Constructed by
`core.k8s.cluster.connect`; `core.k8s.apiserver` builds list-and-watch on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, overload
from urllib.parse import quote

import msgspec
import trio

from core.k8s.client import Client
from core.k8s.errors import Gone, Unavailable
from core.k8s.fields import without_managed_fields
from core.k8s.http import Access
from core.k8s.watch import Watch

Object = dict[str, Any]
T = TypeVar("T")

PAGE = 500  # objects asked for at once; client-go's page size
_OBJECTS_PER_TURN = 50  # decoded before other tasks get their turn
_PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",
}


class _Page(msgspec.Struct):
    kind: str = ""
    api_version: str = msgspec.field(default="", name="apiVersion")
    metadata: dict[str, Any] = {}
    items: list[msgspec.Raw] | None = None


_read_object = msgspec.json.Decoder(dict[str, Any]).decode
_read_page = msgspec.json.Decoder(_Page).decode


def object_path(group: str, version: str, plural: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """``("apps", "v1", "deployments", "shop", "cart", "status")`` to its path; group "" is core, no namespace means all or none.

    Whatever the parts hold, each is one segment of the path. Raises ValueError for one that servers take away: ``.`` and ``..``.
    """
    parts = ["apis", group, version] if group else ["api", version]
    parts += ["namespaces", namespace] if namespace else []
    parts += [part for part in (plural, name, subresource) if part]
    if not {".", ".."}.isdisjoint(parts):
        raise ValueError(f"no path to an object: {parts!r}")
    return "".join("/" + quote(part, safe="") for part in parts)


@dataclass(frozen=True)
class Listing(Generic[T]):
    """All objects of a list, and the version from which a watch continues it."""

    items: list[T]
    resource_version: str


class Api:
    """One API server. load: finds out how to reach it; asked again (in a thread) when it does not know us or we do not trust it."""

    def __init__(self, load: Callable[[], Access], user_agent: str = "pillion") -> None:
        self._client = Client(load, user_agent)
        self._watches: set[Watch] = set()

    async def access(self) -> Access:
        """How the API server is reached, found out at the first use."""
        return await self._client.access()

    async def close(self) -> None:
        """Close every connection, those of watches too."""
        for watch in tuple(self._watches):
            await watch.aclose()
        await self._client.close()

    async def get(self, path: str, **query: str) -> Object:
        """One object. Raises ApiError, most likely NotFound."""
        return await self._object("GET", path, query)

    async def text(self, path: str, **query: str) -> str:
        """What is no object: a pod's metrics through its proxy subresource. Raises ApiError."""
        return (await self._client.call("GET", path, query)).decode("utf-8", "replace")

    async def post(self, path: str, body: Mapping[str, Any], **query: str) -> Object:
        """Create an object (path of the collection) or use a subresource such as a TokenReview. Raises ApiError: AlreadyExists, Invalid."""
        return await self._object("POST", path, query, body)

    async def put(self, path: str, body: Mapping[str, Any], **query: str) -> Object:
        """Replace an object; Conflict when it is not any more the version that ``body`` names."""
        return await self._object("PUT", path, query, body)

    async def patch(self, path: str, body: Any, kind: Literal["merge", "json", "strategic", "apply"] = "merge", **query: str) -> Object:
        """Change part of an object. kind "apply" (server-side apply) needs ``fieldManager="..."``, and ``force="true"`` to take over."""
        return await self._object("PATCH", path, query, body, _PATCH_TYPES[kind])

    async def delete(self, path: str, body: Mapping[str, Any] | None = None, **query: str) -> Object:
        """Delete an object; ``body``: DeleteOptions with preconditions."""
        return await self._object("DELETE", path, query, body)

    @overload
    async def list(self, path: str, *, label_selector: str = ..., field_selector: str = ...) -> Listing[Object]: ...
    @overload
    async def list(self, path: str, *, label_selector: str = ..., field_selector: str = ..., each: Callable[[Object], T]) -> Listing[T]: ...
    async def list(
        self, path: str, *, label_selector: str = "", field_selector: str = "", each: Callable[[Object], Any] | None = None
    ) -> Listing[Any]:
        """Every object of a collection, page by page but of one moment; ``each`` turns an object into what is kept of it.

        Objects carry apiVersion and kind as single ones do. Raises ApiError.
        """
        query = {"labelSelector": label_selector, "fieldSelector": field_selector, "limit": str(PAGE)}
        items: list[Any] = []
        version, next_page = "", ""
        while True:
            try:
                page = await self._page(path, query | {"continue": next_page})
            except Gone:
                if not next_page:
                    raise
                # The moment that we were reading is compacted away: once more, in one piece, as client-go does.
                items, version, next_page = [], "", ""
                query["limit"] = ""
                continue
            await _take(page, items, each)
            version = version or str(page.metadata.get("resourceVersion", ""))
            next_page = str(page.metadata.get("continue") or "")
            if not next_page:
                return Listing(items, version)

    def watch(self, path: str, resource_version: str, *, label_selector: str = "", field_selector: str = "") -> Watch:
        """Changes after ``resource_version``; iterate over it. See Watch."""
        return Watch(self._client, self._watches, path, resource_version, label_selector, field_selector)

    async def _page(self, path: str, query: Mapping[str, str]) -> _Page:
        body = await self._client.call("GET", path, query)
        try:
            return _read_page(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Unavailable(f"GET {path}: not a list: {error}") from None

    async def _object(self, method: str, path: str, query: Mapping[str, str], body: Any = None, content: str = "") -> Object:
        encoded = msgspec.json.encode(body) if body is not None else None
        answer = await self._client.call(method, path, query, encoded, content or "application/json")
        try:
            return without_managed_fields(_read_object(answer)) if answer.strip() else {}
        except (msgspec.DecodeError, RecursionError) as error:
            raise Unavailable(f"{method} {path}: not an object: {error}") from None


async def _take(page: _Page, items: list[Any], each: Callable[[Object], Any] | None) -> None:
    kind = page.kind.removesuffix("List")
    for number, raw in enumerate(page.items or ()):
        read = without_managed_fields(_read_object(raw))
        read.setdefault("apiVersion", page.api_version)
        read.setdefault("kind", kind)
        items.append(each(read) if each is not None else read)
        if number % _OBJECTS_PER_TURN == _OBJECTS_PER_TURN - 1:
            await trio.lowlevel.checkpoint()
