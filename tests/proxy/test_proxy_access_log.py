"""The access log: which exchanges are written, and that the documented schema is the one that is written."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from core.refs import Ref
from proxy.telemetry.access_log import Entry, Mode, fields_of, wanted

FULL = Entry(
    direction="inbound",
    protocol="HTTP/1.1",
    client_addr="10.0.0.1:40000",
    client_id="spiffe://cluster.local/ns/shop/sa/web",
    server_addr="10.0.0.2:8080",
    duration_ms=1.23456,
    method=b"GET",
    target=b"/items?token=secret",
    authority=b"cart",
    status=403,
    grpc_status=7,
    request_bytes=0,
    response_bytes=10,
    server=Ref("policy.pillion.dev", "Server", "shop", "cart"),
    route=Ref("gateway.networking.k8s.io", "HTTPRoute", "shop", "items"),
    authorization=Ref("policy.pillion.dev", "AuthorizationPolicy", "shop", "web-only"),
    audit=True,
    reason="no authorization of route shop/items matches",
    cause="denied",
    user_agent=b"curl/8",
    trace_id=b"00-1-2-01",
)


def test_every_written_field_is_documented_and_every_documented_one_is_written() -> None:
    page = Path(__file__).parents[2].joinpath("docs/access-log.md").read_text(encoding="utf-8")
    table = page.partition("| field |")[2]
    documented = {name for row in table.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert documented - {"timestamp", "level", "event", "component"} == set(fields_of(FULL))


def test_the_query_is_never_written() -> None:
    assert fields_of(FULL)["path"] == "/items"
    assert "secret" not in str(fields_of(FULL))


def test_zero_bytes_are_written_but_what_is_unknown_is_left_out() -> None:
    assert fields_of(FULL)["request_bytes"] == 0
    opaque = fields_of(Entry("outbound", "TCP", "10.0.0.1:1", "", "10.0.0.2:5432", 12.0, request_bytes=3))
    assert opaque == {
        "direction": "outbound",
        "protocol": "TCP",
        "client_addr": "10.0.0.1:1",
        "server_addr": "10.0.0.2:5432",
        "request_bytes": 3,
        "duration_ms": 12.0,
    }


def test_an_exchange_the_client_saw_nothing_of_has_status_0() -> None:
    assert fields_of(replace(FULL, status=0))["status"] == 0


def test_long_values_are_cut() -> None:
    assert len(str(fields_of(replace(FULL, target=b"/" * 100_000, user_agent=b"\xff" * 100_000)))) < 4000


@pytest.mark.parametrize(
    ("mode", "status", "cause", "expected"),
    [
        (Mode.OFF, 500, "internal", False),
        (Mode.ERRORS, 200, None, False),
        (Mode.ERRORS, 404, None, False),
        (Mode.ERRORS, 404, "no-route", True),
        (Mode.ERRORS, 503, None, True),
        (Mode.ERRORS, 0, None, True),
        (Mode.ALL, 200, None, True),
    ],
)
def test_errors_are_what_the_proxy_refused_and_what_the_app_failed(mode: Mode, status: int, cause: str | None, expected: bool) -> None:
    assert wanted(mode, status, cause) is expected
