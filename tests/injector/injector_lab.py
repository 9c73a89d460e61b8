"""A webhook on a loopback port with a certificate of its own, and a caller that verifies it as the API server does."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from core.addrs import ListenAddr, parse_addr
from core.k8s.https import serve_https
from core.k8s.serving import ServingCertificate, service_name
from core.k8s.serving_pair import Pair, make_pair
from core.runtime.listen import listen
from core.runtime.watch import Cell
from injector.decide import Refuse, Skip
from injector.mesh import DEFAULT_MESH, Mesh
from injector.metrics import Metrics
from injector.webhook import Webhook

NAME = service_name("pillion-injector", "pillion")


@dataclass
class Fixed:
    """A certificate source that has what it was given."""

    pair: Pair

    async def current(self) -> Pair:
        return self.pair


@dataclass
class KnownNamespaces:
    """Namespaces by name; an exception is raised instead."""

    known: dict[str, Mapping[str, str] | Exception] = field(default_factory=dict)

    async def annotations(self, namespace: str) -> Mapping[str, str]:
        found = self.known.get(namespace, {})
        if isinstance(found, Exception):
            raise found
        return found


@dataclass
class Told:
    """Remembers what was told."""

    events: list[tuple[str, Skip | Refuse]] = field(default_factory=list)

    def tell(self, pod: Mapping[str, Any], namespace: str, decision: Skip | Refuse) -> None:
        self.events.append((namespace, decision))


@dataclass
class Lab:
    """A running webhook."""

    port: int
    ca_pem: bytes
    mesh: Cell[Mesh]
    namespaces: KnownNamespaces
    told: Told
    metrics: Metrics
    webhook: Webhook

    async def post(self, body: bytes, path: str = "/mutate", method: str = "POST") -> tuple[int, bytes]:
        return await trio.to_thread.run_sync(partial(post, self.port, self.ca_pem, body, path, method))

    async def review(self, pod: Any, namespace: str = "shop", **request: Any) -> dict[str, Any]:
        """The response of an AdmissionReview; ``patch`` decoded."""
        status, answer = await self.post(json.dumps(review_of(pod, namespace, **request)).encode())
        assert status == 200, answer
        found = json.loads(answer)
        assert (found["apiVersion"], found["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
        response: dict[str, Any] = found["response"]
        assert response["uid"] == "u-1"
        if "patch" in response:
            assert response["patchType"] == "JSONPatch"
            response["patch"] = json.loads(base64.b64decode(response["patch"]))
        return response


def review_of(pod: Any, namespace: str, **request: Any) -> dict[str, Any]:
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    asked = {"uid": "u-1", "kind": kind, "operation": "CREATE", "namespace": namespace, "object": pod, "oldObject": None, **request}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": asked}


def post(port: int, ca_pem: bytes, body: bytes, path: str, method: str = "POST") -> tuple[int, bytes]:
    context = ssl.create_default_context(cadata=ca_pem.decode())
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    connection.sock = context.wrap_socket(_dial(port), server_hostname=NAME)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


@asynccontextmanager
async def webhook(connections_max: int = 64) -> AsyncIterator[Lab]:
    pair = make_pair([NAME], time.time())
    serving = ServingCertificate(Fixed(pair))
    await serving.refresh()
    mesh, namespaces, told, metrics = Cell(DEFAULT_MESH), KnownNamespaces(), Told(), Metrics()
    application = Webhook(mesh, namespaces, told, metrics)
    sock = listen(ListenAddr(parse_addr("127.0.0.1:0")))
    end = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(serve_https, application.application(), serving.context, [sock], end.wait, connections_max=connections_max)
        )
        yield Lab(sock.getsockname()[1], pair.ca_pem, mesh, namespaces, told, metrics, application)
        end.set()
