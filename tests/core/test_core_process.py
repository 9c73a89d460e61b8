"""What the kernel says about this process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from core.runtime.process import most_memory, read_process


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


@pytest.mark.parametrize(
    ("own_cgroup", "files", "found"),
    [
        ("0::/\n", {}, 8 << 30),
        ("0::/\n", {"memory.max": "536870912\n"}, 512 << 20),
        ("0::/\n", {"memory.max": "max\n"}, 8 << 30),
        ("0::/pods/one\n", {"pods/one/memory.max": "max\n", "pods/memory.max": "1048576\n"}, 1 << 20),
        ("0::/pods/one\n", {"pods/one/memory.max": "4096\n", "pods/memory.max": "1048576\n"}, 4096),
        ("9:memory:/pods/one\n", {"memory/memory.limit_in_bytes": "268435456\n"}, 256 << 20),
        ("9:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8 << 30),
    ],
)
def test_the_memory_that_may_be_used_is_the_tightest_limit(tmp_path: Path, own_cgroup: str, files: dict[str, str], found: int) -> None:
    written = {"proc/meminfo": "MemTotal:        8388608 kB\nMemFree: 1 kB\n", "proc/self/cgroup": own_cgroup}
    for name, text in {**written, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert most_memory(tmp_path) == found


def test_the_memory_of_this_process_is_known() -> None:
    assert most_memory() > read_process().resident_bytes
