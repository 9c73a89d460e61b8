"""The Gateway API's own mesh conformance suite passes, and with mutual TLS, which the suite cannot see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster import conformance, images, kit
from tests.cluster.conftest import Ground
from tests.cluster.kube import Refused, Space

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NAMESPACE = "gateway-conformance-mesh"
REPORT = Path(__file__).parents[2] / "docs" / "conformance" / f"gateway-api-mesh-v{kit.GATEWAY_API}.yaml"


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


def test_the_mesh_suite_passes_and_its_requests_are_mutual_tls(suite: Ground, tmp_path: Path) -> None:
    outcome = conformance.run(suite.kube.kubeconfig, tmp_path / "report.yaml", keep=True)
    kit.say(f"conformance: passed {len(outcome.passed)}, failed {outcome.failed}")
    assert not outcome.failed, outcome.output[-20000:]
    assert {"MeshBasic", "MeshConsumerRoute", "MeshFrontend", "MeshGRPCRouteWeight", "MeshPorts", "MeshTrafficSplit"} <= set(outcome.passed)
    plaintext, mutual = plaintext_and_tls(Space(suite.kube, NAMESPACE))
    assert mutual > 100, "the weights alone ask hundreds of times"
    assert plaintext == 0


def test_the_committed_report_is_of_this_suite_and_claims_what_is_tested() -> None:
    report = yaml.safe_load(REPORT.read_text())
    assert report["gatewayAPIVersion"] == f"v{kit.GATEWAY_API}"
    assert all(
        level["statistics"]["Failed"] == 0
        for profile in report["profiles"]
        for key, level in profile.items()
        if key in ("core", "extended")
    )
    extended = {name for profile in report["profiles"] for name in profile.get("extended", {}).get("supportedFeatures", [])}
    assert extended == set(conformance.EXTENDED)


def plaintext_and_tls(space: Space) -> tuple[float, float]:
    """Requests that the suite's servers got, by what their sidecars say: (without an identity, over mutual TLS)."""
    found = [0.0, 0.0]
    for pod in space.pods():
        for series, value in space.metrics(pod["metadata"]["name"]).items():
            if series.startswith("pillion_request_total{") and 'direction="inbound"' in series:
                found['tls="true"' in series] += value
    return found[0], found[1]
