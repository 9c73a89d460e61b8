"""Puts the identity service on Kubernetes together and runs it. Called by `identity.__main__`.

Order: the admin port answers at once; then the Secret is followed until it holds an authority, which the leader makes; then certificates
are handed out. A replica that has served once stays ready while the API server is away: it could not check tokens, and nobody else could.
"""

from __future__ import annotations

import trio

from core.k8s.api import Api
from core.k8s.cluster import connect
from core.k8s.errors import ApiError
from core.k8s.events import About, EventRecorder, Type
from core.k8s.lease import Election, Elector, Leases
from core.runtime import logs
from core.runtime.admin import AdminServer, standard_routes
from core.runtime.drain import Drain, drain_on_signals
from core.runtime.listen import listen, trio_listener
from identity.admin import listen_admin, serve_admin
from identity.admin_wire import Answer
from identity.authority import Authority
from identity.cluster.given import GivenSecret
from identity.cluster.leader import Leader
from identity.cluster.peers import Peers
from identity.cluster.shared import Shared, Superseded
from identity.config import SERVICE_ACCOUNT, Config
from identity.issuer import IssuerExpired
from identity.metrics import cluster_exposition, exposition
from identity.serve import Capacity, ServingCertificate, serve_https
from identity.service import IdentityService
from identity.tokens import KubernetesReviewer, Subject
from identity.wire import Known

_PRUNE_EVERY_S = 10.0
_ISSUER_RETRY_S = 2.0

log = logs.logger("identity")


async def run_on_kubernetes(config: Config) -> None:
    """Serve until SIGTERM. Raises NoCluster, OSError."""
    async with connect(user_agent="pillion-identity") as api, trio.open_nursery() as nursery:
        replica = Replica(config, api, nursery)
        await nursery.start(drain_on_signals, replica.drain)
        await replica.run()
        nursery.cancel_scope.cancel()


