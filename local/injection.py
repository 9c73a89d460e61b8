"""Runs a pod through the injector's own decision and patch, the code that the webhook runs, and reads what capture must leave alone.

Pure. Called by local.mesh for every pod that starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from injector.decide import INJECTED, SIDECAR_NAME, STATUS, Inject, Refuse, declared_ports
from injector.options import InvalidOption, read_options
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

    A pod that was injected before (`pillion inject --manual`) is meshed as it is: only capture is added.
    """
    decision, patch = review(pod, namespace_annotations, mesh)
    if isinstance(decision, Refuse):
        return decision.sentence
    if isinstance(decision, Inject):
        return Injected(apply_patch(pod, patch), (decision.options.skip_inbound_ports, decision.options.skip_outbound_ports))
    annotations = pod["metadata"].get("annotations") or {}
    sidecars = [container for container in pod["spec"].get("initContainers") or [] if container.get("name") == SIDECAR_NAME]
    if sidecars and annotations.get(STATUS) == INJECTED:
        try:
            options = read_options(annotations, namespace_annotations, declared_ports(pod))
        except InvalidOption as error:
            return str(error)
        return Injected(pod, (options.skip_inbound_ports, options.skip_outbound_ports))
    return Injected(pod, None, decision.sentence)
