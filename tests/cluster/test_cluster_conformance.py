"""The Gateway API's own mesh conformance suite: MeshBasic passes, and with mutual TLS, which the suite cannot see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import conformance, images, kit
from tests.cluster.conftest import Ground
from tests.cluster.kube import Refused, Space

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NAMESPACE = "gateway-conformance-mesh"


@pytest.fixture
def suite(ground: Ground, mesh: Space) -> Iterator[Ground]:
    if ground.nodes is not None:
        for archive in images.conformance():
            ground.nodes.load(archive)
    yield ground
    for name in (NAMESPACE, "gateway-conformance-mesh-consumer"):
        try:
            ground.kube.run("delete", "namespace", name, "--ignore-not-found", "--wait=false")
        except Refused:
            break


def test_mesh_basic_passes_and_its_requests_are_mutual_tls(suite: Ground, tmp_path: Path) -> None:
    outcome = conformance.run(suite.kube.kubeconfig, tmp_path / "report.yaml", only="MeshBasic", keep=True, timeout_s=300)
    kit.say(f"conformance: passed {outcome.passed}, failed {outcome.failed}")
    assert outcome.passed == ["MeshBasic"] and not outcome.failed, outcome.output[-5000:]
    assert plaintext_and_tls(Space(suite.kube, NAMESPACE))[1] > 0
    assert plaintext_and_tls(Space(suite.kube, NAMESPACE))[0] == 0


def plaintext_and_tls(space: Space) -> tuple[float, float]:
    """Requests that the suite's servers got, by what their sidecars say: (without an identity, over mutual TLS)."""
    found = [0.0, 0.0]
    for pod in space.pods():
        for series, value in space.metrics(pod["metadata"]["name"]).items():
            if series.startswith("pillion_request_total{") and 'direction="inbound"' in series:
                found['tls="true"' in series] += value
    return found[0], found[1]