class Replica:
    """One process and its parts. nursery: for its tasks; cancel it when `run` returns."""

    def __init__(self, config: Config, api: Api, nursery: trio.Nursery, election: Election | None = None) -> None:
        self.config = config
        self.api = api
        self.nursery = nursery
        self.drain = Drain()
        self.shared = Shared(api, config.control_namespace, config.state_secret, config.trust_domain, lifetime_s=config.leaf_lifetime_s)
        self.elector = Elector(Leases(api), election or Election(config.control_namespace, SERVICE_ACCOUNT, config.pod_name))
        self.events = EventRecorder(api, "pillion.dev/identity", config.pod_name)
        self.given: GivenSecret | None = None
        if config.issuer_secret:
            self.given = GivenSecret(api, config.identity, config.issuer_secret, self.shared.clock, self.tell)
        self.reviewer = KubernetesReviewer(api, config.trust_domain)
        self.service: IdentityService | None = None
        self.serving: ServingCertificate | None = None
        self.leader: Leader | None = None
        self.expired = ""
        self.served = trio.Event()

    async def run(self) -> None:
        """Serve until the drain."""
        config, nursery = self.config, self.nursery
        admin_sock = listen(config.admin_listen)
        routes = standard_routes(not_ready=self.not_ready, metrics=self.metrics, shutdown=self.drain.start)
        await nursery.start(AdminServer(routes).serve, [trio_listener(admin_sock)])
        for task in (self.shared.follow, self.events.run, self.elector.run, self.begin, self.lead, self.serve):
            nursery.start_soon(task)
        if config.admin_socket is not None:
            nursery.start_soon(serve_admin, self.answer, listen_admin(config.admin_socket))
        await self.drain.wait_started()
        if self.service is not None:
            await self.served.wait()

    async def begin(self) -> None:
        """With a given issuer, any replica may make the first state: while a mesh moves to one, a replica of the old kind still leads."""
        while self.given is not None and self.shared.authority.value is None:
            try:
                if self.shared.vacant:
                    await self.given.begin(self.shared)
            except (ApiError, trio.TooSlowError, Superseded) as error:
                log.warning("no first state yet, will be tried again", reason=str(error) or type(error).__name__)
            await trio.sleep(_ISSUER_RETRY_S)

    async def serve(self) -> None:
        """Hand out certificates from the moment there is an authority, until the drain."""
        config = self.config
        authority = await self.shared.authority.wait_for(lambda value: value is not None)
        assert authority is not None
        sock, capacity = listen(config.listen), Capacity.of_process()
        try:
            self.serving = await self.first_certificate(authority)
            self.service = IdentityService(
                authority,
                self.reviewer,
                peer=config.identity,
                failed=self.failed,
                catch_up=self.shared.catch_up,
                polls_max=capacity.polls,
            )
            self.drain.subscribe(self.service.drain)
            self.nursery.start_soon(self.serving.keep)
            self.nursery.start_soon(_prune, authority)
            trust = authority.trust.value
            log.info(
                "serving", listen=str(config.listen), identity=config.identity.uri, generation=trust.generation, issuer=trust.issuer.id
            )
            await serve_https(self.service.application(), self.serving.context, [sock], self.drain.wait_started, capacity)
        finally:
            self.served.set()
            sock.close()

    async def first_certificate(self, authority: Authority) -> ServingCertificate:
        """Ours; waits for a renewed issuer when the one in force has expired."""
        while True:
            try:
                found = ServingCertificate(authority, self.config.identity)
            except IssuerExpired as error:
                if not self.expired:
                    log.error("nothing can be signed", reason=str(error))
                self.expired = str(error)
                await trio.sleep(_ISSUER_RETRY_S)
            else:
                self.expired = ""
                return found

    async def lead(self) -> None:
        """The leader's duties, whenever we lead."""
        leading = self.elector.leader
        while True:
            await leading.wait_for(bool)
            self.leader = Leader(self.api, self.shared, self.peers(), self.config.identity, self.given, self.known, self.tell)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.leader.run)
                await leading.wait_for(lambda leads: not leads)
                nursery.cancel_scope.cancel()
            self.leader = None

    def peers(self) -> Peers:
        """The other replicas."""
        config = self.config
        assert config.token_file is not None, "Config.check"
        return Peers(self.api, config.identity, config.pod_name, config.listen.port, config.token_file)

    # --- what others ask -----------------------------------------------------------------------------------------------------

    async def answer(self, line: bytes) -> Answer:
        """An operator's request."""
        if self.leader is None or not self.elector.leads():
            who = self.elector.holder or "again, nobody leads yet"
            return Answer(f"this replica, {self.config.pod_name}, does not lead; ask {who}", again=True)
        return await self.leader.answer(line)

    def not_ready(self) -> list[str]:
        """Reasons, none when ready."""
        reasons = [f"draining: {self.drain.reason}"] if self.drain.started else []
        authority = self.shared.authority.value
        if authority is None:
            reasons.append(self.shared.problem)
            if self.shared.unreachable:
                reasons.append(f"the API server does not answer: {self.shared.unreachable}")
            if self.given is not None and self.given.problem:
                reasons.append(self.given.problem)
            if not self.elector.holder:
                reasons.append("nobody leads yet")
        elif self.expired or authority.issuer.not_after <= authority.clock():
            reasons.append("the issuer's chain has expired: renew the issuer")
        elif self.service is None:
            reasons.append("not serving yet")
        return reasons

    def metrics(self) -> bytes:
        """Prometheus' text."""
        authority = self.shared.authority.value
        text = b""
        if authority is not None and self.service is not None and self.serving is not None:
            text = exposition(authority, self.service, self.serving)
        publisher = self.leader.publisher if self.leader is not None else None
        return text + cluster_exposition(
            leading=self.elector.leader.value,
            unreachable=bool(self.shared.unreachable),
            events_dropped=self.events.dropped,
            published=publisher.written if publisher else None,
            publish_failed=publisher.failed if publisher else None,
            unpublished=len(publisher.unpublished()) if publisher else None,
            waiting=len(self.leader.waits_for) if self.leader else None,
        )

    # --- Events --------------------------------------------------------------------------------------------------------------

    def failed(self, subject: Subject, word: str, sentence: str) -> None:
        """A caller with a good token got no certificate: its owner sees why on the pod, we on ours when it is our fault."""
        about = About("Pod", subject.identity.namespace, subject.pod_name, subject.pod_uid)
        self.events.record(about, "Warning", word, "Certify", sentence)
        if word == "IssuerExpired":
            self.tell("Warning", word, sentence)

    def tell(self, type_: Type, reason: str, note: str) -> None:
        """An Event about this pod."""
        about = About("Pod", self.config.control_namespace, self.config.pod_name, self.config.pod_uid)
        self.events.record(about, type_, reason, "Issue", note)

    def known(self) -> Known:
        """What this replica knows of the workloads; raises Superseded before it serves."""
        if self.service is None:
            raise Superseded("this replica does not serve yet")
        return self.service.known()


async def _prune(authority: Authority) -> None:
    """Forget expired leaves; for ever."""
    while True:
        authority.ledger.prune(authority.clock())
        await trio.sleep(_PRUNE_EVERY_S)
