"""The quick start of the README, command by command, on a cluster that is there already."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Ground
from tests.cluster.images import APP_IMAGE
from tests.cluster.kube import Space

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("docker ", "kind ")
"""Who has a cluster has these behind them."""


def commands() -> list[str]:
    block = re.search(r"<!-- quick start: .*? -->\n```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert block is not None
    return [line.split("  #")[0].strip() for line in block[1].splitlines() if line.strip() and not line.startswith(ELSEWHERE)]


def adapted(command: str, ground: Ground, folder: Path) -> str | None:
    """The same command where the internet is out of reach: other images, and Gateway API kinds that are there."""
    if "gateway-api/releases" in command:
        return None
    command = command.replace("pillion install", f"pillion install --image {ground.image} --agent-image {ground.agent_image}")
    command = command.replace("apply -f examples/hello", f"apply -f {folder}")
    return command.replace("-- curl -s ", "-- python3 /app/app.py call ")


@pytest.fixture
def hello(ground: Ground, tmp_path: Path) -> Iterator[Path]:
    """The example with the tests' app for its images."""
    for file in (ROOT / "examples" / "hello").glob("*.yaml"):
        text = file.read_text("utf-8").replace("python:3.13-slim", APP_IMAGE).replace("curlimages/curl", APP_IMAGE)
        (tmp_path / file.name).write_text(text.replace("[sleep, infinity]", "[python3, -c, 'import signal; signal.pause()']"), "utf-8")
    yield tmp_path
    ground.kube.run("delete", "namespace", "hello", "--wait=false", "--ignore-not-found")


def test_the_quick_start_does_what_it_says(ground: Ground, mesh: Space, hello: Path) -> None:
    environment = {**os.environ, "KUBECONFIG": ground.kube.kubeconfig, "PATH": f"{Path(ground.kube.kubectl).parent}:{os.environ['PATH']}"}
    answers = {}
    for command in commands():
        line = adapted(command, ground, hello)
        if line is None:
            continue
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        answers[command] = done.stdout
    by_client = next(answer for command, answer in answers.items() if "deploy/client -- curl" in command)
    assert "spiffe://cluster.local/ns/hello/sa/client" in by_client
    by_stranger = next(answer for command, answer in answers.items() if "deploy/stranger" in command)
    assert "403" in by_stranger and "spiffe://" not in by_stranger
    assert any(command.startswith(".venv/bin/pillion check --proxy") for command in answers)
