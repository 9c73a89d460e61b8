"""Puts the injector together and runs it: the only module here that constructs everything. Called by `__main__`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import trio

from core.k8s.api import Api
from core.k8s.cluster import connect
from core.k8s.events import EventRecorder
from core.k8s.https import serve_https
from core.k8s.serving import ServingCertificate, SharedSecret, Source, service_name
from core.runtime import logs
from core.runtime.admin import AdminServer, standard_routes
from core.runtime.drain import Drain, drain_on_signals
from core.runtime.listen import listen, trio_listener
from core.runtime.watch import Cell
from injector.cluster import ApiNamespaces, EventTeller
from injector.config import Config
from injector.mesh import InvalidMesh, read_mesh
from injector.metrics import Metrics
from injector.webhook import Webhook

_LOOK_S = 2.0  # the kubelet brings a changed ConfigMap within a minute or so; this is what we add
_LAME_S = 5.0  # between /ready's no and the end of accepting: until then the API server may still have our address

log = logs.logger("injector")


class MeshFile:
    """The file with the mesh settings, followed: settings that cannot be used change nothing. Raises InvalidMesh or OSError at first."""

    def __init__(self, path: Path, metrics: Metrics | None = None) -> None:
        self.mesh = Cell(read_mesh(path.read_bytes()))
        self._path = path
        self._metrics = metrics
        self._problem = ""

    def look(self) -> None:
        """Take what changed. A small local file: reading it costs less than a thread."""
        try:
            found = read_mesh(self._path.read_bytes())
        except (InvalidMesh, OSError) as error:
            if str(error) != self._problem:
                self._note(ok=False)
                log.error("mesh settings refused, the earlier ones stay", path=str(self._path), reason=str(error))
            self._problem = str(error)
            return
        self._problem = ""
        if found != self.mesh.value:
            self.mesh.set(found)
            self._note(ok=True)
            log.info("mesh settings taken", path=str(self._path), image=found.image, capture=found.capture)

    async def follow(self) -> None:
        """For ever."""
        while True:
            await trio.sleep(_LOOK_S)
            self.look()

    def _note(self, *, ok: bool) -> None:
        if self._metrics is not None:
            self._metrics.reloaded(ok=ok)


def source_of(config: Config, api: Api) -> Source:
    """Where our serving certificate comes from."""
    names = [service_name(config.service, config.control_namespace)]
    webhooks = [("mutatingwebhookconfigurations", config.webhook)]
    return SharedSecret(api, config.control_namespace, config.serving_secret, names, webhooks)


async def run(config: Config) -> None:
    """Serve until SIGTERM. Raises InvalidMesh, core.k8s.cluster.NoCluster, core.runtime.listen.CannotListen, OSError."""
    metrics, drain = Metrics(), Drain()
    file = MeshFile(Path(config.mesh_file), metrics)
    sockets, admin_socket = [listen(config.listen)], listen(config.admin_listen)
    async with connect(config.kubeconfig, user_agent="pillion-injector") as api, trio.open_nursery() as nursery:
        serving = ServingCertificate(source_of(config, api))
        events = EventRecorder(api, "pillion.dev/injector", os.environ.get("PILLION_POD_NAME", "injector"))
        webhook = Webhook(file.mesh, ApiNamespaces(api), EventTeller(events), metrics)
        _watch(metrics, serving, lambda: float(events.dropped))
        admin = AdminServer(standard_routes(not_ready=lambda: _not_ready(serving, drain), metrics=metrics.exposition, shutdown=drain.start))
        await nursery.start(drain_on_signals, drain)
        await nursery.start(admin.serve, [trio_listener(admin_socket)])
        nursery.start_soon(serving.keep)
        nursery.start_soon(events.run)
        nursery.start_soon(file.follow)
        log.info("serving", listen=str(config.listen), image=file.mesh.value.image, capture=file.mesh.value.capture)

        async def ended() -> None:
            await drain.wait_started()
            webhook.closing = True
            with trio.move_on_after(_LAME_S):
                await drain.wait_hurried()

        await serve_https(webhook.application(), serving.context, sockets, ended)
        nursery.cancel_scope.cancel()


def _watch(metrics: Metrics, serving: ServingCertificate, dropped: Callable[[], float]) -> None:
    metrics.watch(
        "pillion_injector_serving_expiry_timestamp_seconds", "When our certificate ends, 0 without one.", lambda: serving.not_after
    )
    metrics.watch("pillion_injector_events_dropped", "Occurrences that no Event tells about.", dropped)


def _not_ready(serving: ServingCertificate, drain: Drain) -> list[str]:
    return [*([f"draining: {drain.reason}"] if drain.started else []), *serving.not_ready]
