"""The command line against a real mesh: runner, identity service, policy controller and sidecar as processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.local_lab import wait_until

pytestmark = [pytest.mark.netns, pytest.mark.slow]

MESH = "test-cli"
MANIFESTS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {pillion.dev/inject: enabled}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: cart, namespace: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop}
spec:
  selector: {matchLabels: {app: cart}}
  template:
    metadata: {labels: {app: cart}}
    spec:
      serviceAccountName: cart
      containers:
      - name: app
        image: ignored
        command: [/usr/bin/python3, -m, http.server, "8080"]
        ports: [{containerPort: 8080, name: http}]
        readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1}
---
apiVersion: policy.pillion.dev/v1alpha1
kind: Server
metadata: {name: cart, namespace: shop}
spec: {podSelector: {matchLabels: {app: cart}}, port: http, proxyProtocol: HTTP/1, accessPolicy: all-authenticated}
"""


def pillion(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", *words, "--name", MESH]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module", autouse=True)
def _mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("manifests")
    (folder / "all.yaml").write_text(MANIFESTS)
    pillion("local", "down")  # of a run that was killed
    up = pillion("local", "up", "-f", str(folder), "--detach")
    try:
        assert up.returncode == 0, up.stderr
        yield
    finally:
        pillion("local", "down")


def test_authz_names_the_server_that_decides() -> None:
    shown = pillion("authz", "deploy/cart", "-n", "shop", "-o", "json")
    assert shown.returncode == 0, shown.stderr
    (row,) = json.loads(shown.stdout)
    assert (row["port"], row["server"]["name"], row["clients"]) == (8080, "cart", "any meshed workload")


def test_identity_shows_the_workloads_certificate() -> None:
    shown = pillion("identity", "cart", "-n", "shop", "-o", "json")
    assert shown.returncode == 0, shown.stderr
    (certs,) = json.loads(shown.stdout).values()
    assert certs["identity"] == "spiffe://cluster.local/ns/shop/sa/cart"
    assert "PRIVATE KEY" not in shown.stdout


def test_a_sidecar_and_the_controller_agree_on_the_policy() -> None:
    held = pillion("diagnostics", "policy", "cart", "-n", "shop", "-o", "json")
    decided = pillion("diagnostics", "policy", "cart", "-n", "shop", "-p", "8080", "-o", "json")
    assert json.loads(held.stdout)["8080"] == json.loads(decided.stdout)["policy"]


def test_metrics_of_a_running_sidecar_hold_its_certificate_and_memory() -> None:
    shown = pillion("diagnostics", "proxy-metrics", "cart", "-n", "shop", "-o", "json")
    (samples,) = json.loads(shown.stdout).values()
    values = {sample["name"]: sample["value"] for sample in samples}
    assert values["pillion_identity_cert_refreshes_total"] >= 1
    assert values["process_resident_memory_bytes"] > 1 << 20


def test_a_rotation_leaves_the_workload_with_another_anchor() -> None:
    before = json.loads(pillion("identity", "status", "-o", "json").stdout)
    done = pillion("identity", "rotate", "--through", "--wait", "60", "-o", "json")
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout)
    assert {anchor["id"] for anchor in after["anchors"]}.isdisjoint(anchor["id"] for anchor in before["anchors"])
    assert after["issuer"] != before["issuer"]


def test_a_rotation_waits_for_no_pod_that_exists_no_more(tmp_path: Path) -> None:
    manifest = tmp_path / "leaver.yaml"
    pod = (
        "{apiVersion: v1, kind: Pod, metadata: {name: leaver, namespace: shop}, spec: {terminationGracePeriodSeconds: 1, containers: [%s]}}"
    )
    manifest.write_text(pod % "{name: app, image: ignored, command: [sleep, infinity]}")

    def holders() -> set[str]:
        return {one["pod"] for one in json.loads(pillion("identity", "status", "-o", "json").stdout)["workloads"]}

    assert pillion("local", "apply", "-f", str(manifest)).returncode == 0
    wait_until(lambda: "shop/leaver" in holders(), "the new pod has a certificate", 60)
    assert pillion("local", "delete", "-f", str(manifest)).returncode == 0
    wait_until(lambda: "shop/leaver" not in holders(), "the pod is gone", 60)
    assert {name.partition("/")[0] for name in holders()} == {"shop", "pillion"}, "who exists is still known"
    done = pillion("identity", "rotate", "--through", "--wait", "60", "-o", "json")
    assert done.returncode == 0, done.stderr
