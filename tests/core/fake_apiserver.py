"""A Kubernetes API server for tests: real HTTP on loopback, objects in memory, list, watch, pages, bookmarks, 410, conflicts, status.

As strict as the real one where clients go wrong: a watch from a version that was compacted away is 410, a PUT of an old version is 409,
an unknown kind is 404 in plain text, an object's status only changes through its subresource.
"""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h11
import trio

from core.k8s.http import Access
from tests.ports import unused_port

Raw = dict[str, Any]
Name = tuple[str, str, str]  # collection ("/apis/apps/v1/deployments"), namespace, name

KINDS = {
    "/api/v1/namespaces": "Namespace",
    "/api/v1/nodes": "Node",
    "/api/v1/pods": "Pod",
    "/api/v1/services": "Service",
    "/api/v1/serviceaccounts": "ServiceAccount",
    "/api/v1/configmaps": "ConfigMap",
    "/api/v1/secrets": "Secret",
    "/api/v1/events": "Event",
    "/apis/coordination.k8s.io/v1/leases": "Lease",
    "/apis/discovery.k8s.io/v1/endpointslices": "EndpointSlice",
    "/apis/policy.pillion.dev/v1alpha1/servers": "Server",
    "/apis/policy.pillion.dev/v1alpha1/authorizationpolicies": "AuthorizationPolicy",
    "/apis/policy.pillion.dev/v1alpha1/meshtlsauthentications": "MeshTLSAuthentication",
    "/apis/policy.pillion.dev/v1alpha1/networkauthentications": "NetworkAuthentication",
    "/apis/gateway.networking.k8s.io/v1/httproutes": "HTTPRoute",
    "/apis/gateway.networking.k8s.io/v1/grpcroutes": "GRPCRoute",
    "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations": "ValidatingWebhookConfiguration",
    "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations": "MutatingWebhookConfiguration",
}


@dataclass(eq=False)
class _Watcher:
    collection: str
    namespace: str
    selector: str
    send: trio.MemorySendChannel[Raw]


