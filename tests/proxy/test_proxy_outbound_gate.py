"""The gate of outbound requests where dialling fails in ways that nobody has thought of."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from core.addrs import Addr
from core.refs import Ref
from core.runtime.watch import Cell
from policy.wire import Destination, Endpoint
from proxy.discover import DestinationState
from proxy.outbound.deadlines import Deadlines
from proxy.outbound.gate import Http1Gate, Toolkit
from proxy.outbound.pool import Http1Pool, Http2Pool
from proxy.protocol.http1.client import Http1Client
from proxy.protocol.http2 import Http2Limits
from proxy.telemetry.access_log import Mode
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.record import Recorder
from proxy.transport.relay import Relay
from tests.proxy.http1_fakes import FakeSink

WEB = Ref("", "Service", "shop", "web")


class Dialer:
    """Raises one error after the other."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    async def endpoint(self, endpoint: Endpoint, addr: Addr, inside: bytes) -> Any:
        raise self.errors.pop(0)


async def asked(dialer: Any, *endpoints: Endpoint) -> tuple[bytes, list[tuple[Any, dict[str, Any]]]]:
    """What a client gets for one request, and what was logged."""
    cell: Cell[Destination | None] = Cell(Destination("service", WEB, "detect", endpoints))
    destination = DestinationState(Addr("10.96.0.1", 80), cell, trio.current_time)
    logged: list[tuple[Any, dict[str, Any]]] = []
    relay = Relay(lambda error: None)
    recorder = Recorder(
        Metrics(trio.current_time), trio.current_time, lambda *line, **more: logged.append((line, more)), Mode.OFF, lambda _: None
    )
    async with trio.open_nursery() as nursery:
        pools = Http1Pool(relay, 1), Http2Pool(relay, Http2Limits())
        toolkit = Toolkit(dialer, relay, nursery, *pools, Deadlines(relay, nursery, trio.current_time), trio.current_time)
        gate = Http1Gate(toolkit, destination.hold(), recorder.outbound(Addr("10.0.0.9", 1), Addr("10.96.0.1", 80), WEB))
        sink = FakeSink()
        gate.engine = Http1Client(sink, gate)
        gate.engine.received(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
    return bytes(sink.out), logged


@pytest.mark.parametrize("addr", ["10.0.0.5:80", "no address"])
async def test_a_bug_while_dialling_costs_the_request_and_not_the_sidecar(addr: str) -> None:
    answer, logged = await asked(Dialer(KeyError("a bug")), Endpoint(addr))
    assert answer.startswith(b"HTTP/1.1 500 ") and b"pillion-proxy-error: internal\r\n" in answer
    assert logged[0][0][0] == "error"


async def test_a_request_that_can_go_nowhere_is_logged_as_one_that_could_not_be_dialled() -> None:
    answer, logged = await asked(Dialer())
    assert answer.startswith(b"HTTP/1.1 503 ") and b"pillion-proxy-error: no-endpoints\r\n" in answer
    ((level, event), fields), *others = logged
    assert (level, event, fields["dst"], others) == ("info", "outbound no-endpoints", "10.96.0.1:80", [])
    assert "ready" in fields["detail"]
