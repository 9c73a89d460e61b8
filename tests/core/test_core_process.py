"""What the kernel says about this process."""

from __future__ import annotations

import os
import time

from core.runtime.process import read_process


def test_the_figures_are_of_this_process() -> None:
    with open(os.devnull, "rb"):
        opened = read_process().open_fds
    figures = read_process()
    assert opened == figures.open_fds + 1
    assert 1 << 20 < figures.resident_bytes < figures.virtual_bytes
    assert 0 < figures.cpu_s < 36_000
    assert figures.threads >= 1
    assert figures.max_fds > figures.open_fds
    assert 0 <= time.time() - figures.start_time_s < 86_400