@dataclass
class FakeApiServer:
    """kinds: what is installed; remove a path and its kind is unknown. failures: statuses of the next requests, the first one first."""

    kinds: dict[str, str] = field(default_factory=lambda: dict(KINDS))
    objects: dict[Name, Raw] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    token: str = ""
    page: int = 0  # the largest page that is given, 0: what was asked for
    port: int = field(default_factory=unused_port)  # the same when it comes back
    version: int = 100
    _history: list[tuple[int, str, str, Raw]] = field(default_factory=list)
    _compacted: int = 0
    _watchers: set[_Watcher] = field(default_factory=set)
    _parking: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    def access(self, token: str = "") -> Access:
        return Access("127.0.0.1", self.port, authorization=lambda: f"Bearer {token}" if token else "")

    @property
    def watching(self) -> int:
        return len(self._watchers)

    async def wait_watching(self, count: int) -> None:
        while len(self._watchers) != count:
            await self._parking.park()

    async def wait_requests(self, line: str, count: int) -> None:
        while self.requests.count(line) < count:
            await self._parking.park()

    async def changed(self) -> None:
        """Until something happened: an object, a request, a watch."""
        await self._parking.park()

    # --- what a test does behind the API -----------------------------------------------------------------------------------

    def put(self, object_: Raw, *, subresource: str = "") -> Raw:
        """Create or replace an object (also its status) and tell the watchers."""
        collection = self._collection_of(object_)
        metadata = object_.get("metadata", {})
        name = (collection, metadata.get("namespace", ""), metadata["name"])
        old = self.objects.get(name)
        new = copy.deepcopy(object_)
        self.version += 1
        meta = new["metadata"]
        meta.setdefault("uid", f"uid-{'-'.join(name[1:])}")
        meta.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        meta["resourceVersion"] = str(self.version)
        meta["managedFields"] = [{"manager": "test"}]
        changed = old is None or old.get("spec") != new.get("spec")
        meta["generation"] = (old or {}).get("metadata", {}).get("generation", 0) + (1 if changed else 0)
        self.objects[name] = new
        self._tell("ADDED" if old is None else "MODIFIED", collection, new)
        return new

    def remove(self, kind: str, namespace: str, name: str) -> None:
        collection = next(path for path, found in self.kinds.items() if found == kind)
        self.delete((collection, namespace, name))

    def delete(self, name: Name) -> Raw:
        old = self.objects.pop(name)
        self.version += 1
        old["metadata"]["resourceVersion"] = str(self.version)
        self._tell("DELETED", name[0], old)
        return old

    def get(self, kind: str, namespace: str, name: str) -> Raw:
        collection = next(path for path, found in self.kinds.items() if found == kind)
        return self.objects[collection, namespace, name]

    def compact(self) -> None:
        """Forget the history: a watch or page from an older version is 410 from now on."""
        self.version += 1
        self._compacted = self.version
        self._history.clear()

    def bookmark(self) -> None:
        """Tell every watcher the present version."""
        self.version += 1
        for watcher in list(self._watchers):
            kind = self.kinds.get(watcher.collection, "Unknown")
            metadata = {"resourceVersion": str(self.version)}
            watcher.send.send_nowait({"type": "BOOKMARK", "object": {"kind": kind, "metadata": metadata}})

    def expire_watches(self) -> None:
        """Tell every watcher, inside its stream, that it is too far behind."""
        for watcher in list(self._watchers):
            watcher.send.send_nowait({"type": "ERROR", "object": _status(410, "Expired", "too old resource version")})
        self.cut_watches()

    def cut_watches(self) -> None:
        """End every watch as the server does after timeoutSeconds."""
        for watcher in list(self._watchers):
            watcher.send.close()
        self._watchers.clear()

    def _tell(self, change: str, collection: str, object_: Raw) -> None:
        self._parking.unpark_all()
        frozen = copy.deepcopy(object_)
        self._history.append((self.version, change, collection, frozen))
        for watcher in list(self._watchers):
            if _wanted(watcher, collection, frozen):
                watcher.send.send_nowait({"type": change, "object": frozen})

    def _collection_of(self, object_: Raw) -> str:
        version = object_["apiVersion"]
        prefix = f"/apis/{version}/" if "/" in version else f"/api/{version}/"
        return next(path for path, kind in self.kinds.items() if kind == object_["kind"] and path.startswith(prefix))

    # --- the API -----------------------------------------------------------------------------------------------------------

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        task_status.started()
        await trio.serve_listeners(self._connection, listeners)

    async def _connection(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        try:
            while True:
                request, body = await _read_request(stream, connection)
                if request is None:
                    return
                await self._answer(stream, connection, request, body)
                if connection.our_state is h11.MUST_CLOSE or connection.their_state is not h11.DONE:
                    return
                connection.start_next_cycle()
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            return
        finally:
            await trio.aclose_forcefully(stream)

    async def _answer(self, stream: trio.SocketStream, connection: h11.Connection, request: h11.Request, body: bytes) -> None:
        method, url = request.method.decode(), urlsplit(request.target.decode())
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        headers = {name.decode(): value.decode() for name, value in request.headers}
        self.requests.append(f"{method} {url.path}" + (" watch" if "watch" in query else ""))
        self.authorizations.append(headers.get("authorization", ""))
        self._parking.unpark_all()
        if self.failures:
            code = self.failures.pop(0)
            if code == 0:
                raise trio.BrokenResourceError("cut")
            await _send(stream, connection, code, _status(code, "", f"failure {code} of the test"))
        elif self.token and headers.get("authorization") != f"Bearer {self.token}":
            await _send(stream, connection, 401, _status(401, "Unauthorized", "Unauthorized"))
        else:
            await self._route(stream, connection, method, url.path, query, headers, body)

    async def _route(
        self,
        stream: trio.SocketStream,
        connection: h11.Connection,
        method: str,
        path: str,
        query: dict[str, str],
        headers: dict[str, str],
        body: bytes,
    ) -> None:
        collection, namespace, name, subresource = self._parse(path)
        if collection not in self.kinds:
            await _send(stream, connection, 404, None)
        elif method == "GET" and not name and "watch" in query:
            await self._watch(stream, connection, collection, namespace, query)
        elif method == "GET" and not name:
            await _send(stream, connection, *self._list(collection, namespace, query))
        else:
            given = json.loads(body) if body else {}
            content = headers.get("content-type", "")
            await _send(stream, connection, *self._object(method, (collection, namespace, name), subresource, given, content))

    def _parse(self, path: str) -> tuple[str, str, str, str]:
        parts = path.strip("/").split("/")
        head, rest = (parts[:2], parts[2:]) if parts[0] == "api" else (parts[:3], parts[3:])
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        plural, name, subresource = (*rest, "", "", "")[:3]
        return "/" + "/".join([*head, plural]), namespace, name, subresource

    def _list(self, collection: str, namespace: str, query: dict[str, str]) -> tuple[int, Raw]:
        start, _, version = query.get("continue", "").partition("@")
        if version and int(version) < self._compacted:
            return 410, _status(410, "Expired", "The provided continue parameter is too old")
        found = [
            object_
            for key, object_ in sorted(self.objects.items())
            if key[0] == collection and namespace in ("", key[1]) and _selected(query.get("labelSelector", ""), object_)
        ]
        limit = int(query.get("limit") or 0)
        size = min(limit or len(found), self.page or len(found)) if limit else len(found)
        first = int(start or 0)
        metadata = {"resourceVersion": version or str(self.version)}
        if first + size < len(found):
            metadata["continue"] = f"{first + size}@{metadata['resourceVersion']}"
        items = [{k: v for k, v in item.items() if k not in ("apiVersion", "kind")} for item in found[first : first + size]]
        version_of = collection.removeprefix("/apis/").removeprefix("/api/").rpartition("/")[0]
        return 200, {"apiVersion": version_of, "kind": f"{self.kinds[collection]}List", "metadata": metadata, "items": items}

    def _object(self, method: str, name: Name, subresource: str, given: Raw, content: str) -> tuple[int, Raw]:
        if method == "POST":
            return self._create(name, given)
        old = self.objects.get(name)
        if old is None:
            kind = name[0].rpartition("/")[2]
            return 404, _status(404, "NotFound", f'{kind} "{name[2]}" not found', {"name": name[2], "kind": kind})
        if method == "GET":
            return 200, old
        if method == "DELETE":
            return 200, self.delete(name)
        new = _json_patched(old, given) if content.startswith("application/json-patch") else _merged(old, given)
        if method == "PUT":
            new = given
        wanted = new.get("metadata", {}).get("resourceVersion")
        if wanted not in (None, "", old["metadata"]["resourceVersion"]):
            return 409, _status(409, "Conflict", "the object has been modified; please apply your changes to the latest version")
        kept = {"status": new.get("status")} if subresource == "status" else {k: v for k, v in new.items() if k != "status"}
        result = {**old, **kept} if subresource == "status" else {**kept, **({"status": old["status"]} if "status" in old else {})}
        return 200, self.put({"apiVersion": old["apiVersion"], "kind": old["kind"], **result})

    def _create(self, name: Name, given: Raw) -> tuple[int, Raw]:
        meta = given.setdefault("metadata", {})
        if "name" not in meta:
            meta["name"] = f"{meta.get('generateName', 'object-')}{self.version}"
        if name[1]:
            meta["namespace"] = name[1]
        if (name[0], name[1], meta["name"]) in self.objects:
            return 409, _status(409, "AlreadyExists", f"{meta['name']} already exists")
        return 201, self.put(given)

    async def _watch(
        self, stream: trio.SocketStream, connection: h11.Connection, collection: str, namespace: str, query: dict[str, str]
    ) -> None:
        version = int(query["resourceVersion"] or self.version)
        if version < self._compacted:
            await _send(stream, connection, 410, _status(410, "Expired", f"too old resource version: {version}"))
            return
        send, receive = trio.open_memory_channel[Raw](10_000)
        watcher = _Watcher(collection, namespace, query.get("labelSelector", ""), send)
        for at, change, of, object_ in self._history:
            if at > version and _wanted(watcher, of, object_):
                send.send_nowait({"type": change, "object": object_})
        self._watchers.add(watcher)
        self._parking.unpark_all()
        try:
            await stream.send_all(connection.send(h11.Response(status_code=200, headers=[("content-type", "application/json")])) or b"")
            async with receive:
                async for event in receive:
                    await stream.send_all(connection.send(h11.Data(json.dumps(event).encode() + b"\n")) or b"")
            await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
        finally:
            self._watchers.discard(watcher)
            self._parking.unpark_all()


@asynccontextmanager
async def running(server: FakeApiServer | None = None) -> AsyncIterator[FakeApiServer]:
    """The server, listening, for as long as the block lasts."""
    server = server or FakeApiServer()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        yield server
        nursery.cancel_scope.cancel()


def _wanted(watcher: _Watcher, collection: str, object_: Raw) -> bool:
    namespace = object_["metadata"].get("namespace", "")
    return collection == watcher.collection and watcher.namespace in ("", namespace) and _selected(watcher.selector, object_)


def _selected(selector: str, object_: Raw) -> bool:
    labels = object_["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, _, value in (term.partition("=") for term in selector.split(",") if term))


def _merged(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def _json_patched(old: Raw, operations: Any) -> Raw:
    """RFC 6902, add and replace only."""
    new = copy.deepcopy(old)
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].strip("/").split("/")]
        target: Any = new
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target[part]
        if isinstance(target, list):
            target[int(last)] = operation["value"]
        else:
            target[last] = operation["value"]
    return new


def _status(code: int, reason: str, message: str, details: Raw | None = None) -> Raw:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message}
    return status | ({"details": details} if details else {})


async def _read_request(stream: trio.SocketStream, connection: h11.Connection) -> tuple[h11.Request | None, bytes]:
    request, body = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(65536))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return request, body
        else:
            return None, b""


async def _send(stream: trio.SocketStream, connection: h11.Connection, code: int, answer: Raw | None) -> None:
    body = b"404 page not found\n" if answer is None else json.dumps(answer).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
    data = connection.send(h11.Response(status_code=code, headers=headers)) or b""
    data += (connection.send(h11.Data(body)) or b"") + (connection.send(h11.EndOfMessage()) or b"")
    await stream.send_all(data)
