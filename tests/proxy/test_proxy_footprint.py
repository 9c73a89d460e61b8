"""What the sidecar loads: its memory is a headline number, and an import contract does not see what libraries import."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "asyncio", "bcc", "click", "grpc", "h2", "hypercorn", "jwt", "kubernetes", "prometheus_client", "pyroute2", "rich", "starlette", "yaml",
)  # fmt: skip
OURS = {
    "core": {"addrs", "alpn", "capture", "credentials", "env", "names", "refs", "runtime"},
    "identity": {"bundle", "client", "csr", "exchange", "ledger", "schedule", "wire"},
    "policy": {"authorize", "client", "lines", "match", "paths", "patterns", "wire"},
}
ROUTE = """
from core.refs import Ref
from policy.authorize import PortAuthorizer
from policy.wire import HttpMatch, InboundPolicy, PathMatch, Route, Rule
rule = Rule((HttpMatch(PathMatch({type!r}, "/a")),))
route = Route(Ref("", "HTTPRoute", "shop", "r"), "http", (), (rule,), ())
PortAuthorizer(InboundPolicy(Ref("", "Server", "shop", "s"), "http1", (), (route,)), "cluster.local")
"""


def loaded(module: str, then: str = "") -> set[str]:
    """Names of all modules that a fresh interpreter holds once ``module`` is imported and ``then`` has run."""
    code = f"import sys, {module}\n{then}\nprint('\\n'.join(sys.modules))"
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return set(shown.stdout.split())


@pytest.mark.slow
def test_the_sidecar_loads_nothing_heavy() -> None:
    names = loaded("proxy.__main__, proxy.app")
    assert names & set(HEAVY) == set()
    assert {"trio", "OpenSSL", "policy.match"} <= names


def test_of_the_other_components_the_sidecar_loads_its_own_end_only() -> None:
    parts = [name.split(".") for name in loaded("proxy.app")]
    assert {part[0] for part in parts} & {"injector", "ebpf", "local", "cli"} == set()
    for package, expected in OURS.items():
        assert {part[1] for part in parts if part[0] == package and len(part) > 1} == expected


@pytest.mark.slow
def test_regular_expressions_cost_nothing_until_a_policy_has_one() -> None:
    assert "re2" not in loaded("proxy.app", ROUTE.format(type="PathPrefix"))
    assert "re2" in loaded("proxy.app", ROUTE.format(type="RegularExpression"))
