"""gRPC's own interoperability tests, client and server of grpc-go, through both sidecars.

Both programs are built once from the Go modules that grpc_interop/go.sum pins, and kept in the user's cache folder; that takes
twenty seconds when the modules are there already.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.addrs import Addr
from policy.wire import GrpcMatch, InboundPolicy, Route, Rule
from tests.conformance.go_tools import go_tool
from tests.ports import unused_port
from tests.scenarios.mesh import FOR_CART, inbound_policy, mesh
from tests.scenarios.peers import program, run

pytestmark = [pytest.mark.slow, pytest.mark.needs("go")]

_MODULES = Path(__file__).parent / "grpc_interop"
_PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
_VERSION = "1.83.2"

CASES = (
    "empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream", "timeout_on_sleeping_server",
    "cancel_after_begin", "cancel_after_first_response", "custom_metadata", "status_code_and_message", "special_status_message",
    "unimplemented_method", "unimplemented_service", "orca_per_rpc", "orca_oob", "rpc_soak", "channel_soak",
)  # fmt: skip
"""All that the client knows but those about credentials, and `pick_first_unary`, which is about name resolution."""

_REPORTING = ("-service_config_json", '{"loadBalancingConfig":[{"test_backend_metrics_load_balancer":{}}]}')
_SOAKING = ("-soak_iterations", "30", "-soak_per_iteration_max_acceptable_latency_ms", "20000")
OPTIONS = {"orca_per_rpc": _REPORTING, "orca_oob": _REPORTING, "rpc_soak": _SOAKING, "channel_soak": _SOAKING}
"""Load reports are read by a balancer of the client. A soak is as long as half a second, and does not mind how long one call takes."""

_GIVES_UP = ("timeout_on_sleeping_server", "cancel_after_begin")
"""The client may have left before its request was sent."""

_SERVICES = tuple(GrpcMatch(service=f"grpc.testing.{name}") for name in ("TestService", "UnimplementedService"))
_REPORTS = GrpcMatch(service="xds.service.orca.v3.OpenRcaService")
ROUTED = inbound_policy(routes=(Route(FOR_CART.server, "grpc", (), (Rule((*_SERVICES, _REPORTS)),), FOR_CART.authorizations),))


def _program(of: str) -> str:
    return go_tool(f"grpc-interop-{of}-{_VERSION}", _MODULES, f"google.golang.org/grpc/interop/{of}")


@pytest.fixture(scope="module")
def client() -> str:
    return _program("client")


@pytest.fixture
async def server() -> AsyncIterator[Addr]:
    addr = Addr("127.0.0.1", unused_port())
    async with program(_program("server"), "-port", str(addr.port), ready=addr):
        yield addr


@pytest.mark.parametrize("policy", [FOR_CART, ROUTED], ids=["by-port", "by-route"])
@pytest.mark.parametrize("case", CASES)
async def test_the_case_passes_through_both_sidecars(client: str, server: Addr, case: str, policy: InboundPolicy):
    async with mesh(server, policy=policy) as made, made.entry() as entry:
        where = ("-server_host", entry.ip, "-server_port", str(entry.port))
        ran = await run(client, *where, "-test_case", case, *OPTIONS.get(case, ()))
        assert ran.exit == 0, ran.err[-2000:]
        assert case in _GIVES_UP or made.metric(made.server, "pillion_inbound_http_authz_allow_total") > 0


def test_the_page_names_the_version_and_how_many_cases_there_are():
    assert f"google.golang.org/grpc v{_VERSION}\n" in re.sub(r" // indirect", "", (_MODULES / "go.mod").read_text())
    assert f"grpc-go {_VERSION}" in _PAGE.read_text()
    assert f"| through both sidecars | {len(CASES)} | 0 |" in _PAGE.read_text()
