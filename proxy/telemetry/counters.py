"""Counters, gauges and histograms whose cost on the data path is an attribute increment, in families of bounded cardinality.

A connection asks a `Family` for its series once and then only touches ``series.value``. Series that stopped changing are dropped after a
while, because labels hold peers' identities; one that somebody still holds is remembered weakly and comes back as it was when it
changes again, so no increment is lost. When a family is full, further label sets share one series. No clock here: `Metrics` passes the
time in. Called by proxy.telemetry.metrics.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar, Generic, TypeVar

Labels = tuple[tuple[str, str], ...]
"""Label names and values: the key of a series. The same labels in another order are another series, so build them in one place."""

OVERFLOW: Labels = (("overflow", "true"),)


class Counter:
    """A number that only grows. Add to ``value`` directly."""

    __slots__ = ("__weakref__", "seen", "seen_at", "value")
    kind: ClassVar[str] = "counter"

    def __init__(self) -> None:
        self.value: float = 0
        self.seen: float = 0
        self.seen_at = 0.0

    @property
    def changes(self) -> float:
        """Differs from its earlier value whenever the series was touched."""
        return self.value

    @property
    def resting(self) -> bool:
        """May be dropped if it does not change."""
        return True


class Gauge(Counter):
    """A number that goes both ways. It is kept while it is not zero: connections that are open stay counted however quiet they are."""

    __slots__ = ()
    kind: ClassVar[str] = "gauge"

    @property
    def resting(self) -> bool:
        return self.value == 0


class Histogram:
    """How often values fell between fixed bounds. counts: one for each bound (value <= bound), then one for what is above all; total:
    the sum of all values. Both are added to directly."""

    __slots__ = ("__weakref__", "bounds", "counts", "seen", "seen_at", "total")
    kind: ClassVar[str] = "histogram"

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total: float = 0
        self.seen: float = 0
        self.seen_at = 0.0

    @property
    def changes(self) -> float:
        return sum(self.counts)

    @property
    def resting(self) -> bool:
        return True


S = TypeVar("S", Counter, Gauge, Histogram)


class Family(Generic[S]):
    """All series of one name. make: builds a new one. most: how many label sets it keeps apart."""

    def __init__(self, name: str, about: str, make: Callable[[], S], now: Callable[[], float], most: int, idle_s: float) -> None:
        self.name = name
        self.about = about
        self.kind = make().kind
        self._make: Callable[[], S] = make
        self._now = now
        self._most = most
        self._idle_s = idle_s
        self._swept_at = now()
        self._kept: dict[Labels, S] = {}
        self._dormant: dict[Labels, weakref.ref[S]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def series(self, labels: Labels) -> S:
        """The series of these labels, made if need be. Hold on to it: this is a lookup, using it is not."""
        found = self._kept.get(labels)
        if found is not None:
            return found
        dormant = self._dormant.pop(labels, None)
        series = dormant() if dormant is not None else None
        if series is None:
            if len(self._kept) + len(self._dormant) >= self._most and labels is not OVERFLOW:
                self._make_room()
                if len(self._kept) + len(self._dormant) >= self._most:
                    return self.series(OVERFLOW)
            series = self._make()
        series.seen_at = self._now()
        self._kept[labels] = series
        return series

    def sweep(self) -> None:
        """Drop what has not changed for the idle time; bring back what was dropped and changed since."""
        now = self._swept_at = self._now()
        for labels, series in list(self._kept.items()):
            if series.changes != series.seen or not series.resting:
                series.seen, series.seen_at = series.changes, now
            elif now - series.seen_at >= self._idle_s:
                del self._kept[labels]
                self._dormant[labels] = weakref.ref(series)
            del series  # so that what nobody else holds is gone before the next loop looks
        for labels, reference in list(self._dormant.items()):
            held = reference()
            if held is None:
                del self._dormant[labels]
            elif held.changes != held.seen:
                del self._dormant[labels]
                self._kept[labels] = held

    def items(self) -> Iterator[tuple[Labels, S]]:
        """Every series that is kept, in order of first use."""
        return iter(self._kept.items())

    def _make_room(self) -> None:
        # a full family is swept at most this often, or every new label set would walk all the others
        if self._now() - self._swept_at >= self._idle_s / 10:
            self.sweep()
