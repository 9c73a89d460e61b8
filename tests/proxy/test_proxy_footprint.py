"""What the sidecar loads: its memory is a headline number, and an import contract does not see what libraries import."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "asyncio", "bcc", "click", "grpc", "h2", "hypercorn", "jwt", "kubernetes", "prometheus_client", "pyroute2", "rich", "starlette", "yaml",
)  # fmt: skip
OURS = {
    "core": {"addrs", "alpn", "capture", "credentials", "env", "names", "refs", "runtime", "spelling"},
    "identity": {"chains", "client", "csr", "exchange", "ledger", "schedule", "wire"},
    "policy": {"authorize", "client", "lines", "match", "networks", "paths", "patterns", "wire"},
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
    return run(f"import {module}\n{then}")


def run(code: str) -> set[str]:
    """Names of all modules that a fresh interpreter holds once ``code`` has run."""
    code += "\nimport sys; print('\\n'.join(sys.modules))"
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


LEAN = "from core.runtime import lean\nlean.import_trio()\n"


@pytest.mark.slow
def test_the_program_loads_one_openssl_and_no_table_of_domain_names() -> None:
    names = run(LEAN + "import proxy.__main__, proxy.app")
    assert names & {"ssl", "_ssl", "_hashlib", "idna"} == set()
    assert "OpenSSL" in names


@pytest.mark.slow
def test_what_waits_is_there_for_whoever_uses_it() -> None:
    use = """
import hashlib, hmac, ssl, trio, trio.testing
async def shake_hands():
    near, far = trio.testing.memory_stream_pair()
    stream = trio.SSLStream(near, ssl.create_default_context(), server_hostname="b\u00fccher.example")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.send_all, b"no TLS at all" * 9)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            assert isinstance(error.__cause__, ssl.SSLError)
        else:
            assert False
    try:
        await trio.socket.getaddrinfo("b\u00fccher.invalid", 80, flags=trio.socket.AI_NUMERICHOST)
    except trio.socket.gaierror:
        pass
trio.run(shake_hands)
assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442") and len(hmac.digest(b"k", b"m", "sha256")) == 32
"""
    assert {"_ssl", "idna.core"} <= run(LEAN + use)


@pytest.mark.slow
def test_regular_expressions_cost_nothing_until_a_policy_has_one() -> None:
    assert "re2" not in loaded("proxy.app", ROUTE.format(type="PathPrefix"))
    assert "re2" in loaded("proxy.app", ROUTE.format(type="RegularExpression"))
