"""The controller on an API server: sidecars told, statuses written by the leader alone, and everybody surviving everybody else's end."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import trio
from certs import Authority
from policy_lab import CART
from prometheus_client.parser import text_string_to_metric_families

from core.credentials import Credentials
from core.env import load
from core.k8s import apiserver
from core.k8s.api import Api
from core.names import WorkloadId
from core.runtime.watch import Cell
from policy import status_writer
from policy.client import PolicyClient
from policy.cluster import RESOURCES, Beside, parse_slim
from policy.config import Config
from policy.controller import run
from policy.diagnostics import exposition
from policy.index import Index
from policy.limits import Counters
from policy.wire import Hello, InboundPolicy
from tests.core.fake_apiserver import FakeApiServer, running
from tests.ports import unused_port

CONTROLLER = WorkloadId("cluster.local", "pillion", "pillion-policy")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_writer, "_GATHER_S", 0.002)
    monkeypatch.setattr(apiserver, "Backoff", lambda *_: _Pause())


class _Pause:
    def next_s(self) -> float:
        return 0.01

    def reset(self) -> None:
        pass


def config(pod: str, port: int) -> Config:
    return load(
        Config,
        {
            "PILLION_POLICY_SOURCE": "kubernetes",
            "PILLION_IDENTITY_ADDR": "identity:8080",
            "PILLION_IDENTITY_TOKEN_FILE": "/t",
            "PILLION_TRUST_ANCHORS_FILE": "/a",
            "PILLION_POD_NAME": pod,
            "PILLION_POLICY_LISTEN": f"127.0.0.1:{port}",
            "PILLION_ADMIN_LISTEN": "127.0.0.1:0",
            "PILLION_WEBHOOK": "off",
        },
    )


class Replica:
    """A controller; stop ends it as a deleted pod ends."""

    def __init__(self, server: FakeApiServer, authority: Authority, name: str, port: int) -> None:
        self.beside: Beside | None = None
        self.stopped = trio.Event()
        self._server, self._authority, self._name, self._port = server, authority, name, port
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        settings = config(self._name, self._port)

        async def certify(cell: Cell[Credentials | None]) -> None:
            cell.set(self._authority.credentials(settings.identity))

        api = Api(self._server.access)
        try:
            with self._scope:
                self.beside = Beside(settings, api)
                await run(settings, self.beside.source, certify, self.beside)
        finally:
            with trio.CancelScope(shield=True):
                await api.close()
            self.stopped.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self.stopped.wait()


@asynccontextmanager
async def cluster() -> AsyncIterator[tuple[FakeApiServer, Authority, trio.Nursery]]:
    with trio.fail_after(60):
        async with running() as server, trio.open_nursery() as nursery:
            server.put(lab.namespace())
            server.put({**lab.pod(ip="127.0.0.1"), "metadata": {**lab.pod()["metadata"], "creationTimestamp": "2026-01-01T00:00:00Z"}})
            yield server, Authority(), nursery
            nursery.cancel_scope.cancel()


def created(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "metadata": {key: value for key, value in raw["metadata"].items() if value is not None}}


async def until_status(server: FakeApiServer, kind: str, name: str) -> dict[str, Any]:
    while not server.get(kind, "shop", name).get("status"):
        await server.changed()
    status: dict[str, Any] = server.get(kind, "shop", name)["status"]
    return status


async def test_a_sidecar_is_told_a_status_is_written_and_controllers_may_go() -> None:
    async with cluster() as (server, authority, nursery):
        port = unused_port()
        first = Replica(server, authority, "policy-a", port)
        nursery.start_soon(first.run)
        cell = Cell[Credentials | None](authority.credentials(CART))
        client = PolicyClient(("127.0.0.1", port), CONTROLLER, cell, Hello("shop", "cart-0", "1"))
        watched: Cell[InboundPolicy | None] = client.watch_port(8080)
        nursery.start_soon(client.run)
        await watched.wait_for(lambda policy: policy is not None and policy.server.name == "all-unauthenticated")
        server.put(created(lab.server()))
        await watched.wait_for(lambda policy: policy is not None and policy.server.kind == "Server")
        assert (await until_status(server, "Server", "cart"))["conditions"][0]["reason"] == "Accepted"
        # the API server goes away: what is known stays
        server.failures = [503] * 30
        server.cut_watches()
        assert watched.value is not None and watched.value.server.kind == "Server"
        # the controller goes: the sidecar keeps what it knows, and asks the next one
        await first.stop()
        await client.connected.wait_for(lambda connected: not connected)
        assert watched.value is not None and watched.value.server.kind == "Server"
        server.failures.clear()
        server.put(created(lab.server(accessPolicy="all-authenticated")))
        nursery.start_soon(Replica(server, authority, "policy-b", port).run)
        await watched.wait_for(lambda policy: policy is not None and policy.authorizations != ())


@pytest.mark.slow
async def test_of_two_replicas_one_writes_and_the_other_takes_over() -> None:
    async with cluster() as (server, authority, nursery):
        replicas = [Replica(server, authority, f"policy-{name}", unused_port()) for name in "ab"]
        for replica in replicas:
            nursery.start_soon(replica.run)
        server.put(created(lab.server()))
        await until_status(server, "Server", "cart")
        holder = server.get("Lease", "pillion", "pillion-policy")["spec"]["holderIdentity"]
        leader, other = replicas if holder == "policy-a" else reversed(replicas)
        assert leader.beside is not None and other.beside is not None
        patched = [line for line in server.requests if line.startswith("PATCH")]
        assert patched == ["PATCH /apis/policy.pillion.dev/v1alpha1/namespaces/shop/servers/cart/status"]
        assert b"pillion_policy_leader 1\n" in leader.beside.exposition()
        assert b"pillion_policy_leader 0\n" in other.beside.exposition()
        await leader.stop()  # hands the lease over
        server.put(created(lab.networks("office", "10.0.0.0/8")))
        await until_status(server, "NetworkAuthentication", "office")
        assert b"pillion_policy_leader 1\n" in other.beside.exposition()


async def test_an_entry_that_somebody_adds_meanwhile_is_never_lost() -> None:
    async with cluster() as (server, authority, nursery):
        nursery.start_soon(Replica(server, authority, "policy-a", unused_port()).run)
        server.put(created(lab.server()))
        await until_status(server, "Server", "cart")
        foreign = {"parentRef": {"name": "gateway"}, "controllerName": "example.com/gateway", "conditions": []}
        route = created(lab.route())
        server.put(route)
        server.put({**route, "status": {"parents": [foreign]}})
        while len(server.get("HTTPRoute", "shop", "web").get("status", {}).get("parents", [])) != 2:
            await server.changed()
        assert server.get("HTTPRoute", "shop", "web")["status"]["parents"][0] == foreign


async def test_it_is_not_ready_before_every_kind_was_listed() -> None:
    async with running() as server:
        del server.kinds["/apis/policy.pillion.dev/v1alpha1/servers"]
        api = Api(server.access)
        beside = Beside(config("policy-a", unused_port()), api)
        assert len(beside.source.waiting) == len(RESOURCES)
        await api.close()


def test_annotations_that_nobody_reads_are_not_kept() -> None:
    raw = lab.pod(opaque_ports="25")
    raw["metadata"]["annotations"]["example.com/huge"] = "x" * 1000
    found = parse_slim(raw)
    assert found is not None
    assert set(found.metadata.annotations) == {"pillion.dev/status", "config.pillion.dev/opaque-ports"}
    assert "example.com/huge" in raw["metadata"]["annotations"]


async def test_every_metric_is_documented() -> None:
    async with cluster() as (server, authority, nursery):
        replica = Replica(server, authority, "policy-a", unused_port())
        nursery.start_soon(replica.run)
        server.put(created(lab.server()))
        await until_status(server, "Server", "cart")
        assert replica.beside is not None
        text = (exposition(Index(), Counters(), ()) + replica.beside.exposition()).decode()
        families = {family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(text)}
        page = (
            Path(__file__)
            .parents[2]
            .joinpath("docs/metrics.md")
            .read_text(encoding="utf-8")
            .partition("## Policy controller")[2]
            .partition("\n## ")[0]
        )
        assert families == set(re.findall(r"`(pillion_\w+)`", page))
