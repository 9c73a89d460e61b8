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
from core.k8s.serving import MountedFiles, ServingCertificate, SharedSecret, Source, service_name
from core.runtime import logs
from core.runtime.admin import AdminServer, standard_routes
from core.runtime.drain import Drain, drain_on_signals
from core.runtime.listen import listen, trio_listener
from core.runtime.watch import Cell
from injector.cluster import ApiNamespaces, EventTeller
from injector.config import Config
from injector.mesh import InvalidMesh, Mesh, read_mesh
from injector.metrics import Metrics
from injector.webhook import Webhook

_LOOK_S = 2.0  # the kubelet brings a changed ConfigMap within a minute or so; this is what we add
_LAME_S = 1.0  # between /ready's no and the end of accepting: the API server still has our address for a moment

log = logs.logger("injector")


def read_mesh_file(path: Path) -> Mesh:
    """Raises InvalidMesh or OSError."""
    return read_mesh(path.read_bytes())


async def follow_mesh(path: Path, mesh: Cell[Mesh], metrics: Metrics) -> None:
    """Keep the settings equal to their file; for ever. Settings that cannot be used change nothing."""
    refused: bytes | None = None
    while True:
        await trio.sleep(_LOOK_S)
        text = b""
        try:
            text = await trio.Path(path).read_bytes()
            found = read_mesh(text)
        except (InvalidMesh, OSError) as error:
            if text != refused:
                refused = text
                metrics.reloaded(ok=False)
                log.error("mesh settings refused, the earlier ones stay", path=str(path), reason=str(error))
            continue
        refused = None
        if found != mesh.value:
            mesh.set(found)
            metrics.reloaded(ok=True)
            log.info("mesh settings taken", path=str(path), image=found.image, capture=found.capture)


def source_of(config: Config, api: Api) -> Source:
    """Where our serving certificate comes from."""
    if config.serving_dir:
        return MountedFiles(Path(config.serving_dir))
    names = [service_name(config.service, config.control_namespace)]
    webhooks = [("mutatingwebhookconfigurations", config.webhook)]
    return SharedSecret(api, config.control_namespace, config.serving_secret, names, webhooks)


async def run(config: Config) -> None:
    """Serve until SIGTERM. Raises InvalidMesh, core.k8s.cluster.NoCluster, core.runtime.listen.CannotListen, OSError."""
    mesh = Cell(read_mesh_file(Path(config.mesh_file)))
    sockets, admin_socket = [listen(config.listen)], listen(config.admin_listen)
    metrics, drain = Metrics(), Drain()
    async with connect(config.kubeconfig, user_agent="pillion-injector") as api, trio.open_nursery() as nursery:
        serving = ServingCertificate(source_of(config, api))
        events = EventRecorder(api, "pillion.dev/injector", os.environ.get("PILLION_POD_NAME", "injector"))
        webhook = Webhook(mesh, ApiNamespaces(api), EventTeller(events), metrics)
        _watch(metrics, serving, lambda: float(events.dropped))
        admin = AdminServer(standard_routes(not_ready=lambda: _not_ready(serving, drain), metrics=metrics.exposition, shutdown=drain.start))
        await nursery.start(drain_on_signals, drain)
        await nursery.start(admin.serve, [trio_listener(admin_socket)])
        nursery.start_soon(serving.keep)
        nursery.start_soon(events.run)
        nursery.start_soon(follow_mesh, Path(config.mesh_file), mesh, metrics)
        log.info("serving", listen=str(config.listen), image=mesh.value.image, capture=mesh.value.capture)

        async def ended() -> None:
            await drain.wait_started()
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
