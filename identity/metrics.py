"""The metrics of the identity service in Prometheus' text format 0.0.4. Called by `app`."""

from __future__ import annotations

from typing import Protocol

from identity.authority import Authority
from identity.service import IdentityService


class _Serving(Protocol):
    not_after: float


def exposition(authority: Authority, service: IdentityService, serving: _Serving) -> bytes:
    """Bounded: no label holds anything from a caller."""
    trust, now = authority.trust.value, authority.clock()
    live = sum(1 for _ in authority.ledger.live(now))
    refused = service.counters.refused
    rows: list[_Row] = [
        ("pillion_identity_certified_total", "counter", "Certificates handed out", {"": float(service.counters.certified)}),
        (
            "pillion_identity_refused_total",
            "counter",
            "Requests refused, by status",
            {f'{{status="{status}"}}': float(count) for status, count in sorted(refused.items())},
        ),
        ("pillion_identity_polls_total", "counter", "Long polls for the trust bundle", {"": float(service.counters.polls)}),
        ("pillion_identity_issuer_expiry_timestamp_seconds", "gauge", "When the issuer's chain ends", {"": trust.issuer.not_after}),
        ("pillion_identity_serving_expiry_timestamp_seconds", "gauge", "When our own certificate ends", {"": serving.not_after}),
        ("pillion_identity_bundle_generation", "gauge", "Generation of the trust bundle", {"": float(trust.generation)}),
        ("pillion_identity_trust_anchors", "gauge", "Trust anchors in force", {"": float(len(trust.anchors))}),
        ("pillion_identity_workloads", "gauge", "Instances with an unexpired leaf", {"": float(live)}),
    ]
    return _text(rows)


def cluster_exposition(
    *,
    leading: bool,
    unreachable: bool,
    events_dropped: int,
    published: int | None,
    publish_failed: int | None,
    unpublished: int | None,
    waiting: int | None,
) -> bytes:
    """What only exists on Kubernetes; None: not known by a replica that does not lead."""
    rows: list[_Row] = [
        ("pillion_identity_leader", "gauge", "Whether this replica leads", {"": float(leading)}),
        ("pillion_identity_api_unreachable", "gauge", "Whether the API server did not answer last time", {"": float(unreachable)}),
        ("pillion_identity_events_dropped_total", "counter", "Occurrences that no Event tells about", {"": float(events_dropped)}),
    ]
    known = (
        ("pillion_identity_bundles_written_total", "counter", "Trust bundles written to namespaces", published),
        ("pillion_identity_bundle_failures_total", "counter", "Trust bundles that could not be written", publish_failed),
        ("pillion_identity_bundles_missing", "gauge", "Namespaces without the trust bundle in force", unpublished),
        ("pillion_identity_rotation_waiting", "gauge", "What the next step towards a given issuer waits for", waiting),
    )
    rows += [(name, kind, meaning, {"": float(value)}) for name, kind, meaning, value in known if value is not None]
    return _text(rows)


_Row = tuple[str, str, str, dict[str, float]]


def _text(rows: list[_Row]) -> bytes:
    lines = []
    for name, kind, meaning, values in rows:
        lines += [f"# HELP {name} {meaning}.", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value:.15g}" for labels, value in values.items()]
    return ("\n".join(lines) + "\n").encode()
