"""Runs a pod through the injector's own decision and patch, the code that the webhook runs, and reads what capture must leave alone.

Pure. Called by local.mesh for every pod that starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from injector.decide import Inject, Refuse
from injector.patch import apply_patch, review
from injector.sidecar import Mesh

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Injected:
    """The pod to run. skips: (inbound, outbound) port ranges that are not captured; None for a pod without sidecar. why_not: for people."""

    pod: Mapping[str, Any]
    skips: tuple[Ranges, Ranges] | None
    why_not: str = ""


def inject(pod: Mapping[str, Any], namespace_annotations: Mapping[str, str], mesh: Mesh) -> Injected | str:
    """The pod as it will run, or a sentence about why it must not.

    A pod that comes with somebody else's idea of our sidecar (``already-injected``) is no pod of the local runner: its container is run
    as written, without capture.
    """
    decision, patch = review(pod, namespace_annotations, mesh)
    if isinstance(decision, Refuse):
        return decision.sentence
    if isinstance(decision, Inject):
        return Injected(apply_patch(pod, patch), (decision.options.skip_inbound_ports, decision.options.skip_outbound_ports))
    return Injected(pod, None, decision.sentence)
