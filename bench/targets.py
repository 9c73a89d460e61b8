"""What each row must reach, as data, and the judgement of a run by it. Pure; called by `bench.page` and `bench.report`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.measure import HIGHER_IS_BETTER, Result

US = "pillion"
ACCELERATED = "pillion-ebpf"


@dataclass(frozen=True)
class Target:
    """The figure of ``us`` in ``metric`` over that of ``against`` (None: the figure itself) must be at least or at most ``value``.

    work: the work it holds for; empty: every work of the row.
    """

    row: str
    work: str
    metric: str
    against: Literal["envoy", "envoy-h2", "haproxy", "nftables"] | None
    value: float
    us: str = US

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.metric in HIGHER_IS_BETTER

    def met(self, figure: float) -> bool:
        """Whether a figure reaches it."""
        return figure >= self.value if self.at_least else figure <= self.value


TARGETS = (
    Target("P1", "", "throughput", "envoy", 1.7),
    Target("P1", "", "throughput", "envoy-h2", 1.4),
    Target("P1", "", "cpu_per_request", "envoy", 0.6),
    Target("P1", "", "throughput", "haproxy", 0.95),
    Target("P2", "", "latency_mean", "envoy", 0.7),
    Target("P2", "", "latency_p99", "envoy", 1.0),
    Target("P2", "", "throughput", "haproxy", 0.85),
    *(Target("P3", f"{kind}, 8 x 16", "throughput", "envoy", 2.3) for kind in ("HTTP/2", "gRPC")),
    *(Target("P3", f"{kind}, 1 x 100", "throughput", "envoy", 1.7) for kind in ("HTTP/2", "gRPC")),
    *(Target("P3", f"{kind}, 8 x 1", "throughput", "envoy", 1.4) for kind in ("HTTP/2", "gRPC")),
    Target("P4", "", "bandwidth", "envoy", 1.15),
    Target("P5", "", "connections_per_cpu_s", "envoy", 1.0),
    Target("P6", "", "pss_idle", None, 28),
    Target("P6", "", "pss_after_load", None, 28),
    Target("P7", "", "bytes_per_connection", None, 27),
    Target("P7", "", "given_back", None, 90),
    *(
        Target("P8", f"round trip, {size:,} bytes,{many} one processor", "latency_p50", "nftables", 0.55, "connect+sockmap")
        for many in ("", " 16 connections,")
        for size in (100, 1024, 16384)
    ),
    Target("P8", "bulk, 64 KiB writes", "bandwidth", "nftables", 2.0, "connect+sockmap"),
    Target("P8", "bulk, 64 KiB writes", "cpu_per_gb", "nftables", 0.5, "connect+sockmap"),
    Target("P9", "", "added_p50", "envoy", 1.0),
    Target("P9", "", "added_p99", "envoy", 1.0),
    Target("P11", "", "ready", None, 0.5),
    Target("P12", "", "growth", None, 1.15),
)


@dataclass(frozen=True)
class Verdict:
    """A target in one work. figure: the ratio, or the value itself; None: not measured. accelerated: the same with eBPF."""

    target: Target
    work: str
    figure: float | None
    unit: str
    accelerated: float | None = None

    @property
    def met(self) -> bool:
        """False also when nothing was measured."""
        return self.figure is not None and self.target.met(self.figure)

    @property
    def shortfall(self) -> float:
        """1.0 = reached exactly, 2.0 = off by a factor of two; infinite when not measured."""
        if self.figure is None or self.figure <= 0:
            return float("inf")
        return self.target.value / self.figure if self.target.at_least else self.figure / self.target.value


def judge(rows: Sequence[Result]) -> list[Verdict]:
    """Every target in every work it holds for, in the order of TARGETS; a target without any work is one verdict without figure."""
    return [verdict for target in TARGETS for verdict in _verdicts(target, rows)]


def _verdicts(target: Target, rows: Sequence[Result]) -> Iterator[Verdict]:
    medians = {(row.work, row.contestant): row for row in rows if (row.row, row.metric) == (target.row, target.metric)}
    works = list(dict.fromkeys(row.work for row in rows if row.row == target.row and target.work in ("", row.work)))
    if not works:
        yield Verdict(target, target.work, None, "")
    for work in works:
        own = medians.get((work, target.us))
        peer = medians.get((work, target.against)) if target.against else None
        fast = medians.get((work, ACCELERATED)) if target.us == US else None
        figure, accelerated = _figure(target, own, peer), _figure(target, fast, peer)
        yield Verdict(target, work, figure, "" if target.against else own.unit if own else "", accelerated)


def _figure(target: Target, own: Result | None, peer: Result | None) -> float | None:
    """The value, or its ratio to the peer's; None when either was not measured."""
    if own is None or own.median is None:
        return None
    if target.against is None:
        return own.median
    return own.median / peer.median if peer is not None and peer.median else None
