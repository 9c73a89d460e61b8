"""How and where a run was made."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Facts:
    """What a reader needs to judge figures by. started: seconds since the epoch. seconds: of one round. tls: see `bench.rig.Bench`."""

    machine: dict[str, str]
    versions: dict[str, str]
    commit: str
    pinning: str
    rounds: int
    seconds: float
    quick: bool
    started: float
    took_s: float
    tls: dict[str, str] = field(default_factory=dict)
