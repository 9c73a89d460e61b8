"""An issuer that somebody else keeps in a Secret of kubernetes.io/tls: cert-manager, or an operator.

Reads it and makes the first state from it; how the state follows it, step by step, is `leader`'s and `Authority.converge`'s. What does not
make a valid issuer changes nothing, and is told.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography import x509

from core.k8s.api import Api, object_path
from core.k8s.errors import NotFound
from core.k8s.events import Type
from core.names import WorkloadId
from core.runtime import logs
from identity.authority import Authority
from identity.chains import certificate_id
from identity.cluster.shared import Shared
from identity.issuer import Issuer, IssuerInvalid, load_issuer
from identity.snapshot import STATE, SnapshotDamaged, SnapshotStore, read_secret, secret_values
from identity.store import StoreUnsafe

log = logs.logger("identity")

Tell = Callable[[Type, str, str], None]
"""(type, reason, note) of an Event about this pod."""

Given = tuple[Issuer, list[x509.Certificate]]


class GivenSecret:
    """One Secret. problem: why its newest version is not used, empty when it is."""

    def __init__(self, api: Api, ours: WorkloadId, name: str, clock: Callable[[], float], tell: Tell) -> None:
        self.where = f"Secret {ours.namespace}/{name}"
        self.problem = ""
        self._api = api
        self._path = object_path("", "v1", "secrets", ours.namespace, name)
        self._trust_domain = ours.trust_domain
        self._clock = clock
        self._tell = tell
        self._own: SnapshotStore | None = None

    async def read(self) -> Given | None:
        """Issuer and anchors, None when they do not do. Raises ApiError."""
        try:
            secret = await self._api.get(self._path)
            values = secret_values(secret)
            absent = [name for name in ("tls.crt", "tls.key", "ca.crt") if not values.get(name)]
            if absent:
                raise IssuerInvalid(f"it has no {', '.join(absent)}")
            found = load_issuer(values["tls.crt"], values["tls.key"], values["ca.crt"], self._clock())
            self._own = read_secret(secret) if STATE in values else None
        except NotFound:
            self._refuse("it does not exist")
        except (SnapshotDamaged, IssuerInvalid) as error:
            self._refuse(str(error))
        else:
            self.problem = ""
            return found
        return None

    async def begin(self, shared: Shared) -> None:
        """Fill the empty state from this Secret; whoever is first, which the API server settles. Raises as `Shared.change`."""
        found = await self.read()
        if found is not None:
            issuer, anchors = found
            await shared.begin(lambda store: self._first(store, issuer, anchors))

    def _first(self, store: SnapshotStore, issuer: Issuer, anchors: list[x509.Certificate]) -> Authority:
        """What we kept in this very Secret while the issuer was our own is gone on with: generations, and anchors that are still needed."""
        own = self._own
        if own is not None and own.state is not None:
            try:
                before = Authority.restored(own.state, own, self._trust_domain, lifetime_s=0, clock=self._clock)
            except (StoreUnsafe, KeyError, ValueError):
                before = None  # somebody has written another issuer over it already
            if before is not None and before.issuer.ref == issuer.ref:
                store.state, store.keys = own.state, dict(own.keys)
        return Authority.given(self._trust_domain, issuer, anchors, store, clock=self._clock)

    def _refuse(self, why: str) -> None:
        problem = f"{self.where} is not used: {why}"
        if problem != self.problem:
            log.error("given issuer", problem=problem)
            self._tell("Warning", "IssuerInvalid", problem)
        self.problem = problem


def differs(authority: Authority, issuer: Issuer, anchors: list[x509.Certificate]) -> bool:
    """Whether `Authority.converge` would change anything."""
    trust, wanted = authority.trust.value, {certificate_id(anchor) for anchor in anchors}
    return issuer.ref.id != trust.issuer.id or wanted != set(trust.kept) or any(trust.anchor(one) is None for one in wanted)
