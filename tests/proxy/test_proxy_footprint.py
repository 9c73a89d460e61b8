"""What the sidecar loads: its memory is a headline number, and an import contract does not see what libraries import."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "asyncio", "bcc", "click", "grpc", "h2", "hypercorn", "jwt", "kubernetes", "prometheus_client", "pyroute2", "rich", "starlette", "yaml",
)  # fmt: skip


@pytest.mark.parametrize("module", ["proxy.app", "proxy.__main__"])
def test_the_sidecar_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
