"""The chart in Helm: what Helm renders is what `pillion install` prints, and what our settings refuse Helm refuses."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.render.chart import CHART, load_chart, render
from cli.render.values import assigned
from tools.helm import available, ensure
from tools.manifests import PROFILES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def helm() -> Path:
    missing = available()
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"{missing}, and CI runs everything", pytrace=False)
    if missing:
        pytest.skip(missing)
    return ensure()


def run(helm: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # a binary from `go install` takes an old cluster for granted
    return subprocess.run([str(helm), *arguments], capture_output=True, text=True, timeout=60, check=False)


def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Objects by kind and name; YAML inside of a ConfigMap is read too, because the two writers quote differently."""
    for item in objects:
        if item and item["kind"] == "ConfigMap":
            item["data"] = {key: yaml.safe_load(text) for key, text in item["data"].items()}
    return {(item["kind"], item["metadata"]["name"]): item for item in objects if item}


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_helm_renders_what_install_prints(helm: Path, profile: str) -> None:
    settings, ha = PROFILES[profile]
    options = [word for assignment in settings for word in ("--set", assignment)]
    options += ["-f", str(CHART / "values-ha.yaml")] if ha else []
    result = run(helm, "template", "pillion", str(CHART), "--namespace", "pillion", "--kube-version", "1.34.0", *options)
    assert result.returncode == 0, result.stderr
    theirs = by_name(list(yaml.safe_load_all(result.stdout)))
    ours = by_name(render(load_chart(), assigned(settings), ha=ha))
    assert theirs.keys() == ours.keys()
    for key, item in ours.items():
        assert theirs[key] == item, key


def test_the_chart_passes_lint(helm: Path) -> None:
    result = run(helm, "lint", "--strict", str(CHART))
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("assignment", ["polcy.replicas=2", "policy.replicas=0", "injector.failurePolicy=Maybe", "logLevel=loud"])
def test_helm_refuses_the_settings_that_install_refuses(helm: Path, assignment: str) -> None:
    result = run(helm, "template", "pillion", str(CHART), "--kube-version", "1.34.0", "--set", assignment)
    assert result.returncode != 0
    assert "values don't meet the specifications of the schema" in result.stderr


def test_the_chart_has_the_version_of_the_package() -> None:
    from importlib import metadata

    version = metadata.version("pillion")
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert (chart["version"], chart["appVersion"]) == (version, version)
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert (values["image"], values["agentImage"]) == (f"pillion:{version}", f"pillion-agent:{version}")
