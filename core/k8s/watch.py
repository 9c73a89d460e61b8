"""One watch of a collection: the API server's changes after a version, until it ends the watch, as events with plain dicts.

Decides nothing about the objects. Made by `core.k8s.api`; `core.k8s.apiserver` begins the next one where this ended.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import trio

from core.k8s.client import REQUEST_S, Client, target_of
from core.k8s.errors import Unauthorized, Unavailable, error_of
from core.k8s.fields import without_managed_fields
from core.k8s.http import Broken, Connection

_WATCH_S = (300, 600)  # a watch ends by itself after a random time of these, so that clients spread over replicas of the API server
_WATCH_GRACE_S = 30.0
_LINE_BYTES = 16 << 20  # an object is at most 1.5 MiB in etcd and 3 MiB in a request


class _Line(msgspec.Struct):
    type: str
    object: dict[str, Any]


_read_line = msgspec.json.Decoder(_Line).decode


@dataclass(frozen=True)
class WatchEvent:
    """The object after the change; for ``DELETED`` as it was last."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: dict[str, Any]


class Watch:
    """``async for event in api.watch(path, version)``: ends when the server ends it; then watch again from ``resource_version``.

    Raises Gone when that version is too old (list again), and other ApiErrors. Bookmarks only move ``resource_version``. May be abandoned
    or cancelled at any point: its connection is closed by `aclose`, by an error, by the end, or at the latest with the Api.
    running: where it stands while it has a connection.
    """

    def __init__(
        self, client: Client, running: set[Watch], path: str, resource_version: str, label_selector: str, field_selector: str
    ) -> None:
        self.resource_version = resource_version
        self._client = client
        self._running = running
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
        self._running.discard(self)
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
        return WatchEvent(read.type, without_managed_fields(read.object))  # type: ignore[arg-type]

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
        target = target_of(self._path, query | {"resourceVersion": self.resource_version})
        self._running.add(self)
        try:
            with trio.fail_after(REQUEST_S):
                connection = self._connection = await self._client.connect()
                head = await connection.request("GET", target, await self._client.headers(), None)
                body = b"" if head.status == 200 else await connection.chunk()
        except trio.TooSlowError:
            raise Unavailable(f"watch {self._path}: no answer within {REQUEST_S:g} s") from None
        except Broken as error:
            self._client.reconsider(error.untrusted)
            raise Unavailable(f"watch {self._path}: {error}") from error
        if head.status != 200:
            failed = error_of(head.status, body, f"watch {self._path}", head.headers)
            if isinstance(failed, Unauthorized):
                self._client.reconsider(True)
            raise failed
        self._deadline = trio.current_time() + seconds + _WATCH_GRACE_S
