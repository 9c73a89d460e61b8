"""Who holds which certificate in the whole cluster: what the replicas know, put together, less the pods that exist no more. Pure.

Decides what stands in the way of the next step of a rotation; the step itself is `bundle`'s. Called by `shared`, with what `peers` and
`pods` found out.

Theory of operation. A sidecar reports to whichever replica its long poll reaches, so every replica knows a part. For one instance the
replica that heard of it last knows best; when that replica never saw it report a generation, the generation is 0 and blocks until it
reports again, within a poll. A replica that lags could still sign with the old issuer, one that does not answer might know somebody who
is not ready, and one that has just started has not been told yet: each of these blocks. A meshed pod that runs and that no replica has
heard of blocks too, unless those that are absent are ignored. A pod that the API server does not have any more never blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from identity.bundle import Step, TrustState, due_step
from identity.ledger import Holding, Ledger
from identity.wire import POLL_S

SETTLED_S = POLL_S + 15.0  # after this long, every workload that is alive has reported to a replica that is alive


@dataclass(frozen=True)
class Replica:
    """One identity service. error: why it could not be asked; the rest is then of no meaning. up_s: since it began to serve."""

    name: str
    generation: int = 0
    issuer: str = ""
    up_s: float = 0.0
    holdings: Sequence[Holding] = ()
    error: str = ""


@dataclass(frozen=True)
class PodFact:
    """A pod that has not ended. meshed: it has a token for the identity service. running: phase Running."""

    uid: str
    name: str
    meshed: bool
    running: bool


def merged(replicas: Iterable[Replica], pods: Iterable[PodFact] | None) -> Ledger:
    """The holdings that count. pods: every one of the cluster that has not ended; None when that is not known, and all count."""
    best: dict[str, Holding] = {}
    for replica in replicas:
        for holding in replica.holdings:
            known = best.get(holding.instance)
            if known is None or holding.heard_at > known.heard_at:
                best[holding.instance] = holding
    present = None if pods is None else {pod.uid for pod in pods}
    ledger = Ledger()
    for instance, holding in best.items():
        if present is None or instance in present:
            ledger.restore(holding)
    return ledger


def obstacles(
    trust: TrustState,
    replicas: Iterable[Replica],
    ledger: Ledger,
    pods: Iterable[PodFact] | None,
    *,
    unpublished: Sequence[str] = (),
    ignore_absent: bool = False,
    now: float,
) -> tuple[str, ...]:
    """What the due step waits for besides the holdings. unpublished: namespaces whose trust bundle is not written yet."""
    if due_step(trust) is Step.ADD:
        return ()
    found = []
    for replica in replicas:
        if replica.error:
            found.append(f"identity replica {replica.name} cannot be asked ({replica.error})")
        elif (replica.generation, replica.issuer) != (trust.generation, trust.issuer.id):
            found.append(f"identity replica {replica.name} has not picked up generation {trust.generation} yet")
        elif replica.up_s < SETTLED_S:
            found.append(f"identity replica {replica.name} started {replica.up_s:.0f} s ago: all have reported after {SETTLED_S:.0f} s")
    found.extend(f"namespace {name}: its trust bundle is not written yet" for name in unpublished)
    if pods is None:
        found.append("the pods of the cluster are not known")
    elif not ignore_absent:
        heard = {holding.instance for holding in ledger.live(now)}
        silent = [pod.name for pod in pods if pod.running and pod.meshed and pod.uid not in heard]
        found.extend(f"{name} runs and has not been heard of by any replica" for name in sorted(silent))
    return tuple(found)
