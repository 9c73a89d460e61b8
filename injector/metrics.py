"""The injector's metrics (prometheus-client). Bounded: labels come from fixed sets of words, nothing from a request becomes one."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """All of them, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        into = self._registry
        self._decisions = Counter(
            "pillion_injector_decisions", "Pods looked at, by what became of them and why.", ["decision", "reason"], registry=into
        )
        self._failures = Counter(
            "pillion_injector_failures", "Requests without a decision; failurePolicy decides.", ["cause"], registry=into
        )
        self._seconds = Histogram("pillion_injector_review_seconds", "From a request to its answer.", buckets=_BUCKETS, registry=into)
        ProcessCollector(registry=into)
        self._reloads = Counter("pillion_injector_mesh_reloads", "Readings of changed mesh settings.", ["result"], registry=into)

    def decided(self, decision: str, reason: str) -> None:
        """injected, skipped or refused; reason: a stable id of `injector.decide`."""
        self._decisions.labels(decision, reason).inc()

    def failed(self, cause: str) -> None:
        """bad-request, busy, namespace-unknown or internal."""
        self._failures.labels(cause).inc()

    def took(self, seconds: float) -> None:
        """A review was answered."""
        self._seconds.observe(seconds)

    def reloaded(self, *, ok: bool) -> None:
        """The mesh settings changed and were, or were not, taken."""
        self._reloads.labels("taken" if ok else "refused").inc()

    def watch(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(name, meaning, registry=self._registry).set_function(read)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
