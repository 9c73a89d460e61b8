"""``python -m bench.scale.controller FILE``: the policy controller as it runs on a cluster, with credentials from a file.

PROFILE=path in the environment writes a cProfile there at the end.
"""

from __future__ import annotations

import cProfile
import os
import pickle
import sys
from pathlib import Path

import trio

from core.credentials import Credentials
from core.env import load
from core.runtime import logs
from core.runtime.watch import Cell
from policy.cluster import run_on_cluster
from policy.config import Config


def main() -> None:
    credentials: Credentials = pickle.loads(Path(sys.argv[1]).read_bytes())
    config = load(Config, os.environ)
    logs.configure(config.log_level, config.log_format)

    async def certified(cell: Cell[Credentials | None]) -> None:
        cell.set(credentials)

    profile = cProfile.Profile() if os.environ.get("PROFILE") else None
    if profile:
        profile.enable()
    try:
        trio.run(run_on_cluster, config, certified)
    finally:
        if profile:
            profile.disable()
            profile.dump_stats(os.environ["PROFILE"])


if __name__ == "__main__":
    main()
