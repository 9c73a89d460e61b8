"""The Gateway API's mesh conformance suite against an installed Pillion: ``python -m tests.cluster conformance``.

The suite is the project's own, unchanged (kit.py builds it). Its namespaces are injected by annotation; its echo application is the one
that its manifests name. A run takes some minutes and writes a report for docs/conformance.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.cluster import kit
from tools import image

CORE = ("Mesh", "HTTPRoute", "GRPCRoute")
EXTENDED = (
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
)
UNCOUNTED = (
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteParentRefPort",
    "HTTPRouteResponseHeaderModification",
)
"""Features of gateways that tests of the mesh need too: these tests run, and a report does not count them."""
FEATURES = (*CORE, *EXTENDED, *UNCOUNTED)
"""What we claim. A test of the suite that needs anything else is skipped."""


class Outcome(NamedTuple):
    """By name of the test, without the prefix of the suite."""

    passed: list[str]
    failed: list[str]
    output: str


def run(
    kubeconfig: str, report: Path, *, only: str = "", features: Sequence[str] = FEATURES, keep: bool = False, timeout_s: float = 1500
) -> Outcome:
    """The whole suite, or the one test ``only``; the report is written in the suite's own format. keep: its pods stay."""
    folder = kit.have("gateway")
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [
        str(folder / "gateway-conformance"), "-test.v", "-test.run", "TestConformance$", "-test.timeout", f"{timeout_s:.0f}s",
        "-conformance-profiles", "MESH-HTTP,MESH-GRPC", "-supported-features", ",".join(features), "-mesh-name", "pillion",
        "-allow-crds-mismatch", "-namespace-annotations", "pillion.dev/inject=enabled", f"-cleanup-base-resources={str(not keep).lower()}",
        "-organization", "pillion", "-project", "pillion", "-url", "none", "-version", f"v{image.version()}", "-contact", "none",
        "-report-output", str(report.resolve()), *(["-run-test", only] if only else []),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder / "suite", env={**os.environ, "KUBECONFIG": kubeconfig}, capture_output=True, text=True,
        timeout=timeout_s + 60, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    return Outcome(_named("PASS", output), _named("FAIL", output), output)


def _named(verdict: str, output: str) -> list[str]:
    """Tests of the suite (not their parts): lines such as ``    --- PASS: TestConformance/MeshBasic (1.2s)``."""
    return sorted(set(re.findall(rf"^\s+--- {verdict}: TestConformance/([^/\s]+) ", output, re.MULTILINE)))
