"""What the kernel says about this process, for ``process_*`` metrics: memory, CPU, descriptors.

Figures are read at every scrape; how many descriptors there may be is asked once, at the start.
"""

from __future__ import annotations

import os
import resource
import time
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
