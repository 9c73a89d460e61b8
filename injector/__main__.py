"""``python -m injector``: reads the settings, says everything that is wrong with them at once, runs the webhook."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from core.env import InvalidSettings, describe, load
from core.k8s.cluster import NoCluster
from core.runtime import logs
from injector.app import MeshFile, run
from injector.config import Config
from injector.mesh import InvalidMesh


def main(arguments: list[str]) -> int:
    """Exit codes: 0 after SIGTERM or a good ``--check-config``, 1 for settings or sockets that do not do, 2 for usage."""
    if arguments not in ([], ["--check-config"]):
        print(f"usage: python -m injector [--check-config]\n\n{describe(Config)}", file=sys.stderr)
        return 2
    try:
        config = load(Config, os.environ)
        if arguments:
            MeshFile(Path(config.mesh_file))
            print("ok")
            return 0
        logs.configure(config.log_level, config.log_format)
        trio.run(run, config)
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        return 1
    except InvalidMesh as error:
        print(f"injector: PILLION_MESH_FILE: {error}", file=sys.stderr)
        return 1
    except (NoCluster, OSError) as error:
        print(f"injector: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
