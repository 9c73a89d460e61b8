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
from proxy.outbound.gate import Http1Gate, Services
from proxy.outbound.pool import Http1Pool, Http2Pool
from proxy.protocol.http2 import Http2Limits
from proxy.protocol.requests import LATER, Answer
from proxy.rescue import Cause
from proxy.telemetry.access_log import Mode
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.record import Recorder
from proxy.transport.relay import Relay

WEB = Ref("", "Service", "shop", "web")


class Head:
    method, target, authority, grpc, bodiless = b"GET", b"/", b"web", False, True

    def values(self, names: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        return (None,) * len(names)


class Engine:
    """Keeps the verdicts that come late."""

    def __init__(self) -> None:
        self.verdicts: list[Any] = []

    def proceed(self, token: int, verdict: Any) -> None:
        self.verdicts.append(verdict)


class Dialer:
    """Raises one error after the other."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    async def endpoint(self, endpoint: Endpoint, addr: Addr, inside: bytes) -> Any:
        raise self.errors.pop(0)


@pytest.mark.parametrize("addr", ["10.0.0.5:80", "no address"])
async def test_a_bug_while_dialling_costs_the_request_and_not_the_sidecar(addr: str) -> None:
    cell: Cell[Destination | None] = Cell(Destination("service", WEB, "detect", (Endpoint(addr),)))
    destination = DestinationState(Addr("10.96.0.1", 80), cell, trio.current_time)
    relay, logged = Relay(lambda error: None), []
    recorder = Recorder(
        Metrics(trio.current_time), trio.current_time, lambda *line, **more: logged.append((line, more)), Mode.OFF, lambda _: None
    )
    async with trio.open_nursery() as nursery:
        dialer: Any = Dialer(KeyError("a bug"))
        pools = Http1Pool(relay, 1), Http2Pool(relay, Http2Limits())
        services = Services(dialer, relay, nursery, *pools, Deadlines(relay, nursery, trio.current_time), trio.current_time)
        gate = Http1Gate(services, destination.hold(), recorder.outbound(Addr("10.0.0.9", 1), Addr("10.96.0.1", 80), WEB))
        gate.engine = engine = Engine()  # type: ignore[assignment]
        assert gate.request(Head(), 1) is LATER
    [verdict] = engine.verdicts
    assert isinstance(verdict, Answer)
    assert verdict.cause is Cause.INTERNAL
    assert logged[0][0][0] == "error"
