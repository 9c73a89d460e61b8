"""Prints the path of a helm of a fixed version: the one in the cache, else built from its Go module (some minutes, once).

Called by tests of the chart; people who have helm need nothing of this. The cache is PILLION_CACHE, else ~/.cache/pillion.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "v3.19.5"
MODULE = "helm.sh/helm/v3/cmd/helm"


def cached() -> Path:
    """Where the binary lies once it is there."""
    home = os.environ.get("PILLION_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pillion"
    return Path(home) / f"helm-{VERSION}" / "helm"


def available() -> str:
    """Why there can be no helm here, empty when there can."""
    return "" if cached().exists() or shutil.which("go") else "needs Go (Debian package golang-go) to build helm"


def ensure() -> Path:
    """The binary, built when it is not there; raises CalledProcessError."""
    binary = cached()
    binary.parent.mkdir(parents=True, exist_ok=True)
    with (binary.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            print(f"building helm {VERSION} into {binary.parent}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
                command = ["go", "install", "-trimpath", "-ldflags=-s -w", f"{MODULE}@{VERSION}"]
                subprocess.run(command, env={**os.environ, "GOBIN": folder, "GOFLAGS": "-buildvcs=false"}, check=True)
                os.replace(Path(folder) / "helm", binary)
    return binary


if __name__ == "__main__":
    print(ensure())
