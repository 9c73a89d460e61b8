"""The certificate authority as one object: trust state, issuers, ledger, and the store behind them.

Decides nothing that the pure modules can decide; it brings them together with clock and disk, so that what it answers is what is
stored. Synchronous throughout: no state is ever seen half changed. Called by `service`, `admin`, `given` and `__main__`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from core.names import WorkloadId
from core.runtime.watch import Cell
from identity import bundle
from identity.bundle import Anchor, Refusal, Step, TrustState
from identity.chains import ANCHORS_MAX, certificate_id
from identity.issuer import CLOCK_SKEW_S, LEAF_LIFETIME_S, Issuer, Pair, SignedLeaf, make_issuer, make_root, sign_leaf
from identity.ledger import Holding, Leaf, Ledger
from identity.store import StateStore, StoredAnchor, StoredIssuer, StoredState, StoreUnsafe
from identity.tokens import Subject
from identity.wire import Bundle, Certified

_RENEW_ISSUER_AT = 1 / 3  # of its life left: months of room for a service that is down


class Authority:
    """See the module. trust: the state in force, for everybody who waits for the next one.

    obstacles: what else stands in the way of SWITCH and DROP besides the workloads in the ledger, each as one phrase. is_given: somebody
    else keeps the issuer, and `converge` follows him.
    """

    def __init__(
        self,
        trust_domain: str,
        trust: TrustState,
        issuers: dict[str, Issuer],
        roots: dict[str, Pair],
        store: StateStore | None,
        *,
        lifetime_s: float = LEAF_LIFETIME_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.trust_domain = trust_domain
        self.trust = Cell(trust)
        self.ledger = Ledger()
        self.lifetime_s = lifetime_s
        self.clock = clock
        self.obstacles: tuple[str, ...] = ()
        self.is_given = False
        self._issuers = issuers
        self._roots = roots
        self._store = store
        if store is not None:
            for holding in store.load_journal():
                self.ledger.restore(holding)
            # Also mends a last line that a crash cut short, before anything is appended to it.
            store.compact_journal(list(self.ledger.live(clock())))
        self.ledger.prune(clock())

    @classmethod
    def self_made(
        cls, trust_domain: str, store: StateStore | None, *, lifetime_s: float = LEAF_LIFETIME_S, clock: Callable[[], float] = time.time
    ) -> Authority:
        """The authority in ``store`` or, on first start, a fresh root and issuer. Raises StoreUnsafe."""
        stored = store.load() if store else None
        if store is not None and stored is not None:
            again = cls.restored(stored, store, trust_domain, lifetime_s=lifetime_s, clock=clock)
            again.keep_none()
            return again
        root = make_root(trust_domain, clock())
        issuer = make_issuer(trust_domain, root, clock())
        trust = TrustState(1, (_anchor(root.certificate, 1),), issuer.ref)
        made = cls(trust_domain, trust, {issuer.ref.id: issuer}, {issuer.ref.anchor_id: root}, store, lifetime_s=lifetime_s, clock=clock)
        made._keep_keys(issuer, root)
        made._commit(trust)
        return made

    @classmethod
    def restored(
        cls, stored: StoredState, store: StateStore, trust_domain: str, *, lifetime_s: float, clock: Callable[[], float]
    ) -> Authority:
        """The authority of the last run. Raises StoreUnsafe when a key is missing or the trust domain is another one."""
        if stored.trust_domain != trust_domain:
            raise StoreUnsafe(f"the stored authority is of trust domain {stored.trust_domain}, the setting says {trust_domain}")
        anchors = {entry.id: x509.load_pem_x509_certificate(entry.pem.encode()) for entry in stored.anchors}
        issuers = {entry.id: _restored_issuer(entry, anchors, store) for entry in (stored.issuer, stored.next) if entry is not None}
        roots = {}
        for identifier, certificate in anchors.items():
            key_pem = store.load_key("root", identifier)
            if key_pem is not None:
                roots[identifier] = Pair(certificate, _p256(key_pem, identifier))
        trust = TrustState(
            stored.generation,
            tuple(_anchor(anchors[entry.id], entry.generation) for entry in stored.anchors),
            issuers[stored.issuer.id].ref,
            issuers[stored.next.id].ref if stored.next else None,
            stored.kept,
        )
        return cls(trust_domain, trust, issuers, roots, store, lifetime_s=lifetime_s, clock=clock)

    @classmethod
    def given(
        cls,
        trust_domain: str,
        issuer: Issuer,
        anchors: list[x509.Certificate],
        store: StateStore | None,
        *,
        lifetime_s: float = LEAF_LIFETIME_S,
        clock: Callable[[], float] = time.time,
    ) -> Authority:
        """The authority of an operator's files; what ``store`` remembers of the last run is rotated towards them. Raises StoreUnsafe."""
        stored = store.load() if store else None
        if store is not None and stored is not None:
            made = cls.restored(stored, store, trust_domain, lifetime_s=lifetime_s, clock=clock)
        else:
            ids = tuple(certificate_id(anchor) for anchor in anchors)
            trust = TrustState(1, tuple(_anchor(anchor, 1) for anchor in anchors), issuer.ref, None, ids)
            made = cls(trust_domain, trust, {issuer.ref.id: issuer}, {}, store, lifetime_s=lifetime_s, clock=clock)
            made._keep_keys(issuer, None)
            made._commit(trust)
        made._roots = {}
        made.is_given = True
        made.converge(issuer, anchors)
        return made

    def converge(self, issuer: Issuer, anchors: list[x509.Certificate]) -> list[str]:
        """Go as far towards the operator's files as breaks nobody: trust added anchors, switch once everybody trusts the new one, drop
        once nobody needs the old one. Returns what the next step waits for; call again when that may have changed."""
        trust, now = self.trust.value, self.clock()
        ids = tuple(certificate_id(anchor) for anchor in anchors)
        fresh = [anchor for anchor, identifier in zip(anchors, ids, strict=True) if trust.anchor(identifier) is None]
        changed = replace(trust, kept=ids, next=None if issuer.ref.id == trust.issuer.id else issuer.ref)
        if fresh:
            generation = trust.generation + 1
            changed = replace(changed, generation=generation, anchors=(*trust.anchors, *(_anchor(anchor, generation) for anchor in fresh)))
        if changed.next is not None and (changed.next.anchor_id == trust.issuer.anchor_id or trust.issuer.not_after <= now):
            changed = bundle.switched(changed)  # nobody has to learn anything first, or nothing is left to lose
        if len(changed.anchors) > ANCHORS_MAX:
            return [f"nobody: the bundle would hold {len(changed.anchors)} anchors, at most {ANCHORS_MAX} are allowed; remove some"]
        if changed != trust:
            self._take(issuer, None)
            self._commit(changed)
        while (step := bundle.due_step(self.trust.value)) is not Step.ADD:
            refusal = self.rotate(step)
            if refusal is not None:
                return list(refusal.workloads)
        return []

    def keep_none(self) -> None:
        """Nobody gives the issuer any more: anchors that were listed beside it go with the next DROP."""
        if self.trust.value.kept:
            self._commit(replace(self.trust.value, kept=()))

    @property
    def issuer(self) -> Issuer:
        """What signs now."""
        return self._issuers[self.trust.value.issuer.id]

    def sign(self, key: ec.EllipticCurvePublicKey, identity: WorkloadId) -> SignedLeaf:
        """A leaf outside the ledger: for our own serving certificate. Raises IssuerExpired."""
        return sign_leaf(self.issuer, key, identity, self.clock(), self.lifetime_s)

    def certify(self, key: ec.EllipticCurvePublicKey, subject: Subject) -> Certified:
        """A leaf for a caller whose token and request were found in order; booked before it is handed out. Raises IssuerExpired."""
        trust, leaf = self.trust.value, self.sign(key, subject.identity)
        booked = Leaf(trust.issuer.id, trust.issuer.anchor_id, leaf.not_after)
        self._journal(self.ledger.certified(subject.pod_uid, subject.identity.uri, subject.pod, booked, self.clock()))
        return Certified(
            leaf.chain_pem.decode(), trust.bundle_pem.decode(), trust.generation, trust.issuer.id, leaf.not_before, leaf.not_after
        )

    def report(self, subject: Subject, generation: int, issuer_id: str) -> None:
        """A workload says which bundle it trusts and whose leaf it presents. A generation we have not reached counts as none."""
        trust, now = self.trust.value, self.clock()
        known = self._issuers.get(issuer_id)
        leaf = Leaf(issuer_id, known.ref.anchor_id if known else "", now + self.lifetime_s + CLOCK_SKEW_S)
        trusted = generation if generation <= trust.generation else 0
        changed = self.ledger.reported(
            subject.pod_uid, subject.identity.uri, subject.pod, trusted, leaf, now, newest_issuer=issuer_id == trust.issuer.id
        )
        if changed is not None:
            self._journal(changed)

    def behind(self, generation: int, issuer_id: str) -> bool:
        """Whether a workload that reports this may know a newer state than we do."""
        return generation > self.trust.value.generation or issuer_id not in self._issuers

    def bundle(self) -> Bundle:
        """What is in force now."""
        trust = self.trust.value
        return Bundle(trust.bundle_pem.decode(), trust.generation, trust.issuer.id)

    def rotate(self, step: Step, *, ignore_absent: bool = False, force: bool = False) -> Refusal | None:
        """Do one step of a rotation, or say why not."""
        trust = self.trust.value
        if step in (Step.ADD, Step.ABORT) and self.is_given:
            return Refusal("the issuer is given: change what gives it, the steps that are safe follow by themselves")
        refusal = bundle.check_step(trust, step, self.ledger.live(self.clock()), self.clock(), ignore_absent=ignore_absent, force=force)
        if refusal is None and self.obstacles and step in (Step.SWITCH, Step.DROP) and not force:
            refusal = Refusal(f"{step.value} has to wait: {'; '.join(self.obstacles[:5])}", self.obstacles)
        if refusal is not None:
            return refusal
        if step is Step.ADD:
            root = make_root(self.trust_domain, self.clock())
            issuer = make_issuer(self.trust_domain, root, self.clock())
            self._take(issuer, root)
            trust = bundle.added(trust, root.certificate_pem, root.certificate.not_valid_after_utc.timestamp(), issuer.ref)
        elif step is Step.SWITCH:
            trust = bundle.switched(trust)
        else:
            trust = bundle.dropped(trust) if step is Step.DROP else bundle.aborted(trust)
        self._commit(trust)
        return None

    def blocking(self) -> list[str]:
        """What the due step waits for."""
        if bundle.due_step(self.trust.value) is Step.ADD:
            return []
        return [*bundle.blockers(self.trust.value, self.ledger.live(self.clock()), self.clock()), *self.obstacles]

    def tend(self) -> None:
        """Housekeeping, about every ten seconds: forget expired leaves, renew a self-made issuer below its root in good time."""
        now = self.clock()
        self.ledger.prune(now)
        if self._store is not None and self._store.journal_is_long(len(self.ledger)):
            self._store.compact_journal(list(self.ledger.live(now)))
        self.renew_issuer()

    def renew_issuer(self) -> None:
        """A new issuer below the same root, once a third of the life of a self-made one is left."""
        now, certificate = self.clock(), self.issuer.pair.certificate
        life = certificate.not_valid_after_utc.timestamp() - certificate.not_valid_before_utc.timestamp()
        root = self._roots.get(self.trust.value.issuer.anchor_id)
        if root is None or self.issuer.not_after - now >= life * _RENEW_ISSUER_AT:
            return
        if root.certificate.not_valid_after_utc.timestamp() - now > life * _RENEW_ISSUER_AT:  # else a new issuer would end as soon
            issuer = make_issuer(self.trust_domain, root, now)
            self._take(issuer, root)
            self._commit(replace(self.trust.value, issuer=issuer.ref))

    def adopt(self, stored: StoredState, store: StateStore) -> None:
        """Another process changed the state, or a copy of this object did: this is what is in force now. Raises StoreUnsafe."""
        other = Authority.restored(stored, store, self.trust_domain, lifetime_s=self.lifetime_s, clock=self.clock)
        self._issuers, self._roots, self._store = other._issuers, other._roots, store
        if other.trust.value != self.trust.value:
            self.trust.set(other.trust.value)

    def _take(self, issuer: Issuer, root: Pair | None) -> None:
        self._issuers[issuer.ref.id] = issuer
        if root is not None:
            self._roots[issuer.ref.anchor_id] = root
        self._keep_keys(issuer, root)

    def _keep_keys(self, issuer: Issuer, root: Pair | None) -> None:
        if self._store is not None:
            self._store.save_key("issuer", issuer.ref.id, issuer.pair.key_pem)
            if root is not None:
                self._store.save_key("root", issuer.ref.anchor_id, root.key_pem)

    def _commit(self, trust: TrustState) -> None:
        # Disk first: what was told to a workload must not be forgotten by a restart.
        if self._store is not None:
            self._store.save(self._stored(trust))
        anchors = {anchor.id for anchor in trust.anchors}
        self._roots = {identifier: root for identifier, root in self._roots.items() if identifier in anchors}
        wanted = {trust.issuer.id} | ({trust.next.id} if trust.next else set())
        self._issuers = {identifier: issuer for identifier, issuer in self._issuers.items() if identifier in wanted}
        self.trust.set(trust)

    def _stored(self, trust: TrustState) -> StoredState:
        return StoredState(
            self.trust_domain,
            trust.generation,
            tuple(StoredAnchor(anchor.id, anchor.pem.decode(), anchor.generation) for anchor in trust.anchors),
            _stored_issuer(self._issuers[trust.issuer.id]),
            _stored_issuer(self._issuers[trust.next.id]) if trust.next else None,
            trust.kept,
        )

    def _journal(self, holding: Holding) -> None:
        if self._store is not None:
            self._store.append_journal(holding)


