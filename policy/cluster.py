"""The policy controller on a cluster: which kinds it follows, and what runs beside it there: webhook, election, statuses.

Constructs; decides nothing. Every replica serves sidecars and the webhook, the leader alone writes. Called by policy.__main__.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import trio

from core.k8s.api import Api
from core.k8s.apiserver import ApiServerSource, Counters, Resource
from core.k8s.cluster import NoCluster, connect
from core.k8s.fields import Raw
from core.k8s.https import serve_https
from core.k8s.lease import Election, Elector, Leases
from core.k8s.objects import Object
from core.k8s.serving import ServingCertificate, SharedSecret, service_name
from core.refs import Ref
from core.runtime.listen import listen
from core.runtime.watch import Cell
from policy.admission import parse_object
from policy.config import Config
from policy.controller import Controller, KeepCertified, run
from policy.diagnostics import lines_of
from policy.model import GATEWAY_GROUP, GROUP, VERSION
from policy.status_writer import StatusWriter
from policy.webhook import Webhook

__all__ = ["RESOURCES", "NoCluster", "run_on_cluster"]


_LEASE = "pillion-policy"
_ANNOTATIONS = "pillion.dev/"  # what ours contain; of others an index of ten thousand pods would carry megabytes
_OURS = "its CustomResourceDefinition is missing: run `pillion install`"
_GATEWAY = "install the Gateway API's CustomResourceDefinitions (standard channel); routes have no effect until then"

RESOURCES = (
    Resource("", "Namespace", "namespaces"),
    Resource("", "Node", "nodes"),
    Resource("", "Pod", "pods"),
    Resource("", "Service", "services"),
    Resource("discovery.k8s.io", "EndpointSlice", "endpointslices"),
    Resource(GROUP, "Server", "servers", (VERSION,), _OURS),
    Resource(GROUP, "AuthorizationPolicy", "authorizationpolicies", (VERSION,), _OURS),
    Resource(GROUP, "MeshTLSAuthentication", "meshtlsauthentications", (VERSION,), _OURS),
    Resource(GROUP, "NetworkAuthentication", "networkauthentications", (VERSION,), _OURS),
    Resource(GATEWAY_GROUP, "HTTPRoute", "httproutes", ("v1", "v1beta1"), _GATEWAY, optional=True),
    Resource(GATEWAY_GROUP, "GRPCRoute", "grpcroutes", ("v1",), _GATEWAY, optional=True),
)


def parse_slim(raw: Raw) -> Object | None:
    """`parse_object` without the annotations that nobody here reads."""
    metadata = raw.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("annotations"), dict):
        kept = {key: value for key, value in metadata["annotations"].items() if _ANNOTATIONS in key}
        raw = dict(raw, metadata=metadata | {"annotations": kept})
    return parse_object(raw)


async def run_on_cluster(config: Config, keep_certified: KeepCertified) -> None:
    """Serve until SIGTERM. Raises NoCluster, CannotListen and OSError."""
    async with connect(config.kubeconfig, user_agent="pillion-policy") as api:
        beside = Beside(config, api)
        await run(config, beside.source, keep_certified, beside)


class Beside:
    """The controller's Companion on a cluster, and an Observer of its source."""

    def __init__(self, config: Config, api: Api) -> None:
        self.source = ApiServerSource(api, RESOURCES, parse_slim, self)
        self._config = config
        self._api = api
        self._webhook = Webhook()
        self._serving = _serving(config, api) if config.serve_webhook == "on" else None
        self._elector = Elector(Leases(api), Election(config.control_namespace, _LEASE, config.pod_name)) if config.pod_name else None
        self._statuses: StatusWriter | None = None
        self._sockets: list[socket.socket] = []

    # --- Observer -------------------------------------------------------------------------------------------------------------

    def seen(self, ref: Ref, raw: dict[str, Any]) -> None:
        """See core.k8s.apiserver.Observer."""
        assert self._statuses is not None, "the source runs after us"
        self._statuses.seen(ref, raw)

    def gone(self, ref: Ref) -> None:
        """See core.k8s.apiserver.Observer."""
        assert self._statuses is not None, "the source runs after us"
        self._statuses.gone(ref)

    # --- Companion ------------------------------------------------------------------------------------------------------------

    def attach(self, controller: Controller) -> None:
        """Before the source runs."""
        leads = self._elector.leads if self._elector else bool
        if self._serving is not None:
            self._sockets = [listen(self._config.webhook_listen)]
        self._statuses = controller.listener = StatusWriter(self._api, controller.index, self._refusals, leads)

    async def run(self, controller: Controller) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            if self._serving is not None:
                nursery.start_soon(self._serving.keep)
                application = self._webhook.application()
                nursery.start_soon(serve_https, application, self._serving.context, self._sockets, trio.sleep_forever)
            if self._elector is not None:
                await controller.wait_synced()  # whoever leads must know what to write
                nursery.start_soon(self._elector.run)
                nursery.start_soon(self._write, self._elector.leader)

    async def _write(self, leader: Cell[bool]) -> None:
        assert self._statuses is not None
        await self._statuses.run(leader)

    def _refusals(self) -> Mapping[Ref, str]:
        return {refusal.ref: refusal.reason for refusal in self.source.refusals if refusal.ref is not None}

    def not_ready(self) -> list[str]:
        """Of the webhook; an election without a leader is no reason to serve nobody."""
        return self._serving.not_ready if self._serving is not None else []

    def exposition(self) -> bytes:
        """Metrics of the watches, the webhook and the statuses."""
        watches = list(self.source.metrics())
        statuses = self._statuses
        return lines_of(
            [
                ("pillion_policy_watch_connected", "gauge", "Whether the kind is watched now", _by_kind(watches, "connected")),
                ("pillion_policy_lists_total", "counter", "Complete lists of the kind", _by_kind(watches, "lists")),
                ("pillion_policy_watch_events_total", "counter", "Changes seen", _by_kind(watches, "events")),
                ("pillion_policy_watch_failures_total", "counter", "Lists and watches that failed", _by_kind(watches, "failures")),
                (
                    "pillion_policy_admission_total",
                    "counter",
                    "Reviews answered",
                    {
                        '{result="allowed"}': self._webhook.allowed,
                        '{result="refused"}': self._webhook.refused,
                        '{result="failed"}': self._webhook.failed,
                    },
                ),
                ("pillion_policy_leader", "gauge", "Whether this replica writes statuses", {"": int(self._leads())}),
                ("pillion_policy_statuses_written_total", "counter", "Statuses written", {"": statuses.written if statuses else 0}),
                ("pillion_policy_statuses_failed_total", "counter", "Statuses not written", {"": statuses.failed if statuses else 0}),
            ]
        )

    def _leads(self) -> bool:
        return self._elector is not None and self._elector.leads()


def _by_kind(watches: list[tuple[str, Counters]], field: str) -> dict[str, int]:
    return {f'{{kind="{kind}"}}': int(getattr(counters, field)) for kind, counters in watches}


def _serving(config: Config, api: Api) -> ServingCertificate:
    names = [service_name(config.service, config.control_namespace)]
    webhooks = [("validatingwebhookconfigurations", config.webhook)]
    return ServingCertificate(SharedSecret(api, config.control_namespace, config.serving_secret, names, webhooks))
