"""The same tests under Debian's own kernel, in an emulated machine: minutes, so marked slow."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import second_kernel

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.needs(*second_kernel.PROGRAMS)]

ROOT = Path(__file__).parents[2]
SCALE = 0.05
"""A twentieth of the rounds: what the suite looks for shows in the first of them, and emulation is ten times slower."""


def test_the_suite_under_debians_kernel() -> None:
    """Everything of this folder but the sizes of loads, and applications that only repeat the same system calls."""
    left_out = "not resuming and not second and not node and not grpc and not go_net and not wrk"
    pytest_words = [sys.executable, "-m", "pytest", "tests/kernel", "-q", "--no-header", "-p", "no:cacheprovider", "-k", left_out]
    words = ["env", f"PILLION_KERNEL_SCALE={SCALE}", "CI=", *pytest_words]
    code, output = second_kernel.run(words, 1500, folder=ROOT)
    assert re.search(r"=== up 6\.1\.", output), output[-2000:]
    assert code == 0, output[-6000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed
    assert int(passed[1]) > 100