def _anchor(certificate: x509.Certificate, generation: int) -> Anchor:
    pem = certificate.public_bytes(Encoding.PEM)
    return Anchor(certificate_id(certificate), pem, generation, certificate.not_valid_after_utc.timestamp())


def _stored_issuer(issuer: Issuer) -> StoredIssuer:
    chain = b"".join(link.public_bytes(Encoding.PEM) for link in issuer.chain)
    return StoredIssuer(issuer.ref.id, issuer.ref.anchor_id, issuer.pair.certificate_pem.decode(), chain.decode())


def _restored_issuer(stored: StoredIssuer, anchors: dict[str, x509.Certificate], store: StateStore) -> Issuer:
    key_pem = store.load_key("issuer", stored.id)
    if key_pem is None:
        raise StoreUnsafe(f"the key of issuer {stored.id} is missing: restore it, or remove the directory to start a new mesh")
    chain = tuple(x509.load_pem_x509_certificates(stored.chain.encode())) if stored.chain else ()
    certificate, key = x509.load_pem_x509_certificate(stored.certificate.encode()), _p256(key_pem, stored.id)
    if certificate.public_key() != key.public_key():
        raise StoreUnsafe(f"the key of issuer {stored.id} does not belong to its certificate: restore it")
    return Issuer(Pair(certificate, key), chain, anchors[stored.anchor_id])


def _p256(key_pem: bytes, name: str) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise StoreUnsafe(f"the key of {name} is not ECDSA P-256")
    return key
