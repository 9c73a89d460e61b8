"""A mesh of one identity service and any number of workloads, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from core.addrs import Addr, ListenAddr
from core.credentials import Credentials
from core.names import WorkloadId
from core.runtime.listen import listen
from core.runtime.watch import Cell
from identity.authority import Authority
from identity.client import IdentitySettings, keep_certified
from identity.local_tokens import LocalReviewer, LocalSigner
from identity.serve import Capacity, ServingCertificate, serve_https
from identity.service import IdentityService
from tests.ports import unused_port

TRUST_DOMAIN = "cluster.local"
SERVICE = WorkloadId(TRUST_DOMAIN, "pillion", "pillion-identity")


@dataclass
class Recorder:
    """An observer that keeps what it hears."""

    certificates: list[Credentials] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def certified(self, credentials: Credentials) -> None:
        self.certificates.append(credentials)

    def bundle_changed(self, credentials: Credentials, generation: int) -> None:
        self.generations.append(generation)

    def failed(self, reason: str, detail: str, retry_in_s: float) -> None:
        self.failures.append((reason, detail))


@dataclass
class Workload:
    """One workload that is kept certified."""

    settings: IdentitySettings
    cell: Cell[Credentials | None]
    seen: Recorder

    async def wait_certified(self) -> Credentials:
        found = await self.cell.wait_for(lambda value: value is not None)
        assert found is not None
        return found


class Lab:
    """directory: for token and anchor files. authority: replaceable, as a restart of the service replaces it."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self.directory = directory
        self.authority = authority
        self.signer = LocalSigner.generate()
        self.anchors_file = directory / "anchors.pem"
        self.anchors_file.write_bytes(authority.trust.value.bundle_pem)
        self.port = unused_port()
        self.service: IdentityService | None = None

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[IdentityService]:
        """The real service over loopback HTTPS."""
        service = IdentityService(self.authority, LocalReviewer(self.signer.public_pem, TRUST_DOMAIN))
        self.service = service
        certificate = ServingCertificate(self.authority, SERVICE)
        sockets = [listen(ListenAddr(Addr("127.0.0.1", self.port)))]
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_https, service.application(), certificate.context, sockets, stop.wait, Capacity(100))
            nursery.start_soon(certificate.keep)
            try:
                yield service
            finally:
                service.drain()
                stop.set()
                nursery.cancel_scope.cancel()

    def workload(self, service_account: str, pod: str = "") -> Workload:
        pod = pod or f"{service_account}-0"
        identity = WorkloadId(TRUST_DOMAIN, "shop", service_account)
        token_file = self.directory / f"{pod}.token"
        token_file.write_text(self.token(service_account, pod))
        settings = IdentitySettings(("127.0.0.1", self.port), SERVICE, identity, token_file, self.anchors_file, chance=lambda: 0.0)
        return Workload(settings, Cell(None), Recorder())

    def token(self, service_account: str, pod: str, namespace: str = "shop") -> str:
        return self.signer.issue(namespace, service_account, pod, f"uid-{pod}", self.authority.clock())


@asynccontextmanager
async def kept_certified(*workloads: Workload) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for workload in workloads:
            nursery.start_soon(keep_certified, workload.settings, workload.cell, workload.seen)
        yield
        nursery.cancel_scope.cancel()


async def wait_until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """Poll a condition of another task; fails the test after ``within_s``."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - the condition belongs to code that has no event for it
            await trio.sleep(0.01)
