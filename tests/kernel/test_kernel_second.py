"""The same tests under Debian's own kernel, in an emulated machine: it runs beside all others for minutes, and comes last (conftest)."""

from __future__ import annotations

import re

import pytest
import second_kernel

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.needs(*second_kernel.PROGRAMS)]


def test_the_suite_under_debians_kernel(guest: second_kernel.Guest) -> None:
    """Everything of this folder but the sizes of loads, and applications that only repeat the same system calls; and the agent."""
    code, output = guest.wait()
    assert re.search(r"=== up 6\.1\.", output), output[-2000:]
    assert code == 0, output[-6000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed
    assert int(passed[1]) > 100
