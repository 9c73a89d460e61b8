"""A checkout where only its owner may go, as below /root, of somebody whose new files nobody else may read (umask 077): pods run all the
same, and see nothing else of that folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from local_lab import LocalMesh

from local.exposure import closed_folders

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.needs("setpriv")]

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "proxy", "policy", "identity", "injector", "ebpf", "local", "cli", "manifests")
MANIFESTS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {pillion.dev/inject: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: one, namespace: shop}
spec: {terminationGracePeriodSeconds: 1, containers: [{name: a, command: [sleep, "9999"]}]}
"""


def test_a_checkout_in_a_closed_home_runs_meshed_pods(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if closed_folders([str(ROOT)], lambda path: os.stat(path).st_mode):
        pytest.skip("this checkout lies in a closed home itself: every meshed pod here shows the same")
    home, manifests = tmp_path / "home", tmp_path / "manifests"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, home / "pillion" / package, ignore=shutil.ignore_patterns("__pycache__"))
    (home / "secret").write_text("mine")
    home.chmod(0o700)
    manifests.mkdir()
    (manifests / "app.yaml").write_text(MANIFESTS)
    monkeypatch.setenv("PYTHONPATH", str(home / "pillion"))
    mesh = LocalMesh(f"home-{os.getpid()}", manifests)
    before = os.umask(0o077)
    request.addfinalizer(lambda: os.umask(before))
    request.addfinalizer(lambda: mesh.run("down"))
    started = mesh.up()
    assert started.returncode == 0, started.stderr
    assert mesh.pods()["one"]["meshed"]
    seen = mesh.sh("one", f"ls {home}; cat {home}/secret")
    assert seen.stdout == "pillion\n" and "No such file" in seen.stderr
