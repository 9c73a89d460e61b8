"""Metrics: what is counted, that the official parser reads it back, and that cardinality stays bounded without losing counts."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from core.refs import Ref
from proxy.telemetry.counters import OVERFLOW, Counter, Family, Gauge
from proxy.telemetry.metrics import LATENCY_MS, Metrics, build_info, classify, inbound_labels, outbound_labels, process_samples
from proxy.telemetry.prometheus import Sample, exposition
from proxy.telemetry.record import Outcome

LABELS = inbound_labels(
    "true",
    "spiffe://cluster.local/ns/shop/sa/web",
    Ref("policy.pillion.dev", "Server", "shop", "cart"),
    Ref("gateway.networking.k8s.io", "HTTPRoute", "shop", "items"),
    Ref("policy.pillion.dev", "AuthorizationPolicy", "shop", "web-only"),
    8080,
)


def clock() -> SimpleNamespace:
    return SimpleNamespace(time=0.0)


def parsed(data: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample as the official parser sees it; a series that appears twice is an error."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(data.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """The sum over the series of a name that carry these labels."""
    wanted = set(labels.items())
    return sum(number for (sample, have), number in parsed(metrics.render()).items() if sample == name and wanted <= have)


def test_a_request_is_counted_with_who_asked_and_what_decided() -> None:
    metrics = Metrics(lambda: 0)
    series = metrics.http(LABELS)
    series.requests.value += 1
    Outcome(series, None, None).count_end(200, 3.2)
    Outcome(series, None, None).count_end(503, 12_000)
    who = {
        "direction": "inbound",
        "tls": "true",
        "client_id": "spiffe://cluster.local/ns/shop/sa/web",
        "srv_name": "cart",
        "srv_port": "8080",
    }
    assert value(metrics, "pillion_request_total", route_kind="httproute", authz_name="web-only", **who) == 1
    assert value(metrics, "pillion_response_total", status_code="200", classification="success", **who) == 1
    assert value(metrics, "pillion_response_total", status_code="503", classification="failure", **who) == 1
    assert value(metrics, "pillion_response_latency_ms_bucket", le="3") == 0
    assert value(metrics, "pillion_response_latency_ms_bucket", le="4") == 1
    assert value(metrics, "pillion_response_latency_ms_bucket", le="20000") == 2
    assert value(metrics, "pillion_response_latency_ms_count") == 2
    assert value(metrics, "pillion_response_latency_ms_sum") == pytest.approx(12_003.2)


def test_the_latency_bounds_are_linkerds() -> None:
    assert LATENCY_MS[:6] == (1, 2, 3, 4, 5, 10)
    assert LATENCY_MS[-1] == 50_000
    assert len(LATENCY_MS) == 25


def test_a_value_on_a_bound_belongs_to_it() -> None:
    series = Metrics(lambda: 0).http(LABELS)
    for millis in (1.0, 2.0, 2.1):
        Outcome(series, None, None).count_end(200, millis)
    assert series.latency_ms.counts[:4] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("status", "grpc", "expected"),
    [(200, -1, "success"), (404, -1, "success"), (500, -1, "failure"), (0, -1, "failure"), (200, 0, "success"), (200, 5, "success")]
    + [(200, code, "failure") for code in (2, 4, 7, 13, 14, 15)],
)
def test_classifies_as_linkerd_does(status: int, grpc: int, expected: str) -> None:
    assert classify(status, grpc) == expected


def test_an_answer_cut_short_is_a_failure_and_has_a_series_of_its_own() -> None:
    metrics = Metrics(lambda: 0)
    series = metrics.http(LABELS)
    Outcome(series, None, None).count_end(200, 1)
    Outcome(series, None, None).count_end(200, 1, cut=True)
    Outcome(series, None, None).count_end(200, 1, 0)
    Outcome(series, None, None).count_end(200, 1, 0)
    assert value(metrics, "pillion_response_total", classification="failure") == 1
    assert value(metrics, "pillion_response_total", grpc_status="0", classification="success") == 2


def test_odd_statuses_of_an_app_share_one_series() -> None:
    metrics = Metrics(lambda: 0)
    series = metrics.http(LABELS)
    for status in range(600, 1000):
        Outcome(series, None, None).count_end(status, 1)
        Outcome(series, None, None).count_end(200, 1, grpc_status=status)
    assert value(metrics, "pillion_response_total", status_code="other") == 400
    assert value(metrics, "pillion_response_total", grpc_status="other") == 400
    assert len([key for key in parsed(metrics.render()) if key[0] == "pillion_response_total"]) == 2


def test_connections_and_their_bytes_are_counted() -> None:
    metrics = Metrics(lambda: 0)
    tcp = metrics.tcp(outbound_labels("true", "spiffe://cluster.local/ns/shop/sa/cart", Ref("", "Service", "shop", "cart"), 80))
    assert metrics.tcp(outbound_labels("true", "spiffe://cluster.local/ns/shop/sa/cart", Ref("", "Service", "shop", "cart"), 80)) is tcp
    tcp.opened()
    tcp.opened()
    tcp.closed(10, 20)
    assert value(metrics, "pillion_tcp_open_total", dst_name="cart", dst_namespace="shop", dst_port="80") == 2
    assert value(metrics, "pillion_tcp_open_connections") == 1
    assert value(metrics, "pillion_tcp_close_total") == 1
    assert value(metrics, "pillion_tcp_read_bytes_total") == 10
    assert value(metrics, "pillion_tcp_write_bytes_total") == 20


def test_decisions_errors_and_certificates_are_counted() -> None:
    metrics = Metrics(lambda: 0)
    metrics.http_authz("deny", LABELS).value += 1
    metrics.tcp_authz("terminate", LABELS).value += 1
    metrics.route_not_found(LABELS).value += 1
    metrics.error("inbound", "denied")
    metrics.error("inbound", "denied")
    metrics.certified(2000.5, 1000)
    metrics.certification_failed("token-refused")
    assert value(metrics, "pillion_inbound_http_authz_deny_total") == 1
    assert value(metrics, "pillion_inbound_http_authz_allow_total") == 0
    assert value(metrics, "pillion_inbound_tcp_authz_terminate_total") == 1
    assert value(metrics, "pillion_inbound_http_route_not_found_total") == 1
    assert value(metrics, "pillion_errors_total", direction="inbound", error="denied") == 2
    assert value(metrics, "pillion_identity_cert_expiration_timestamp_seconds") == 2000.5
    assert value(metrics, "pillion_identity_cert_refreshes_total") == 1
    assert value(metrics, "pillion_identity_cert_refresh_failures_total", reason="token-refused") == 1


def test_sources_are_asked_at_every_scrape() -> None:
    metrics = Metrics(lambda: 0)
    reading = [1.0]
    metrics.add_source(lambda: [build_info("0.1.0", "3.11"), Sample("process_resident_memory_bytes", "gauge", "Memory.", reading[0])])
    assert value(metrics, "process_resident_memory_bytes") == 1
    reading[0] = 2.5e9
    assert value(metrics, "process_resident_memory_bytes") == 2.5e9
    assert value(metrics, "pillion_proxy_build_info", version="0.1.0", python="3.11") == 1


def test_an_idle_series_is_dropped_after_ten_minutes_and_not_before() -> None:
    now = clock()
    metrics = Metrics(lambda: now.time)
    metrics.http_authz("allow", LABELS).value += 1
    for now.time in (0, 599):
        assert value(metrics, "pillion_inbound_http_authz_allow_total") == 1
    now.time = 600
    assert b"authz_allow" not in metrics.render()


def test_a_dropped_series_that_is_held_comes_back_with_its_whole_count() -> None:
    now = clock()
    metrics = Metrics(lambda: now.time)
    series = metrics.http(LABELS)
    series.requests.value += 1
    metrics.render()
    now.time = 700
    assert b"pillion_request_total" not in metrics.render()
    series.requests.value += 1
    assert value(metrics, "pillion_request_total") == 2


def test_asking_again_for_a_dropped_series_that_is_held_gives_the_same_one() -> None:
    now = clock()
    family = Family("x", "", Counter, lambda: now.time, 10, 600)
    held = family.series((("a", "1"),))
    for now.time in (0, 600):
        family.sweep()
    assert len(family) == 0
    assert family.series((("a", "1"),)) is held


def test_certificate_counts_survive_the_hours_between_renewals() -> None:
    now = clock()
    metrics = Metrics(lambda: now.time)
    metrics.certified(1, 0)
    for now.time in (0.0, 60_000.0):
        assert value(metrics, "pillion_identity_cert_refreshes_total") == 1


def test_open_connections_stay_counted_however_quiet_they_are() -> None:
    now = clock()
    metrics = Metrics(lambda: now.time)
    tcp = metrics.tcp(LABELS)
    tcp.opened()
    for now.time in (0, 10_000, 20_000):
        assert value(metrics, "pillion_tcp_open_connections") == 1
    tcp.closed(0, 0)
    for now.time in (20_001, 20_002):
        assert value(metrics, "pillion_tcp_open_connections") == 0
    now.time = 30_000
    assert b"pillion_tcp_open_connections" not in metrics.render()


def test_a_full_family_counts_the_rest_together() -> None:
    family = Family("x", "", Counter, lambda: 0, 3, 600)
    held = [family.series((("a", str(n)),)) for n in range(100)]
    for series in held:
        series.value += 1
    assert len(family) == 4
    assert family.series(OVERFLOW).value == 97


def test_a_full_family_makes_room_when_old_series_are_idle() -> None:
    now = clock()
    family = Family("x", "", Counter, lambda: now.time, 3, 600)
    for n in range(3):
        family.series((("a", str(n)),))
    gc.collect()
    now.time = 600
    assert family.series((("a", "new"),)) is not family.series(OVERFLOW)


def test_memory_of_dropped_series_is_given_back() -> None:
    now = clock()
    family = Family("x", "", Gauge, lambda: now.time, 10_000, 600)
    for n in range(1000):
        family.series((("a", str(n)),))
    for now.time in (600, 600):
        family.sweep()
    assert len(family) == 0
    assert not family._dormant


@given(st.lists(st.tuples(st.text(), st.floats(allow_nan=False)), max_size=5, unique_by=lambda pair: pair[0]))
def test_any_label_and_value_is_read_back_by_the_official_parser(pairs: list[tuple[str, float]]) -> None:
    samples = [Sample("x", "gauge", "a\nb\\", number, (("peer", name),)) for name, number in pairs]
    read = {labels: number for (_, labels), number in parsed(exposition([], samples)).items()}
    assert read == {frozenset({("peer", name)}): number for name, number in pairs}


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    page = Path(__file__).parents[2].joinpath("docs/metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`((?:pillion|process)_\w+[a-z])`", page.partition("## Labels")[0]))
    samples = [build_info("0", "3"), *process_samples(0, 0, 0, 0, 0, 0, 0)]
    assert documented == {family.name for family in Metrics(lambda: 0)._families} | {sample.name for sample in samples}


def test_every_label_is_documented() -> None:
    page = Path(__file__).parents[2].joinpath("docs/metrics.md").read_text(encoding="utf-8")
    used = {name for name, _ in (*LABELS, *outbound_labels("true", "x", Ref("", "Service", "shop", "cart"), 80))}
    assert used <= set(re.findall(r"`(\w+)`", page.partition("## Labels")[2]))
