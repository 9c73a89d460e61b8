"""How much traffic a sidecar had between two looks at its metrics: rates, shares and quantiles, in groups. Pure.

Called by cli.stat. Names and labels are those of docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Literal

from prometheus_client.parser import text_string_to_metric_families

Group = Literal["client", "route", "destination"]
Labels = Mapping[str, str]
Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]
"""A value for each name and set of labels."""

_RESPONSES = "pillion_response_total"
_LATENCY = "pillion_response_latency_ms_bucket"
_OPEN = "pillion_tcp_open_connections"
_DENIED = ("pillion_inbound_http_authz_deny_total", "pillion_inbound_tcp_authz_deny_total", "pillion_inbound_http_route_not_found_total")
_READ = frozenset({_RESPONSES, _LATENCY, _OPEN, *_DENIED})


def read(text: str) -> Samples:
    """What matters here of an answer of ``/metrics``; raises ValueError for what no sidecar says: whoever broke into a pod may answer."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in _READ:
                if not isfinite(sample.value) or (sample.name == _LATENCY and isnan(float(sample.labels.get("le", "")))):
                    raise ValueError(f"{sample.name} is no number, or without a bound")
                found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


@dataclass
class Traffic:
    """Of one line. rate, denied: a second. answered, failed: in the whole time. buckets: ms -> answers that took at most that long."""

    rate: float = 0.0
    denied: float = 0.0
    answered: float = 0.0
    failed: float = 0.0
    connections: int = 0
    buckets: dict[float, float] = field(default_factory=dict)

    @property
    def success(self) -> float | None:
        """The share of answers that were no failure (docs/metrics.md says what is one); None without any."""
        return 1 - self.failed / self.answered if self.answered else None

    def quantile(self, share: float) -> float | None:
        """The time in ms in which that share was answered, as Prometheus' histogram_quantile has it; None without any answer."""
        bounds = sorted(self.buckets)
        total = self.buckets[bounds[-1]] if bounds else 0.0
        if not total:
            return None
        below, before = 0.0, 0.0
        for bound in bounds:
            count = self.buckets[bound]
            if count >= share * total and count > before:
                return below if bound == float("inf") else below + (bound - below) * (share * total - before) / (count - before)
            below, before = bound, count
        return below


def add(groups: dict[str, Traffic], first: Samples, second: Samples, seconds: float, by: Group | None) -> None:
    """Add what one sidecar had between two looks to the group that each series belongs to; without ``by`` there is one, ``""``."""
    for name, labels, value, grown in _grown(first, second):
        if labels.get("direction") != ("outbound" if by == "destination" else "inbound"):
            continue
        if name == _OPEN and by == "route":
            continue  # a connection is of no route
        traffic = groups.setdefault(group_of(labels, by), Traffic())
        if name == _OPEN:
            traffic.connections += int(value)
        elif name == _RESPONSES:
            traffic.rate += grown / seconds
            traffic.answered += grown
            traffic.failed += grown if labels.get("classification") == "failure" else 0
        elif name == _LATENCY:
            bound = float(labels["le"])
            traffic.buckets[bound] = traffic.buckets.get(bound, 0.0) + grown
        else:
            traffic.denied += grown / seconds


def _grown(first: Samples, second: Samples) -> Iterator[tuple[str, Labels, float, float]]:
    for (name, labels), value in second.items():
        before = first.get((name, labels), 0.0)
        # a count that is smaller than it was began anew: the sidecar dropped an idle series, or was restarted
        yield name, dict(labels), value, value - before if value >= before else value


def group_of(labels: Labels, by: Group | None) -> str:
    """The group's name: the caller's identity, ``httproute shop/cart``, or ``service shop/cart:80``."""
    match by:
        case None:
            return ""
        case "client":
            return labels.get("client_id") or "without identity"
        case "route":
            kind = "route" if labels.get("route_name") else "srv"
            return _object(labels, kind) if f"{kind}_kind" in labels else "-"
        case "destination":
            return f"{_object(labels, 'dst')}:{labels.get('dst_port', '')}"


def _object(labels: Labels, prefix: str) -> str:
    namespace, name = labels.get(f"{prefix}_namespace", ""), labels.get(f"{prefix}_name", "")
    return f"{labels.get(f'{prefix}_kind', '')} {namespace + '/' if namespace else ''}{name}"
