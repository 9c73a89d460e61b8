"""Talking to the Kubernetes API server from trio: get, list, watch, create, replace, patch, delete, with objects as plain dicts.

Moves objects and types the errors; decides nothing about them and retries nothing but what cannot have happened. The server's answers are
decoded object by object, without ``metadata.managedFields``, so that a list of ten thousand pods never stands in memory as dicts.
Constructed by `core.k8s.cluster.connect`; `core.k8s.apiserver` builds list-and-watch on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, overload
from urllib.parse import quote, urlencode

import msgspec
import trio

from core.k8s.errors import Gone, Unauthorized, Unavailable, error_of
from core.k8s.http import Access, Broken, Connection, Head

Object = dict[str, Any]
T = TypeVar("T")

PAGE = 500  # objects asked for at once; client-go's page size
REQUEST_S = 60.0  # kube-apiserver's own bound of a request that is not a watch
_AUTHORIZATION_S = 60.0  # how long a token is used before its source is asked again; client-go re-reads token files as often
_WATCH_S = (300, 600)  # a watch ends by itself after a random time of these, so that clients spread over replicas of the API server
_WATCH_GRACE_S = 30.0
_IDLE_S, _IDLE_MAX = 30.0, 4
_RESPONSE_BYTES = 128 << 20
_LINE_BYTES = 16 << 20  # an object is at most 1.5 MiB in etcd and 3 MiB in a request
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


class _Line(msgspec.Struct):
    type: str
    object: Object


_read_object = msgspec.json.Decoder(dict[str, Any]).decode
_read_page = msgspec.json.Decoder(_Page).decode
_read_line = msgspec.json.Decoder(_Line).decode


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


@dataclass(frozen=True)
class WatchEvent:
    """The object after the change; for ``DELETED`` as it was last."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: Object


