"""Conformance tools written in Go: built once from the modules that a go.sum pins, and kept in the user's cache folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pillion" / "bin"


def go_tool(name: str, modules: Path, package: str) -> str:
    """The path of a program. name: with its version, for the cache. modules: the folder of go.mod and go.sum.

    Where Go's modules cannot be had the test is skipped, and fails in CI.
    """
    binary = _CACHE / name
    if not binary.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        made = binary.with_name(f"{name}.{os.getpid()}")
        command = ["go", "build", "-mod=readonly", "-trimpath", "-o", str(made), package]
        environ = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": ""}
        built = subprocess.run(command, cwd=modules, env=environ, capture_output=True, text=True, check=False, timeout=300)
        if built.returncode:
            reason = f"{name} could not be built from Go modules: {built.stderr.strip()[-500:]}"
            if os.environ.get("CI") == "true":
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        made.rename(binary)
    return str(binary)
