"""``python -m proxy``: run the sidecar; ``--check-config``: report every error of its settings and exit."""

from __future__ import annotations

import gc
import os
import sys

from core.runtime import lean
from proxy import hook

if __name__ == "__main__":
    gc.disable()  # until everything is loaded: nothing of it is garbage, and looking for some takes a tenth of the start
    if not sys.argv[1:] and hook.is_wanted(os.environ):
        hook.listener()
    lean.import_trio()

import trio

from core.env import InvalidSettings, describe
from core.names import InvalidName
from core.runtime import logs
from core.runtime.listen import CannotListen
from proxy.config import Config, load_config
from proxy.probes import InvalidProbe, read_probes


def main(arguments: list[str]) -> int:
    """Exit codes: 0 ended in order, 1 wrong settings or not captured, 2 wrong arguments."""
    if arguments not in ([], ["--check-config"]):
        print(f"usage: python -m proxy [--check-config]\n\nSettings come from the environment:\n{describe(Config)}", file=sys.stderr)
        return 0 if arguments in (["--help"], ["-h"]) else 2
    try:
        config = load_config(os.environ)
        read_probes(config.probes)
    except (InvalidSettings, InvalidName, InvalidProbe) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments:
        print("ok")
        return 0
    logs.configure(config.log_level, config.log_format)
    from proxy.app import run
    from proxy.hold import NotReleased

    gc.enable()
    ended: list[BaseException] = []
    try:
        trio.run(run, config)
    except* (CannotListen, NotReleased) as errors:
        ended.extend(errors.exceptions)
    print(*ended, sep="\n", end="\n" if ended else "", file=sys.stderr)
    return 1 if ended else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
