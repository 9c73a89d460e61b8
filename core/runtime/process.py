"""What the kernel says about this process: memory, CPU and descriptors for ``process_*`` metrics, and how much of them it may have.

Figures are read at every scrape; how many descriptors and how much memory there may be is asked once, at the start.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_BOOTED_S = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
"""Once: /proc/stat has whole seconds, and a value that follows the wall clock would look like restarts."""


class ProcessFigures(NamedTuple):
    """Names, units and meaning as in Prometheus' process collector; ``start_time_s`` since the epoch."""

    cpu_s: float
    resident_bytes: int
    virtual_bytes: int
    open_fds: int
    max_fds: int
    threads: int
    start_time_s: float


def read_process() -> ProcessFigures:
    """The figures now."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        # the second field, the program's name, is in parentheses and may hold anything, parentheses included
        fields = file.read().rpartition(")")[2].split()
    return ProcessFigures(
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS,
        resident_bytes=int(fields[21]) * _PAGE_BYTES,
        virtual_bytes=int(fields[20]),
        open_fds=len(os.listdir("/proc/self/fd")) - 1,  # without the one that lists
        max_fds=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        threads=int(fields[17]),
        start_time_s=_BOOTED_S + int(fields[19]) / _TICKS,
    )


def most_files() -> int:
    """How many descriptors this process may have open; as many as it can be given from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


def most_memory(root: Path = Path("/")) -> int:
    """How many bytes this process may use before the kernel ends it: its cgroup's limit or, without one, all that the machine has."""
    found = [int(_line_of(root / "proc/meminfo", "MemTotal:").split()[1]) * 1024]
    cgroup = root / "sys/fs/cgroup"
    inside = _line_of(root / "proc/self/cgroup", "0::").removeprefix("0::/")
    for folder in (cgroup / inside, *(cgroup / inside).parents):  # whichever is the tightest
        if folder.is_relative_to(cgroup):
            found += _limit_in(folder / "memory.max")
    found += _limit_in(cgroup / "memory/memory.limit_in_bytes")  # version 1, as a container sees it
    return min(found)


def _line_of(path: Path, beginning: str) -> str:
    return next((line for line in path.read_text().splitlines() if line.startswith(beginning)), "")


def _limit_in(path: Path) -> list[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []  # else it is the word max
