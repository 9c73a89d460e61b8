"""What readers see: targets judged, what is behind stated first, charts, JSON that can be read again."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from bench import report
from bench.charts import CHARTS, Picture, chart
from bench.facts import Facts
from bench.measure import UNITS, Result
from bench.page import TITLES, performance_page
from bench.targets import TARGETS, Target, judge

FACTS = Facts(
    machine={
        "cpu": "a <fast> cpu",
        "cores": "2",
        "memory_gib": "4",
        "kernel": "6.1",
        "congestion_control": "cubic",
        "python": "3.11.2",
        "python_build": "PGO+LTO",
    },
    versions={"envoy": "1.40.0", "haproxy": "2.6.12"},
    commit="abc",
    pinning="nothing is pinned",
    rounds=5,
    seconds=4,
    quick=False,
    started=0.0,
    took_s=1.0,
)


def row(contestant: str, metric: str, value: float, *, name: str = "P1", work: str = "w") -> Result:
    return Result(name, work, contestant, metric, UNITS[metric], value, 0.1, 0, 5, None, None)


P1_BEHIND = [row("pillion", "throughput", 15.0), row("envoy", "throughput", 10.0), row("haproxy", "throughput", 15.0)]


def verdict(rows: list[Result], name: str, metric: str, against: str | None) -> tuple[float | None, bool]:
    found = next(one for one in judge(rows) if (one.target.row, one.target.metric, one.target.against) == (name, metric, against))
    return found.figure, found.met


def test_a_ratio_below_its_target_is_not_reached() -> None:
    assert verdict(P1_BEHIND, "P1", "throughput", "envoy") == (1.5, False)


def test_a_ratio_at_its_target_is_reached() -> None:
    assert verdict(P1_BEHIND, "P1", "throughput", "haproxy") == (1.0, True)


def test_what_a_peer_was_not_measured_for_is_unknown_and_not_reached() -> None:
    assert verdict(P1_BEHIND, "P1", "throughput", "envoy-h2") == (None, False)


def test_a_target_without_peer_is_the_figure_itself() -> None:
    assert verdict([row("pillion", "pss_idle", 29.0, name="P6")], "P6", "pss_idle", None) == (29.0, False)
    assert verdict([row("pillion", "pss_idle", 27.0, name="P6")], "P6", "pss_idle", None) == (27.0, True)


def test_what_acceleration_adds_stands_beside_and_decides_nothing() -> None:
    rows = [*P1_BEHIND, row("pillion-ebpf", "throughput", 18.0)]
    found = next(one for one in judge(rows) if (one.target.row, one.target.metric, one.target.against) == ("P1", "throughput", "envoy"))
    assert (found.figure, found.accelerated, found.met) == (1.5, 1.8, False)
    assert "| >= 1.7x | **1.5x** | 1.8x |" in performance_page(FACTS, rows)


def test_the_hop_is_judged_by_the_way_that_accelerates() -> None:
    rows = [
        row(who, "bandwidth", value, name="P8", work="bulk, 64 KiB writes") for who, value in (("nftables", 2.0), ("connect+sockmap", 5.0))
    ]
    assert verdict(rows, "P8", "bandwidth", "nftables") == (2.5, True)


def test_a_work_whose_name_begins_like_another_is_not_judged_by_its_target() -> None:
    rows = [row(who, "throughput", 10.0, name="P3", work="gRPC, 8 x 16") for who in ("pillion", "envoy")]
    works = {(one.target.work, one.work) for one in judge(rows) if one.target.row == "P3" and one.figure is not None}
    assert works == {("gRPC, 8 x 16", "gRPC, 8 x 16")}


def test_every_target_names_a_known_row_and_metric() -> None:
    assert {target.row for target in TARGETS} <= TITLES.keys()
    assert {target.metric for target in TARGETS} <= UNITS.keys()


def test_shortfall_counts_in_the_direction_of_the_target() -> None:
    assert Target("P6", "", "pss_idle", None, 28).met(27)
    assert not Target("P1", "", "throughput", "envoy", 1.7).met(1.6)


def test_the_page_states_what_is_behind_before_what_is_ahead() -> None:
    page = performance_page(FACTS, P1_BEHIND)
    behind, ahead = page.index("## Not yet ahead"), page.index("## Ahead")
    assert behind < page.index(">= 1.7x | **1.5x**") < ahead < page.index(">= 0.95x | **1x**") < page.index("## All figures")


def test_the_page_names_what_was_not_measured() -> None:
    assert "- P11 From exec to ready, certificate included: ready" in performance_page(FACTS, P1_BEHIND)


def test_failed_rounds_are_on_the_page_with_their_reason() -> None:
    failed = replace(row("envoy", "throughput", 1.0), failed=2, note="timeout 3")
    assert "P1 w, envoy: 2 of 5 (timeout 3)" in performance_page(FACTS, [failed])


def test_a_chart_is_well_formed_and_in_scale() -> None:
    text = chart(P1_BEHIND, Picture("P1", "throughput"))
    assert text is not None
    bars = [float(bar.get("width", "0")) for bar in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert bars[0] == bars[2]
    assert bars[1] == pytest.approx(bars[0] / 1.5, rel=0.01)


def test_names_in_a_chart_are_escaped() -> None:
    text = chart([row("pillion", "throughput", 1.0, work="<&>")], Picture("P1", "throughput"))
    assert text is not None
    assert "&lt;&amp;&gt;" in text


ROUND_TRIPS = [
    row(who, "latency_p50", value, name="P8", work=f"round trip, {work}")
    for work, base in (("one processor", 20.0), ("any processor", 60.0), ("16 connections, one processor", 200.0))
    for who, value in (("nftables", base), ("connect+sockmap", base / 2))
]


def test_a_chart_of_works_that_differ_by_far_has_a_scale_for_each() -> None:
    text = chart(ROUND_TRIPS, Picture("P8", "latency_p50", "one processor", each=True))
    assert text is not None
    bars = [float(bar.get("width", "0")) for bar in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert bars == [bars[0], bars[0] / 2] * 2


def test_the_hop_stands_beside_plain_nftables_everybody_else_beside_the_peers() -> None:
    page = performance_page(FACTS, [*P1_BEHIND, *ROUND_TRIPS])
    assert "| round trip, any processor | latency p50 | connect+sockmap | 30 us | 10% | 0.50 |" in page
    assert page.count("| to nftables |") == page.count("| to Envoy | to HAProxy |") == 1


def test_the_hop_is_judged_with_one_connection_and_with_sixteen() -> None:
    works = ("round trip, 100 bytes, one processor", "round trip, 100 bytes, 16 connections, one processor")
    figures = ((works[0], 6.0), (works[1], 5.0))
    rows = [row("nftables", "latency_p50", 10.0, name="P8", work=work) for work in works]
    rows += [row("connect+sockmap", "latency_p50", value, name="P8", work=work) for work, value in figures]
    found = {one.work: one.met for one in judge(rows) if one.target.row == "P8" and one.figure is not None}
    assert found == {works[0]: False, works[1]: True}


def test_no_two_charts_have_one_name() -> None:
    assert len({picture.file for picture in CHARTS}) == len(CHARTS)


def test_there_is_no_chart_of_nothing() -> None:
    assert chart([row("none", "throughput", 1.0)], Picture("P1", "throughput")) is None


def test_a_run_written_as_json_can_be_read_again() -> None:
    assert report.from_json(report.as_json(FACTS, P1_BEHIND)) == (FACTS, P1_BEHIND)


def test_the_page_refers_to_the_charts_that_are_written_and_there_are_no_others(tmp_path: Path) -> None:
    (tmp_path / "performance").mkdir()
    (tmp_path / "performance" / "P8-of-an-earlier-run.svg").touch()
    report.write_page(FACTS, P1_BEHIND, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    written = sorted(path.name for path in (tmp_path / "performance").iterdir())
    assert written == ["P1-throughput.svg"]
    assert "](performance/P1-throughput.svg)" in page


def test_the_page_names_rows_behind_that_nobody_has_explained() -> None:
    rows = [*P1_BEHIND, row("pillion", "pss_idle", 29.0, name="P6")]
    assert "Not looked into yet: P6." in performance_page(FACTS, rows, "**A request (P1)** costs, as one of P12 does.")
    assert "Not looked into yet" not in performance_page(FACTS, rows, "**A request (P1)** and memory (P6).")
