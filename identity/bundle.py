"""Trust anchors, issuers and the rotation between them: add anchor -> switch issuer -> drop old anchor.

Decides which step is allowed, given what every live workload has reported (`ledger`). It must not make keys or certificates
(`issuer`), read any (`chains`), nor store anything (`store`). Called by `authority`. Pure.

Theory of operation. A handshake between two workloads verifies when each trusts the anchor above the other's leaf. So the new anchor
must be trusted by everybody before anybody holds a leaf below it (rule of SWITCH), and nobody may still hold a leaf below the old
anchor when the first workload stops trusting it (rule of DROP). `generation` counts changes of the set of anchors: what a workload
reports is the generation it trusts and the issuer of the leaf it presents.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from identity.ledger import Holding

_NAMED_MAX = 5  # workloads spelled out in a refusal; the count tells the rest
ABSENT_AFTER_S = 90.0  # three long polls of 30 s


@dataclass(frozen=True)
class Anchor:
    """A root that workloads trust. generation: of the bundle it first appeared in. not_after: seconds since the epoch."""

    id: str
    pem: bytes
    generation: int
    not_after: float


@dataclass(frozen=True)
class IssuerRef:
    """An issuer by name: its own id, and that of the anchor its chain ends in. not_after: of the earliest link of that chain."""

    id: str
    anchor_id: str
    not_after: float


@dataclass(frozen=True)
class TrustState:
    """What is in force. anchors: oldest first. next: the issuer that SWITCH makes current. kept: ids of anchors that stay besides the
    issuer's own, because the operator's files list them."""

    generation: int
    anchors: tuple[Anchor, ...]
    issuer: IssuerRef
    next: IssuerRef | None = None
    kept: tuple[str, ...] = ()

    @property
    def bundle_pem(self) -> bytes:
        """Every trust anchor in force."""
        return b"".join(anchor.pem for anchor in self.anchors)

    def anchor(self, anchor_id: str) -> Anchor | None:
        """The anchor of that id, None when it is not in force."""
        return next((anchor for anchor in self.anchors if anchor.id == anchor_id), None)


class Step(enum.Enum):
    """One step of a rotation. ABORT takes back an ADD that was not followed by SWITCH yet."""

    ADD = "add"
    SWITCH = "switch"
    DROP = "drop"
    ABORT = "abort"


@dataclass(frozen=True)
class Refusal:
    """Why a step may not be done now. sentence: complete, with the next step. workloads: everything that blocks, as text."""

    sentence: str
    workloads: tuple[str, ...] = ()


def due_step(state: TrustState) -> Step:
    """The step that a rotation is at; ADD when none is under way."""
    if state.next is not None:
        return Step.SWITCH
    return Step.DROP if _surplus(state) else Step.ADD


def check_step(
    state: TrustState, step: Step, holdings: Iterable[Holding], now: float, *, ignore_absent: bool = False, force: bool = False
) -> Refusal | None:
    """None when ``step`` breaks nobody. holdings: of workloads with an unexpired leaf. ignore_absent: those not heard for
    ABSENT_AFTER_S do not block. force: workloads do not block at all; the order of the steps still holds."""
    due = due_step(state)
    if step is Step.ABORT:
        return None if due is Step.SWITCH else Refusal("there is no added anchor to take back")
    if step is not due:
        return Refusal(f"the step {step.value!r} is not due; the next step of the rotation is {due.value!r}")
    if step is Step.ADD or force:
        return None
    blocking = blockers(state, holdings, now, ignore_absent=ignore_absent)
    if not blocking:
        return None
    more = f" and {len(blocking) - _NAMED_MAX} more" if len(blocking) > _NAMED_MAX else ""
    what = "do not trust the new anchor yet" if step is Step.SWITCH else "still depend on the old anchor"
    return Refusal(
        f"{step.value} would break {len(blocking)} workload instance(s) that {what}: {'; '.join(blocking[:_NAMED_MAX])}{more}. "
        "Wait for them and try again; --ignore-absent passes over those that are no longer heard",
        tuple(blocking),
    )


def blockers(state: TrustState, holdings: Iterable[Holding], now: float, *, ignore_absent: bool = False) -> list[str]:
    """Every live workload instance that the due step would break, each as one phrase with its reason."""
    step = due_step(state)
    if step is Step.ADD:
        return []
    found = []
    for holding in holdings:
        absent = now - holding.heard_at > ABSENT_AFTER_S
        reason = _reason(state, step, holding, now)
        if reason and not (absent and ignore_absent):
            silence = f", not heard for {now - holding.heard_at:.0f} s" if absent else ""
            found.append(f"{holding.pod} ({holding.workload}) {reason}{silence}")
    return found


def _reason(state: TrustState, step: Step, holding: Holding, now: float) -> str:
    if not any(leaf.not_after > now for leaf in holding.leaves):
        return ""
    ahead = state.anchor((state.next or state.issuer).anchor_id)
    needed = ahead.generation if ahead else state.generation
    if holding.generation < needed:
        return f"trusts bundle generation {holding.generation}, {needed} is needed"
    if step is Step.DROP:
        surplus = {anchor.id for anchor in _surplus(state)}
        until = max((leaf.not_after for leaf in holding.leaves if leaf.anchor_id in surplus or not leaf.anchor_id), default=0.0)
        if until > now:
            return f"may present a leaf below the old anchor for {until - now:.0f} s more"
    return ""


def _surplus(state: TrustState) -> tuple[Anchor, ...]:
    if state.next is not None:
        return ()
    return tuple(anchor for anchor in state.anchors if anchor.id != state.issuer.anchor_id and anchor.id not in state.kept)


def added(state: TrustState, anchor_pem: bytes, anchor_not_after: float, issuer: IssuerRef) -> TrustState:
    """After ADD: the new anchor is trusted beside the old one, its issuer waits."""
    generation = state.generation + 1
    anchor = Anchor(issuer.anchor_id, anchor_pem, generation, anchor_not_after)
    return replace(state, generation=generation, anchors=(*state.anchors, anchor), next=issuer)


def switched(state: TrustState) -> TrustState:
    """After SWITCH: the waiting issuer signs; both anchors are trusted."""
    assert state.next is not None, "check_step allows SWITCH only when an issuer waits"
    return replace(state, issuer=state.next, next=None)


def dropped(state: TrustState) -> TrustState:
    """After DROP: only the anchor of the current issuer is trusted, and those the operator's files keep."""
    kept = tuple(anchor for anchor in state.anchors if anchor.id == state.issuer.anchor_id or anchor.id in state.kept)
    return replace(state, generation=state.generation + 1, anchors=kept)


def aborted(state: TrustState) -> TrustState:
    """After ABORT: as before ADD, in a generation of its own."""
    return dropped(replace(state, next=None))
