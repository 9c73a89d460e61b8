"""The identity service on Kubernetes in this process: a fake API server that reviews tokens, and any number of real replicas."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import trio

from core.env import load
from core.k8s.api import Api
from core.k8s.lease import Election
from core.names import WorkloadId
from core.runtime.watch import Cell
from identity.admin_wire import Answer, Ask, Status
from identity.client import IdentitySettings
from identity.cluster.app import Replica
from identity.config import Config
from tests.core.fake_apiserver import KINDS, FakeApiServer, Name, Raw
from tests.identity.identity_lab import SERVICE, TRUST_DOMAIN, Recorder, Workload, wait_until

_REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"
_EVENTS = "/apis/events.k8s.io/v1/events"
AUDIENCE = "identity.pillion.dev"


class ApiServer(FakeApiServer):
    """Also reviews tokens as kube-apiserver does (a token is ``<namespace>/<account>/<pod>[/<audience>]``), and creates by apply."""

    def __init__(self) -> None:
        kinds = {path: kind for path, kind in KINDS.items() if kind != "Event"} | {_REVIEWS: "TokenReview", _EVENTS: "Event"}
        super().__init__(kinds=kinds)
        for namespace in ("pillion", "shop"):
            self.namespace(namespace)
        self.secret("pillion-issuer")

    def namespace(self, name: str) -> None:
        self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def secret(self, name: str, **data: str) -> None:
        metadata = {"name": name, "namespace": "pillion", "labels": {"app.kubernetes.io/part-of": "pillion"}}
        self.put({"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": metadata} | ({"data": data} if data else {}))

    def pod(self, namespace: str, account: str, name: str, ip: str = "") -> str:
        """A running pod with a token for the identity service; returns the token."""
        token = {"serviceAccountToken": {"audience": AUDIENCE, "path": "token"}}
        spec = {"serviceAccountName": account, "volumes": [{"name": "token", "projected": {"sources": [token]}}]}
        metadata = {"name": name, "namespace": namespace, "uid": f"uid-{name}"}
        self.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": {"phase": "Running", "podIP": ip}})
        return f"{namespace}/{account}/{name}"

    def events(self) -> list[Raw]:
        return [object_ for (collection, *_), object_ in self.objects.items() if collection == _EVENTS]

    def _object(self, method: str, name: Name, subresource: str, given: Raw, content: str) -> tuple[int, Raw]:
        if name[0] == _REVIEWS:
            return 201, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": self._reviewed(given["spec"])}
        if content.startswith("application/apply-patch") and name not in self.objects:
            return 201, self.put(given)
        return super()._object(method, name, subresource, given, content)

    def _reviewed(self, spec: Raw) -> Raw:
        parts = spec["token"].split("/")
        if len(parts) not in (3, 4):
            return {"authenticated": False, "error": "invalid bearer token"}
        namespace, account, pod, audience = (*parts, AUDIENCE)[:4]
        if audience not in spec["audiences"]:
            return {"authenticated": False, "error": '[invalid bearer token, token audiences ["x"] is invalid for the target audiences]'}
        if ("/api/v1/pods", namespace, pod) not in self.objects:
            return {"authenticated": False, "error": "[invalid bearer token, service account token has been invalidated]"}
        extra = {"authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": [f"uid-{pod}"]}
        user = {"username": f"system:serviceaccount:{namespace}:{account}", "extra": extra}
        return {"authenticated": True, "audiences": spec["audiences"], "user": user}


class Mesh:
    """Replicas and workloads of one cluster. Replica number n listens on 127.0.0.n+1, all on one port, as pods do."""

    def __init__(self, server: ApiServer, directory: Path, nursery: trio.Nursery, port: int) -> None:
        self.server = server
        self.directory = directory
        self.nursery = nursery
        self.port = port
        self.replicas: dict[str, Replica] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self._numbers = itertools.count(2)

    async def start(self, issuer_secret: str = "") -> str:
        """One more replica; its name."""
        number = next(self._numbers)
        name, ip = f"identity-{number}", f"127.0.0.{number}"
        (self.directory / f"{name}.token").write_text(self.server.pod("pillion", "pillion-identity", name, ip))
        config = load(
            Config,
            {
                "PILLION_IDENTITY_SOURCE": "kubernetes",
                "PILLION_IDENTITY_LISTEN": f"{ip}:{self.port}",
                "PILLION_ADMIN_LISTEN": f"{ip}:0",
                "PILLION_ISSUER_SECRET": issuer_secret,
                "PILLION_POD_NAME": name,
                "PILLION_POD_UID": f"uid-{name}",
                "PILLION_IDENTITY_TOKEN_FILE": str(self.directory / f"{name}.token"),
                "PILLION_LEAF_LIFETIME_S": "3600",
            },
        )
        await self.nursery.start(self._run, name, config)
        return name

    async def _run(self, name: str, config: Config, *, task_status: trio.TaskStatus[None]) -> None:
        api = Api(self.server.access)
        election = Election("pillion", "pillion-identity", name, lease_s=1.0, renew_within_s=0.6, retry_s=0.1)
        try:
            async with trio.open_nursery() as nursery:
                self.scopes[name] = nursery.cancel_scope
                self.replicas[name] = Replica(config, api, nursery, election)
                task_status.started()
                await self.replicas[name].run()
                nursery.cancel_scope.cancel()
        finally:
            del self.replicas[name], self.scopes[name]
            with trio.CancelScope(shield=True):
                await api.close()

    async def stop(self, name: str) -> None:
        """The pod is deleted and its process ends in order."""
        self.replicas[name].drain.start("test")
        await wait_until(lambda: name not in self.replicas)
        self.server.remove("Pod", "pillion", name)

    async def ready(self, name: str) -> Replica:
        replica = self.replicas[name]
        await wait_until(lambda: not replica.not_ready())
        return replica

    async def leader(self) -> Replica:
        found: list[Replica] = []

        def leads() -> bool:
            found[:] = [replica for replica in self.replicas.values() if replica.leader is not None and replica.elector.leads()]
            return bool(found)

        await wait_until(leads)
        return found[0]

    async def ask(self, ask: Ask) -> Answer:
        """An operator's request to whoever leads."""
        return await (await self.leader()).answer(msgspec.json.encode(ask))

    async def ask_step(self, step: str) -> Answer:
        return await self.ask(Ask("rotate", step))

    async def status(self) -> Status:
        answer = await self.ask(Ask("status"))
        assert answer.status is not None, answer.error
        return answer.status

    async def step(self, step: str, *, ignore_absent: bool = False) -> None:
        """Do one step, waiting until nothing is in its way."""
        with trio.fail_after(30):
            while (answer := await self.ask(Ask("rotate", step, ignore_absent))).error:
                assert answer.blocking or answer.again, answer.error
                await trio.sleep(0.05)
        assert answer.done == step

    def bundle(self, namespace: str) -> str:
        """What the ConfigMap of a namespace holds, empty when there is none."""
        found = self.server.objects.get(("/api/v1/configmaps", namespace, "pillion-trust-anchors"))
        return str(found["data"]["ca-bundle.crt"]) if found else ""

    def roaming(self, account: str) -> Workload:
        """A workload whose every connection goes to the next replica: it is certified by one and reports to another."""
        workload = self.workload(account, next(iter(self.replicas)))
        turns = itertools.count()

        async def dial(_: str, port: int) -> trio.SocketStream:
            serving = sorted(self.replicas)
            return await trio.open_tcp_stream(self.replicas[serving[next(turns) % len(serving)]].config.listen.ip, port)

        return replace(workload, settings=replace(workload.settings, dial=dial))

    def workload(self, account: str, replica: str, pod: str = "") -> Workload:
        """A workload in namespace shop that asks this replica, as its Service happened to choose."""
        pod = pod or f"{account}-0"
        token_file, anchors_file = self.directory / f"{pod}.token", self.directory / f"{pod}.pem"
        token_file.write_text(self.server.pod("shop", account, pod))
        anchors_file.write_text(self.bundle("shop"))
        addr = (self.replicas[replica].config.listen.ip, self.port)
        settings = IdentitySettings(addr, SERVICE, WorkloadId(TRUST_DOMAIN, "shop", account), token_file, anchors_file, chance=lambda: 0.0)
        return Workload(settings, Cell(None), Recorder())


@asynccontextmanager
async def mesh(directory: Path, port: int) -> AsyncIterator[Mesh]:
    server = ApiServer()
    with trio.fail_after(120):
        async with trio.open_nursery() as outer:
            await outer.start(server.serve)
            async with trio.open_nursery() as nursery:
                yield Mesh(server, directory, nursery, port)
                nursery.cancel_scope.cancel()
            outer.cancel_scope.cancel()


def data(secret: Raw) -> dict[str, Any]:
    return dict(secret.get("data") or {})
