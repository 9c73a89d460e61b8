"""Runs a pod through the injector's own decision and patch, the code that the webhook runs, and reads what capture must leave alone.

Pure. Called by local.mesh for every pod that starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from injector.decide import Inject, Refuse, containers
from injector.fixed import INJECT, INJECTED, SIDECAR_NAME, STATUS
from injector.mesh import Mesh
from injector.options import PREFIX
from injector.patch import apply_patch, review
from injector.undo import uninject

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Injected:
    """The pod to run. skips: (inbound, outbound) port ranges that are not captured; None for a pod without sidecar. why_not: for people."""

    pod: Mapping[str, Any]
    skips: tuple[Ranges, Ranges] | None
    why_not: str = ""


def inject(pod: Mapping[str, Any], namespace_annotations: Mapping[str, str], mesh: Mesh) -> Injected | str:
    """The pod as it will run, or a sentence about why it must not.

    A pod that was injected before (`pillion inject --manual`) is injected anew: what a cluster needs for it is not what this machine needs.
    """
    annotations = (pod.get("metadata") or {}).get("annotations") or {}
    if annotations.get(STATUS) == INJECTED and any(container.get("name") == SIDECAR_NAME for container in containers(pod)):
        # its own word, and what was settled when it was injected
        said = {key: value for key, value in annotations.items() if key.startswith(PREFIX)}
        pod, namespace_annotations = uninject(pod), {**namespace_annotations, **said, INJECT: "enabled"}
    decision, patch = review(pod, namespace_annotations, mesh)
    if isinstance(decision, Refuse):
        return decision.sentence
    if isinstance(decision, Inject):
        return Injected(apply_patch(pod, patch), (decision.options.skip_inbound_ports, decision.options.skip_outbound_ports))
    return Injected(pod, None, decision.sentence)
