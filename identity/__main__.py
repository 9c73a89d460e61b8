"""``python -m identity``: reads the settings, says everything that is wrong with them at once, runs the service."""

from __future__ import annotations

import os
import sys

import trio

from core.env import InvalidSettings, describe, load
from core.k8s.cluster import NoCluster
from core.runtime import logs
from core.runtime.secrecy import keep_memory_private
from identity.app import run
from identity.config import Config
from identity.issuer import IssuerExpired, IssuerInvalid
from identity.store import StoreUnsafe


def main(arguments: list[str]) -> int:
    """Exit codes: 0 after SIGTERM or a good ``--check-config``, 1 for settings, keys or sockets that do not do, 2 for usage."""
    if arguments not in ([], ["--check-config"]):
        print(f"usage: python -m identity [--check-config]\n\n{describe(Config)}", file=sys.stderr)
        return 2
    try:
        config = load(Config, os.environ)
        config.check()
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        return 1
    if arguments:
        print("ok")
        return 0
    logs.configure(config.log_level, config.log_format)
    keep_memory_private()
    try:
        if config.source == "kubernetes":
            from identity.cluster.app import run_on_kubernetes

            trio.run(run_on_kubernetes, config)
        else:
            trio.run(run, config)
    except (NoCluster, StoreUnsafe, IssuerInvalid, IssuerExpired, OSError, ValueError) as error:
        print(f"identity: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
