"""Prometheus' text exposition format 0.0.4, written by us so that the sidecar need not load the client library.

Pure: from families and samples to bytes. Tests read every line back with the official parser.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from proxy.telemetry.counters import Counter, Family, Gauge, Histogram, Labels

AnyFamily = Family[Counter] | Family[Gauge] | Family[Histogram]


class Sample(NamedTuple):
    """A value read when asked (memory, file descriptors). kind: ``counter`` or ``gauge``."""

    name: str
    kind: str
    about: str
    value: float
    labels: Labels = ()


def exposition(families: Iterable[AnyFamily], samples: Iterable[Sample] = ()) -> bytes:
    """Every family that has a series, then the samples. Families must have different names."""
    lines: list[str] = []
    for family in families:
        if len(family):
            lines += _head(family.name, family.about, family.kind)
            for labels, series in family.items():
                lines += (
                    _histogram(family.name, labels, series) if isinstance(series, Histogram) else _plain(family.name, labels, series.value)
                )
    described: set[str] = set()
    for sample in samples:
        if sample.name not in described:
            described.add(sample.name)
            lines += _head(sample.name, sample.about, sample.kind)
        lines += _plain(sample.name, sample.labels, sample.value)
    return ("\n".join(lines) + "\n").encode() if lines else b""


def _head(name: str, about: str, kind: str) -> Iterator[str]:
    escaped = about.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# HELP {name} {escaped}"
    yield f"# TYPE {name} {kind}"


def _plain(name: str, labels: Labels, value: float) -> Iterator[str]:
    yield f"{name}{_braces(labels)} {_number(value)}"


def _histogram(name: str, labels: Labels, series: Histogram) -> Iterator[str]:
    inside = _inside(labels) + "," if labels else ""
    counts = list(accumulate(series.counts))
    bounds = [*map(_number, series.bounds), "+Inf"]
    for bound, count in zip(bounds, counts, strict=True):
        yield f'{name}_bucket{{{inside}le="{bound}"}} {count}'
    yield f"{name}_sum{_braces(labels)} {_number(series.total)}"
    yield f"{name}_count{_braces(labels)} {counts[-1]}"


def _braces(labels: Labels) -> str:
    return f"{{{_inside(labels)}}}" if labels else ""


def _inside(labels: Labels) -> str:
    return ",".join(f'{name}="{escape(value)}"' for name, value in labels)


def escape(value: str) -> str:
    """A label value; lone surrogates, which UTF-8 cannot carry, become question marks."""
    if value.isalnum() and value.isascii():
        return value
    encodable = value.encode("utf-8", "replace").decode()
    return encodable.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if abs(value) < 1 << 53 and value == int(value) else repr(value)