class Api:
    """One API server. load: finds out how to reach it; asked again (in a thread) when it does not know us or we do not trust it."""

    def __init__(self, load: Callable[[], Access], user_agent: str = "pillion") -> None:
        self._load = load
        self._user_agent = user_agent
        self._access: Access | None = None
        self._authorization: tuple[float, str] | None = None
        self._idle: list[Connection] = []
        self._watches: set[Watch] = set()

    async def access(self) -> Access:
        """How the API server is reached, found out at the first use."""
        if self._access is None:
            self._access = await trio.to_thread.run_sync(self._load)
        return self._access

    async def close(self) -> None:
        """Close every connection, those of watches too."""
        for watch in tuple(self._watches):
            await watch.aclose()
        while self._idle:
            await self._idle.pop().close()

    async def get(self, path: str, **query: str) -> Object:
        """One object. Raises ApiError, most likely NotFound."""
        return await self._object("GET", path, query)

    async def text(self, path: str, **query: str) -> str:
        """What is no object: a pod's metrics through its proxy subresource. Raises ApiError."""
        return (await self._call("GET", path, query)).decode("utf-8", "replace")

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
        return Watch(self, path, resource_version, label_selector, field_selector)

    async def _page(self, path: str, query: Mapping[str, str]) -> _Page:
        body = await self._call("GET", path, query)
        try:
            return _read_page(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Unavailable(f"GET {path}: not a list: {error}") from None

    async def _object(self, method: str, path: str, query: Mapping[str, str], body: Any = None, content: str = "") -> Object:
        encoded = msgspec.json.encode(body) if body is not None else None
        answer = await self._call(method, path, query, encoded, content or "application/json")
        try:
            return pruned(_read_object(answer)) if answer.strip() else {}
        except (msgspec.DecodeError, RecursionError) as error:
            raise Unavailable(f"{method} {path}: not an object: {error}") from None

    async def _call(
        self, method: str, path: str, query: Mapping[str, str], body: bytes | None = None, content: str = "application/json"
    ) -> bytes:
        """The body of a good response; any other is raised. Sent again only when nothing can have come of it."""
        target = _target(path, query)
        headers = {"content-type": content} if body is not None else {}
        for last in (False, True):
            try:
                with trio.fail_after(REQUEST_S):
                    head, answer = await self._exchange(method, target, headers, body)
            except trio.TooSlowError:
                raise Unavailable(f"{method} {path}: no answer within {REQUEST_S:g} s") from None
            except Broken as error:
                self._reconsider(error.untrusted)
                if last or not error.untrusted:
                    raise Unavailable(f"{method} {path}: {error}") from error
                continue
            if head.status < 300:
                return answer
            failed = error_of(head.status, answer, f"{method} {path}", head.headers)
            if last or not isinstance(failed, Unauthorized):
                raise failed
            self._reconsider(True)
        raise AssertionError  # the second round returns or raises

    async def _exchange(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> tuple[Head, bytes]:
        reused = self._reusable()
        if reused is not None:
            try:
                return await self._use(reused, method, target, headers, body)
            except Broken:
                if method != "GET":  # may have been carried out; the caller decides
                    raise
        return await self._use(await Connection.open(await self.access()), method, target, headers, body)

    async def _use(
        self, connection: Connection, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[Head, bytes]:
        try:
            head = await connection.request(method, target, await self._headers() | dict(headers), body)
            chunks, size = [], 0
            while chunk := await connection.chunk():
                chunks.append(chunk)
                size += len(chunk)
                if size > _RESPONSE_BYTES:
                    raise Broken(f"an answer of more than {_RESPONSE_BYTES >> 20} MiB")
        except BaseException:
            await connection.close()
            raise
        if len(self._idle) < _IDLE_MAX and connection.recycle():
            self._idle.append(connection)
        else:
            await connection.close()
        return head, b"".join(chunks)

    def _reusable(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if trio.current_time() - connection.idle_since < _IDLE_S:
                return connection
            connection.abandon()
        return None

    def _reconsider(self, everything: bool) -> None:
        """The next request asks for the token again, and with ``everything`` for address, trust and certificate too."""
        self._authorization = None
        if everything:
            self._access = None
            while self._idle:
                self._idle.pop().abandon()

    async def _headers(self) -> dict[str, str]:
        now = trio.current_time()
        if self._authorization is None or now >= self._authorization[0]:
            access = await self.access()
            self._authorization = now + _AUTHORIZATION_S, await trio.to_thread.run_sync(access.authorization)
        value = self._authorization[1]
        headers = {"accept": "application/json", "user-agent": self._user_agent}
        return headers | {"authorization": value} if value else headers


class Watch:
    """``async for event in api.watch(path, version)``: ends when the server ends it; then watch again from ``resource_version``.

    Raises Gone when that version is too old (list again), and other ApiErrors. Bookmarks only move ``resource_version``. May be abandoned
    or cancelled at any point: its connection is closed by `aclose`, by an error, by the end, or at the latest with the Api.
    """

    def __init__(self, api: Api, path: str, resource_version: str, label_selector: str, field_selector: str) -> None:
        self.resource_version = resource_version
        self._api = api
        self._path = path
        self._selectors = {"labelSelector": label_selector, "fieldSelector": field_selector}
        self._connection: Connection | None = None
        self._deadline = 0.0
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._ended = False

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> WatchEvent:
        try:
            while not self._ended:
                event = await self._next_event()
                if event is not None:
                    return event
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        raise StopAsyncIteration

    async def start(self) -> None:
        """Send the request and see it accepted; otherwise the first step of the iteration does that."""
        if self._connection is None and not self._ended:
            try:
                await self._open()
            except BaseException:
                await self.aclose()
                raise

    async def aclose(self) -> None:
        """Close the connection; the iteration ends."""
        self._ended = True
        self._api._watches.discard(self)
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.close()

    async def _next_event(self) -> WatchEvent | None:
        if not self._lines:
            await self._fill()
        if not self._lines:
            return None
        line = self._lines.pop()
        try:
            read = _read_line(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Unavailable(f"watch {self._path}: not an event: {error}") from None
        if read.type == "ERROR":
            raise error_of(int(read.object.get("code") or 500), msgspec.json.encode(read.object), f"watch {self._path}", {})
        metadata = read.object.get("metadata")
        if isinstance(metadata, dict) and metadata.get("resourceVersion"):
            self.resource_version = str(metadata["resourceVersion"])
        if read.type not in ("ADDED", "MODIFIED", "DELETED"):
            return None  # a bookmark, or something that is younger than we are
        return WatchEvent(read.type, pruned(read.object))  # type: ignore[arg-type]

    async def _fill(self) -> None:
        """Read until at least one whole line is there, or the end."""
        if self._connection is None:
            await self._open()
        assert self._connection is not None
        try:
            with trio.fail_at(self._deadline):
                while not self._lines and not self._ended:
                    chunk = await self._connection.chunk()
                    self._ended = not chunk
                    self._split(chunk)
        except trio.TooSlowError:
            raise Unavailable(f"watch {self._path}: the server did not end it in time") from None
        except Broken as error:
            raise Unavailable(f"watch {self._path}: {error}") from error

    def _split(self, chunk: bytes) -> None:
        self._buffer += chunk
        if b"\n" in chunk:
            *lines, rest = bytes(self._buffer).split(b"\n")
            self._lines = [line for line in reversed(lines) if line.strip()]
            self._buffer = bytearray(rest)
        if len(self._buffer) > _LINE_BYTES:
            raise Unavailable(f"watch {self._path}: an event of more than {_LINE_BYTES >> 20} MiB")

    async def _open(self) -> None:
        seconds = random.randint(*_WATCH_S)
        query = self._selectors | {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        target = _target(self._path, query | {"resourceVersion": self.resource_version})
        self._api._watches.add(self)
        try:
            with trio.fail_after(REQUEST_S):
                connection = self._connection = await Connection.open(await self._api.access())
                head = await connection.request("GET", target, await self._api._headers(), None)
                body = b"" if head.status == 200 else await connection.chunk()
        except trio.TooSlowError:
            raise Unavailable(f"watch {self._path}: no answer within {REQUEST_S:g} s") from None
        except Broken as error:
            self._api._reconsider(error.untrusted)
            raise Unavailable(f"watch {self._path}: {error}") from error
        if head.status != 200:
            failed = error_of(head.status, body, f"watch {self._path}", head.headers)
            if isinstance(failed, Unauthorized):
                self._api._reconsider(True)
            raise failed
        self._deadline = trio.current_time() + seconds + _WATCH_GRACE_S


async def _take(page: _Page, items: list[Any], each: Callable[[Object], Any] | None) -> None:
    kind = page.kind.removesuffix("List")
    for number, raw in enumerate(page.items or ()):
        read = pruned(_read_object(raw))
        read.setdefault("apiVersion", page.api_version)
        read.setdefault("kind", kind)
        items.append(each(read) if each is not None else read)
        if number % _OBJECTS_PER_TURN == _OBJECTS_PER_TURN - 1:
            await trio.lowlevel.checkpoint()


def pruned(object_: Object) -> Object:
    """Without metadata.managedFields, which nobody here reads and which is half of many objects; a PUT without them keeps them."""
    metadata = object_.get("metadata")
    if isinstance(metadata, dict):
        metadata.pop("managedFields", None)
    return object_


def _target(path: str, query: Mapping[str, str]) -> str:
    given = {key: value for key, value in query.items() if value}
    return f"{path}?{urlencode(given)}" if given else path
