"""How many descriptors the processes of a run may open. Called by `bench.__main__`, `bench.stage` and the row of idle connections."""

from __future__ import annotations

import contextlib
import resource

_WANTED = 65_536  # ten thousand connections through a proxy are twenty thousand descriptors, and the proxies keep some back


def file_limit() -> int:
    """Descriptors that every process of a run may open: this process's hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _WANTED if hard == resource.RLIM_INFINITY else hard


def raise_file_limit() -> None:
    """Take what the largest row wants where that is allowed (CAP_SYS_RESOURCE); where not, the row is as large as the limit lets it be."""
    if file_limit() < _WANTED:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (_WANTED, _WANTED))
