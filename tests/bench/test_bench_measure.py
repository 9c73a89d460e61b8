"""How samples become figures: medians, spread, the order of rounds, ratios, what processes cost."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.measure import Series, cpu_seconds, cpu_ticks_of, interleaved, median, pss_bytes, results, spread


def series(contestant: str, **samples: list[float]) -> Series:
    return Series("P1", "work", contestant, samples=samples)


def test_one_outlier_moves_the_spread_and_not_the_median() -> None:
    values = [10.0, 11.0, 10.0, 10.0, 20.0]
    assert median(values) == 10.0
    assert spread(values) == pytest.approx(1.0)


def test_spread_of_zeros_is_zero() -> None:
    assert spread([0.0, 0.0]) == 0.0


def test_rounds_are_interleaved_and_nobody_always_follows_the_same_one() -> None:
    assert interleaved("abc", 3) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_ratios_are_to_the_peer_of_the_same_row_work_and_metric() -> None:
    other_work = Series("P1", "other", "envoy", samples={"throughput": [1.0]})
    rows = results([series("envoy", throughput=[100.0, 120.0, 110.0]), series("pillion", throughput=[220.0]), other_work])
    ours = next(row for row in rows if row.contestant == "pillion")
    assert ours.ratio_to_envoy == pytest.approx(2.0)
    assert ours.ratio_to_haproxy is None
    assert (ours.unit, ours.rounds, ours.failed) == ("req/s", 1, 0)


def test_a_contestant_whose_rounds_all_failed_is_one_row_with_the_reason_and_no_figure() -> None:
    broken = series("pillion")
    broken.fail("3 failed: status 503")
    broken.fail("3 failed: status 503")
    (row,) = results([broken])
    assert row.median is None
    assert (row.failed, row.rounds, row.note) == (2, 2, "3 failed: status 503")


def test_failed_rounds_are_counted_beside_the_good_ones() -> None:
    partly = series("envoy", throughput=[5.0, 6.0])
    partly.fail("timeout 1")
    (row,) = results([partly])
    assert (row.median, row.failed, row.rounds) == (5.5, 1, 3)


def test_cpu_is_read_past_a_command_name_with_spaces_and_parentheses() -> None:
    stat = "77 (a (b) c) S 1 77 77 0 -1 4194304 200 0 0 0 " + "11 22 33 44" + " 20 0 1 0 100 1000 10"
    assert cpu_ticks_of(stat) == 11 + 22 + 33 + 44


BURN = "import time\nwhile time.process_time() < 0.15: pass"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]); print('done', flush=True); sys.stdin.read()"


def test_cpu_of_a_child_counts_as_its_parents() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"done\n"
        assert cpu_seconds([parent.pid]) >= 0.13


def test_cpu_of_a_process_that_is_gone_is_zero() -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    assert cpu_seconds([int(done.stdout)]) == 0.0


def test_memory_is_the_proportional_share() -> None:
    assert 1_000_000 < pss_bytes(os.getpid()) < 10_000_000_000
