"""`make bench-quick`: every row runs, every contestant answers in it, no request fails. How fast anybody was decides nothing here."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

from bench import peers
from bench.facts import Facts
from bench.hop import WAYS
from bench.levels import BULK, HTTP, LEVELS, TRIPS
from bench.measure import Result
from bench.report import from_json
from bench.stage import ROOT

pytestmark = [
    pytest.mark.netns,
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.needs("haproxy", "nginx", "wrk", "h2load", "nghttpd", "gcc"),
]

PROXIES = {"envoy", "haproxy", "pillion", "pillion-ebpf"}
ALL = {"none", *PROXIES}
ALL_AND_HTTP2_BETWEEN = {*ALL, "envoy-h2"}
BY_PROGRAM = {"envoy", "haproxy", "pillion"}
HOPS = [
    f"round trip, {size} bytes, {many}{where} processor"
    for size in ("100", "1,024", "16,384")
    for many in ("", "16 connections, ")
    for where in ("one", "any")
]

TAKE_PART = {
    "P1": {"HTTP/1.1, 32 connections": ALL_AND_HTTP2_BETWEEN},
    "P2": {"HTTP/1.1, 1 connection": ALL_AND_HTTP2_BETWEEN},
    "P3": {"HTTP/2, 8 x 16": ALL, "gRPC, 8 x 16": ALL},
    "P4": {"HTTP/1.1, 1 MiB up": ALL_AND_HTTP2_BETWEEN, "HTTP/2, 1 MiB up": ALL, "opaque TCP, 64 MiB up": ALL},
    "P5": {"inbound, HTTP/1.1": PROXIES, "pair, opaque TCP": ALL},
    "P6": {"2 sidecars": BY_PROGRAM},
    "P7": {"300 idle connections": PROXIES},
    "P8": {
        **{work: set(WAYS) - {"connect+sockmap, trusting"} for work in HOPS},
        **{work: set(WAYS) for work in ("bulk, 64 KiB writes", "bulk, 64 KiB writes, blocking reader")},
        **{work: set(LEVELS) for work in (*TRIPS, BULK, HTTP)},
    },
    "P9": {"HTTP/1.1, 2,000 req/s open loop": ALL_AND_HTTP2_BETWEEN},
    "P11": {"exec to ready": BY_PROGRAM},
    "P12": dict.fromkeys(("1 route", "10 routes", "1 endpoint", "10 endpoints"), BY_PROGRAM),
}
"""Row -> work -> who must have figures in it. Written out, so that nobody leaves a row without a word."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, list[Result]]:
    """One run of the command behind `make bench-quick`, with its result in a folder of its own."""
    if missing := peers.prepare().missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{'; '.join(missing)}, and CI runs everything", pytrace=False)
        pytest.skip("; ".join(missing))
    out = tmp_path_factory.mktemp("bench") / "quick.json"
    progress = out.with_name("progress.log")
    with progress.open("w") as log:
        code = subprocess.run([sys.executable, "-m", "bench", "--quick", "--out", str(out)], cwd=ROOT, stdout=log, stderr=log).returncode
    assert out.exists(), progress.read_text()[-5000:]
    facts, found = from_json(out.read_text())
    failed = "\n".join(f"{row.row} {row.work}, {row.contestant}: {row.note}" for row in found if row.failed)
    assert code == 0, failed or progress.read_text()[-5000:]
    return facts, found


@pytest.fixture(scope="module")
def rows(run: tuple[Facts, list[Result]]) -> list[Result]:
    return run[1]


def test_everybody_who_takes_part_in_a_row_has_figures_in_it(rows: list[Result]) -> None:
    answered: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        if row.median is not None:
            answered.setdefault(row.row, {}).setdefault(row.work, set()).add(row.contestant)
    assert answered == TAKE_PART


def test_no_request_of_anybody_failed(rows: list[Result]) -> None:
    assert [(row.row, row.work, row.contestant, row.note) for row in rows if row.failed] == []


def test_everybody_is_measured_by_the_same_metrics_in_a_work(rows: list[Result]) -> None:
    metrics: dict[tuple[str, str], dict[str, set[str]]] = {}
    for row in rows:
        if row.contestant != "none":  # has no proxies whose CPU could be counted
            metrics.setdefault((row.row, row.work), {}).setdefault(row.contestant, set()).add(row.metric)
    differing = {work: by_whom for work, by_whom in metrics.items() if len(set(map(frozenset, by_whom.values()))) != 1}
    assert differing == {}


def test_every_figure_is_a_number_and_stands_beside_its_peers(rows: list[Result]) -> None:
    figures = {(row.row, row.work, row.contestant, row.metric): row.median for row in rows}
    for row in rows:
        assert row.median is not None
        assert math.isfinite(row.median), row
        for peer, ratio in (("envoy", row.ratio_to_envoy), ("haproxy", row.ratio_to_haproxy)):
            reference = figures.get((row.row, row.work, peer, row.metric))
            if reference is not None and reference > 0 and row.metric != "given_back":
                assert ratio == pytest.approx(row.median / reference), row


def test_every_pair_of_proxies_agrees_on_the_same_cipher_suite(run: tuple[Facts, list[Result]]) -> None:
    assert {name: agreed.partition(" and ")[0] for name, agreed in run[0].tls.items()} == dict.fromkeys(
        {*PROXIES, "envoy-h2"}, "AES-128-GCM"
    )
