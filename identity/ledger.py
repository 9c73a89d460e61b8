"""Which workload instance holds an unexpired leaf from which issuer, and which trust bundle it says it has picked up.

The book that makes a rotation safe (`bundle.check_step`). It must not decide anything itself, nor store itself (`store` keeps the
journal of its entries). Called by `authority`. Pure; times are seconds since the epoch, given by the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec

LEAVES_MAX = 8  # unexpired leaves remembered of one instance; a sidecar that renews in a loop forgets its oldest, never its newest


class Leaf(msgspec.Struct, frozen=True):
    """A leaf that was handed out: by which issuer, below which anchor, valid until when."""

    issuer_id: str
    anchor_id: str
    not_after: float


class Holding(msgspec.Struct, frozen=True):
    """What one instance of a workload has.

    instance: pod uid. workload: SPIFFE URI. pod: ``namespace/name``. generation: of the trust bundle it reported last, 0 before the
    first report. leaves: those it may present, oldest first. heard_at: its last certification or report.
    """

    instance: str
    workload: str
    pod: str
    generation: int
    leaves: tuple[Leaf, ...]
    heard_at: float


class Ledger:
    """All holdings, by instance. Every changing verb returns the new entry, for the journal, or None when only `heard_at` moved."""

    def __init__(self) -> None:
        self._holdings: dict[str, Holding] = {}

    def certified(self, instance: str, workload: str, pod: str, leaf: Leaf, now: float) -> Holding:
        """A leaf was handed out; the instance may present it from now on."""
        old = self._holdings.get(instance)
        leaves = tuple(known for known in (old.leaves if old else ()) if known.not_after > now)
        return self._put(Holding(instance, workload, pod, old.generation if old else 0, (*leaves, leaf)[-LEAVES_MAX:], now))

    def reported(
        self, instance: str, workload: str, pod: str, generation: int, leaf: Leaf, now: float, *, newest_issuer: bool = False
    ) -> Holding | None:
        """The instance says what it trusts and whose leaf it presents: older leaves are out of use.

        leaf: as we know it or, when the instance is unknown here, the longest-lived one it can be. An instance has one holding
        however often it reports. newest_issuer: the leaf is of the issuer in force, so that one that we did not hand out, another
        replica did, later than all that we know of.
        """
        old = self._holdings.get(instance)
        if old is None:
            return self._put(Holding(instance, workload, pod, generation, (leaf,), now))
        newest = max((at for at, known in enumerate(old.leaves) if known.issuer_id == leaf.issuer_id), default=None)
        if newest is None:
            leaves = (leaf,) if newest_issuer else (leaf, *old.leaves)[-LEAVES_MAX:]
        else:
            leaves = old.leaves[newest:]
        new = Holding(instance, workload, pod, generation, leaves, now)
        self._holdings[instance] = new
        return None if (new.generation, new.leaves, new.workload) == (old.generation, old.leaves, old.workload) else new

    def restore(self, holding: Holding) -> None:
        """Take an entry from the journal; the last one of an instance wins."""
        self._holdings[holding.instance] = holding

    def prune(self, now: float) -> int:
        """Forget instances whose every leaf has expired; returns how many."""
        dead = [instance for instance, holding in self._holdings.items() if all(leaf.not_after <= now for leaf in holding.leaves)]
        for instance in dead:
            del self._holdings[instance]
        return len(dead)

    def keep(self, instances: Collection[str]) -> int:
        """Forget every instance but these, the only ones that exist; returns how many. The journal still has them: ask again later."""
        gone = [instance for instance in self._holdings if instance not in instances]
        for instance in gone:
            del self._holdings[instance]
        return len(gone)

    def live(self, now: float) -> Iterator[Holding]:
        """Holdings with an unexpired leaf."""
        return (holding for holding in self._holdings.values() if any(leaf.not_after > now for leaf in holding.leaves))

    def __len__(self) -> int:
        return len(self._holdings)

    def _put(self, holding: Holding) -> Holding:
        self._holdings[holding.instance] = holding
        return holding
