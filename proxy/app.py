"""The sidecar as a whole: the only module that constructs everything. Settings in, a running process out.

Order of life: admin port first (so that probes see why we are not ready), then identity and policy in the background, then the two
listeners. Drain: readiness off, stop accepting, GOAWAY or ``connection: close``, wait for what is open, at most the grace time.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import trio

from core.credentials import Credentials
from core.runtime import logs
from core.runtime.admin import AdminServer, Routes, standard_routes
from core.runtime.drain import Drain, drain_on_signals
from core.runtime.listen import listen, trio_listener
from core.runtime.process import most_files, read_process
from core.runtime.secrecy import keep_memory_private
from core.runtime.sockets import tune_within_pod
from core.runtime.watch import Cell
from identity.client import IdentitySettings, keep_certified
from policy.client import PolicyClient
from policy.wire import Hello
from proxy import hook
from proxy.capture_proof import CaptureProof
from proxy.config import Config
from proxy.discover import Discovery, PolicySource
from proxy.dumps import dump_routes
from proxy.engines import HttpEngines
from proxy.hold import end_unproven, release
from proxy.inbound.serve import Inbound
from proxy.intake import Intake
from proxy.live import Live
from proxy.outbound.deadlines import Deadlines
from proxy.outbound.gate import Toolkit
from proxy.outbound.pool import Http1Pool, Http2Pool
from proxy.outbound.serve import Outbound
from proxy.probes import PREFIX, ProbeRunner, read_probes
from proxy.protocol.http1 import Http1Limits
from proxy.protocol.http2 import Http2Limits
from proxy.telemetry.access_log import EVENT, Mode
from proxy.telemetry.metrics import Metrics, build_info, process_samples
from proxy.telemetry.prometheus import Sample
from proxy.telemetry.record import Recorder
from proxy.transport.accept import accepting
from proxy.transport.connect import Dialer
from proxy.transport.listener import Listener
from proxy.transport.relay import Relay
from proxy.transport.secure import Security

VERSION = "0.1.0"
_log = logs.logger("proxy")
_access = logs.logger("access")

_REPLAY_BYTES = 16 << 10  # of a request's body kept for a retry: enough for an API call, too little for an upload


class _Certificates:
    """Tells the metrics and the log what happens to our certificate."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def certified(self, credentials: Credentials) -> None:
        self._metrics.certified(credentials.not_after, time.time())
        _log.info("certified", identity=credentials.identity.uri, expires_at=int(credentials.not_after))

    def bundle_changed(self, credentials: Credentials, generation: int) -> None:
        _log.info("trust bundle replaced", generation=generation)

    def failed(self, reason: str, detail: str, retry_in_s: float) -> None:
        self._metrics.certification_failed(reason)
        _log.warning("certification failed", reason=reason, detail=detail, retry_in_s=round(retry_in_s, 2))


