"""``python -m policy [--source SOURCE] [--check-config]``: reads the settings, says everything wrong with them, runs the controller."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import trio

from core.credentials import Credentials
from core.env import InvalidSettings, describe, load
from core.k8s.folder import FolderSource
from core.runtime import logs
from core.runtime.secrecy import keep_memory_private
from core.runtime.watch import Cell
from policy.admission import parse_object
from policy.config import Config
from policy.controller import run


def main(arguments: list[str]) -> int:
    """Exit codes: 0 after SIGTERM or a good ``--check-config``, 1 for settings or sockets that do not do, 2 for usage."""
    parser = argparse.ArgumentParser("python -m policy", epilog=describe(Config), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="kubernetes or folder:DIR; overrides PILLION_POLICY_SOURCE")
    parser.add_argument("--check-config", action="store_true", help="report every wrong setting and exit")
    options = parser.parse_args(arguments)
    environment = dict(os.environ, **({"PILLION_POLICY_SOURCE": options.source} if options.source else {}))
    try:
        config = load(Config, environment)
        config.check()
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        return 1
    if options.check_config:
        print("ok")
        return 0
    logs.configure(config.log_level, config.log_format)
    keep_memory_private()
    try:
        if config.folder:
            trio.run(run, config, FolderSource(Path(config.folder), parse_object), partial(keep_own_certificate, config))
        else:
            _run_on_cluster(config)
    except* OSError as group:
        print(f"policy: {group.exceptions[0]}", file=sys.stderr)
        return_code = 1
    else:
        return_code = 0
    return return_code


def _run_on_cluster(config: Config) -> None:
    from policy.cluster import NoCluster, run_on_cluster  # webhook and election: a machine without a cluster does without

    try:
        trio.run(run_on_cluster, config, partial(keep_own_certificate, config))
    except NoCluster as error:
        raise OSError(str(error)) from error


async def keep_own_certificate(config: Config, cell: Cell[Credentials | None]) -> None:
    """We are a workload like any other: the identity service certifies us."""
    from identity.client import IdentitySettings, keep_certified

    settings = IdentitySettings(
        addr=config.identity_addr,
        expect=config.identity_service,
        identity=config.identity,
        token_file=Path(config.token_file),
        anchors_file=Path(config.anchors_file),
    )
    await keep_certified(settings, cell, _Log())


class _Log:
    """Our own certificate's life, in the log."""

    def __init__(self) -> None:
        self._log = logs.logger("identity-client")

    def certified(self, credentials: Credentials) -> None:
        """A fresh certificate is in use."""
        self._log.info("certified", identity=credentials.identity.uri, not_after=credentials.not_after)

    def bundle_changed(self, credentials: Credentials, generation: int) -> None:
        """The trust bundle was replaced."""
        self._log.info("trust bundle changed", identity=credentials.identity.uri, generation=generation)

    def failed(self, reason: str, detail: str, retry_in_s: float) -> None:
        """Certifying or following failed."""
        self._log.warning("not certified", reason=reason, detail=detail, retry_in_s=round(retry_in_s, 2))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
