"""Rounds, medians and what processes cost. Decides how numbers are made from samples; knows no contestant and no load tool.

CPU is user+system time of the proxies' processes with their children, from /proc/<pid>/stat; memory is the proportional set size of
/proc/<pid>/smaps_rollup. Called by `bench.scenarios`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

_TICKS = os.sysconf("SC_CLK_TCK")
T = TypeVar("T")

UNITS = {
    "throughput": "req/s",
    "bandwidth": "GB/s",
    "connections": "conn/s",
    "connections_per_cpu_s": "conn/CPU-s",
    "cpu_per_request": "us",
    "cpu_per_gb": "CPU-s/GB",
    "latency_mean": "us",
    "latency_p50": "us",
    "latency_p99": "us",
    "added_p50": "us",
    "added_p99": "us",
    "pss_idle": "MB",
    "pss_after_load": "MB",
    "bytes_per_connection": "kB",
    "given_back": "%",
    "active_p50": "us",
    "active_p99": "us",
    "ready": "s",
    "growth": "ratio",
}
HIGHER_IS_BETTER = frozenset({"throughput", "bandwidth", "connections", "connections_per_cpu_s", "given_back"})


@dataclass(frozen=True)
class Outcome:
    """What one load run did. units: requests (or bytes, connections) completed. failed: how many did not. note: why, when any."""

    units: float
    failed: int
    metrics: dict[str, float]
    note: str = ""


@dataclass
class Series:
    """All rounds of one contestant in one work."""

    row: str
    work: str
    contestant: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    failed_rounds: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, metrics: dict[str, float]) -> None:
        """Keep one good round."""
        for name, value in metrics.items():
            self.samples.setdefault(name, []).append(value)

    def fail(self, note: str) -> None:
        """Count one failed round; its figures are dropped."""
        self.failed_rounds += 1
        self.notes.append(note)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: 0.1 means that the rounds lie within ten per cent of each other. 0 for one round."""
    middle = median(values)
    return (max(values) - min(values)) / abs(middle) if middle else 0.0


def interleaved(contestants: Iterable[T], rounds: int) -> list[T]:
    """The order of rounds: every contestant once, then again from the other end, so that nobody always runs after the same one."""
    names = list(contestants)
    return [name for index in range(rounds) for name in (names if index % 2 == 0 else reversed(names))]


def cpu_seconds(pids: Iterable[int]) -> float:
    """User plus system time of the processes and of all their descendants, living and waited for, in seconds."""
    return sum(_cpu_ticks(pid) for pid in pids) / _TICKS


def _cpu_ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return cpu_ticks_of(stat) + sum(_cpu_ticks(child) for child in children(pid))


def cpu_ticks_of(stat: str) -> int:
    """utime + stime + cutime + cstime of a /proc/<pid>/stat line; the command name in it may hold spaces and parentheses."""
    fields = stat.rpartition(")")[2].split()
    return sum(int(value) for value in fields[11:15])


def children(pid: int) -> list[int]:
    """Direct children of all threads of a process."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants."""
    own = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            own = int(line.split()[1]) * 1024
    return own + sum(pss_bytes(child) for child in children(pid))


def measured(run: Callable[[], Outcome], proxies: Sequence[int]) -> tuple[Outcome, float]:
    """Run a load and return what it did with the CPU seconds that the proxies used meanwhile."""
    before = cpu_seconds(proxies)
    outcome = run()
    return outcome, cpu_seconds(proxies) - before


@dataclass(frozen=True)
class Result:
    """One line of bench/results/latest.json. failed: rounds with a failed request. spread: see `spread`."""

    row: str
    work: str
    contestant: str
    metric: str
    unit: str
    median: float | None
    spread: float | None
    failed: int
    rounds: int
    ratio_to_envoy: float | None
    ratio_to_haproxy: float | None
    note: str = ""


def results(series: Sequence[Series]) -> list[Result]:
    """Summarise; ratios are contestant / peer of the same row, work and metric, None without a positive figure of the peer."""
    medians = {(s.row, s.work, s.contestant, m): median(v) for s in series for m, v in s.samples.items()}

    def ratio(s: Series, metric: str, peer: str) -> float | None:
        own, other = medians.get((s.row, s.work, s.contestant, metric)), medians.get((s.row, s.work, peer, metric))
        return own / other if own is not None and other and other > 0 and metric != "given_back" else None

    rows = []
    for s in series:
        note = "; ".join(dict.fromkeys(s.notes))
        if not s.samples:
            rows.append(Result(s.row, s.work, s.contestant, "", "", None, None, s.failed_rounds, s.failed_rounds, None, None, note))
        for metric, values in s.samples.items():
            rows.append(
                Result(
                    s.row,
                    s.work,
                    s.contestant,
                    metric,
                    UNITS[metric],
                    median(values),
                    spread(values),
                    s.failed_rounds,
                    len(values) + s.failed_rounds,
                    ratio(s, metric, "envoy"),
                    ratio(s, metric, "haproxy"),
                    note,
                )
            )
    return rows