class Sidecar:
    """All parts of one sidecar.

    source: where policy comes from, if not from the controller the settings name. clock: seconds, for every deadline of the data path.
    """

    def __init__(
        self, config: Config, nursery: trio.Nursery, source: PolicySource | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.drain = Drain()
        self.credentials: Cell[Credentials | None] = Cell(None)
        self.metrics = Metrics(clock)
        self.relay = Relay(_report_crash, clock)
        self.live = Live(self.relay)
        hello = Hello(config.namespace, config.pod, VERSION)
        policy_addr = (config.policy_addr.host, config.policy_addr.port)
        self.policy = PolicyClient(policy_addr, config.control_identity("pillion-policy"), self.credentials, hello)
        self.discovery = Discovery(source or self.policy, config.trust_domain, config.policy_wait_s, clock)
        self.recorder = Recorder(self.metrics, time.monotonic, _write_log, Mode(config.access_log), _write_access)
        security = Security(config.identity, self.credentials, config.handshake_timeout_s)
        dialer = Dialer(security, config.connect_timeout_s, config.pod_ips)
        engines = HttpEngines(self.relay, self.live, *_limits(config))
        self.inbound = Inbound(config, self.discovery, security, dialer, self.relay, self.live, self.recorder, nursery, engines)
        engines = HttpEngines(self.relay, self.live, *_limits(config, replay_bytes=_REPLAY_BYTES))
        self.http1_pool = Http1Pool(self.relay, config.pool_idle_s)
        self.http2_pool = Http2Pool(self.relay, replace(engines.http2, idle_timeout_s=max(config.pool_idle_s, 1.0)))
        deadlines = Deadlines(self.relay, nursery, clock)
        toolkit = Toolkit(dialer, self.relay, nursery, self.http1_pool, self.http2_pool, deadlines, clock)
        self.outbound = Outbound(config, self.discovery, toolkit, self.live, self.recorder, engines)
        self.proof = CaptureProof(config.outbound_listen.port)
        self.intake = Intake(self.inbound, self.outbound, self.proof, most_files(), _report_crash)
        self.metrics.add_source(self._samples)

    def _samples(self) -> Iterator[Sample]:
        yield build_info(VERSION, platform.python_version())
        yield from process_samples(*read_process())

    def not_ready(self) -> list[str]:
        """Why traffic should not come here now, one sentence each; empty when it may."""
        reasons = []
        credentials = self.credentials.value
        if self.drain.started:
            reasons.append(f"draining: {self.drain.reason}")
        if self.config.prove_capture and self.proof.problem:
            reasons.append(f"capture is not proven: {self.proof.problem}")
        if credentials is None:
            reasons.append("no certificate yet from the identity service")
        elif credentials.not_after <= time.time():
            reasons.append("the certificate has expired and could not be renewed")
        missing = [str(port) for port in self.config.inbound_ports if self.discovery.port(port).authorizer is None]
        if missing:
            reasons.append(f"no policy yet for port {', '.join(missing)}")
        elif not self.config.inbound_ports and not self.policy.connected.value and not self.discovery.ports:
            reasons.append("not connected to the policy controller yet")
        return reasons


async def run(config: Config) -> None:
    """Run the sidecar until it is told to end and has drained."""
    keep_memory_private()
    async with trio.open_nursery() as nursery:
        sidecar = Sidecar(config, nursery)
        await nursery.start(drain_on_signals, sidecar.drain)
        await nursery.start(AdminServer(admin_routes(sidecar)).serve, [trio_listener(listen(config.admin_listen))])
        if config.prove_capture:
            nursery.start_soon(release, hook.listener(), sidecar.not_ready, sidecar.proof)
            nursery.start_soon(end_unproven, sidecar.proof)
        nursery.start_soon(sidecar.relay.run)
        nursery.start_soon(keep_certified, _identity_settings(config), sidecar.credentials, _Certificates(sidecar.metrics))
        nursery.start_soon(sidecar.policy.run)
        nursery.start_soon(sidecar.discovery.run)
        for port in config.inbound_ports:
            sidecar.discovery.port(port)
        listeners = accept_both(sidecar)
        if config.prove_capture:
            nursery.start_soon(sidecar.proof.prove)
        gc.collect()
        gc.freeze()  # what exists now lives for ever: later collections need not look at it
        await sidecar.drain.wait_started()
        await finish(sidecar, listeners)
        nursery.cancel_scope.cancel()


def admin_routes(sidecar: Sidecar) -> Routes:
    """What the admin port answers: standard routes, dumps without secrets, and the app's own probes."""
    config = sidecar.config
    routes = standard_routes(
        not_ready=sidecar.not_ready, metrics=sidecar.metrics.render, shutdown=sidecar.drain.start if config.shutdown_endpoint else None
    )
    routes |= dump_routes(config, sidecar.credentials, sidecar.discovery)
    routes["GET", PREFIX] = ProbeRunner(read_probes(config.probes), config.pod_ips[0] if config.pod_ips else "127.0.0.1").handle
    return routes


def accept_both(sidecar: Sidecar) -> tuple[Listener, Listener]:
    """Accept on both ports from now on, until both listeners are aborted; raises CannotListen."""
    config = sidecar.config
    inbound, outbound = listen(config.inbound_listen), listen(config.outbound_listen)
    tune_within_pod(outbound)
    listeners = (
        accepting(sidecar.relay, inbound, sidecar.intake.take_inbound, sidecar.intake.admit_inbound),
        accepting(sidecar.relay, outbound, sidecar.intake.take_outbound, sidecar.intake.admit_outbound),
    )
    _log.info("listening", inbound=str(config.inbound_listen), outbound=str(config.outbound_listen))
    return listeners


async def finish(sidecar: Sidecar, listeners: tuple[Listener, Listener]) -> None:
    """Accept no more and end what is open, in order, within the grace time or until a second signal."""
    for listener in listeners:
        listener.abort()
    sidecar.live.drain()
    sidecar.http1_pool.close_idle()
    sidecar.http2_pool.drain()
    with trio.move_on_after(sidecar.config.shutdown_grace_s):
        async with trio.open_nursery() as nursery:

            async def hurried() -> None:
                await sidecar.drain.wait_hurried()
                nursery.cancel_scope.cancel()

            nursery.start_soon(hurried)
            await sidecar.live.wait_none()
            nursery.cancel_scope.cancel()
    _log.info("ended", open_connections=len(sidecar.live))


def _identity_settings(config: Config) -> IdentitySettings:
    return IdentitySettings(
        addr=(config.identity_addr.host, config.identity_addr.port),
        expect=config.control_identity("pillion-identity"),
        identity=config.identity,
        token_file=Path(config.token_file),
        anchors_file=Path(config.anchors_file),
    )


def _limits(config: Config, *, replay_bytes: int = 0) -> tuple[Http1Limits, Http2Limits]:
    http1 = Http1Limits(
        target_bytes=config.max_target_bytes,
        head_bytes=config.max_head_bytes,
        header_count=config.max_header_count,
        header_timeout_s=config.header_timeout_s,
        idle_timeout_s=config.idle_timeout_s,
        replay_bytes=replay_bytes,
    )
    return http1, Http2Limits(
        header_list_bytes=config.max_head_bytes,
        header_count=config.max_header_count,
        max_target=config.max_target_bytes,
        idle_timeout_s=config.idle_timeout_s,
        replay_bytes=replay_bytes,
    )


def _write_log(level: str, event: str, **fields: object) -> None:
    getattr(_log, level)(event, **fields)


def _write_access(fields: Mapping[str, object]) -> None:
    _access.info(EVENT, **fields)


def _report_crash(error: BaseException) -> None:
    _log.error("a bug of ours ended a connection", exc_info=error)
