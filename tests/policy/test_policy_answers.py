"""No answer is longer than a sidecar reads, whatever somebody's Services and routes are like."""

from __future__ import annotations

import pytest

from core.refs import Ref
from policy import wire
from policy.answers import encoded_destination
from policy.match import PATTERNS_MAX

SERVICE = Ref("", "Service", "shop", "cart")


def endpoints(count: int, of: int = 0) -> tuple[wire.Endpoint, ...]:
    return tuple(wire.Endpoint(f"10.{of}.{at >> 8}.{at & 255}:8080", "spiffe://cluster.local/ns/shop/sa/cart") for at in range(count))


def backends(count: int, each: int) -> tuple[wire.Backend, ...]:
    return tuple(wire.Backend(Ref("", "Service", "shop", f"cart{of}"), endpoints(each, of)) for of in range(count))


def routes(count: int) -> tuple[wire.ServiceRoute, ...]:
    match = wire.HttpMatch(wire.PathMatch("Exact", "/" + "x" * 1000))
    return tuple(wire.ServiceRoute(SERVICE, "http", (), (wire.Rule((match,)),), (wire.Action(),)) for _ in range(count))


def said(destination: wire.Destination) -> wire.Destination:
    line = encoded_destination("10.96.0.1:80", destination)
    assert len(line) <= wire.MAX_LINE_BYTES
    found = wire.decode_to_sidecar_untrusted(line)
    assert isinstance(found, wire.AddressDestination)
    return found.destination


@pytest.mark.parametrize(
    "found",
    [
        wire.Destination("service", SERVICE, "http1", endpoints(65_000)),
        wire.Destination("service", SERVICE, "http1", endpoints(3), routes(1), backends(4, 16_000)),
        wire.Destination("service", SERVICE, "http1", endpoints(65_000), routes(1), backends(4, 16_000)),
    ],
    ids=["of the Service", "of backends", "of both"],
)
def test_of_too_many_endpoints_every_list_keeps_some(found: wire.Destination) -> None:
    told = said(found)
    assert told.endpoints and all(backend.endpoints for backend in told.backends)
    assert told.endpoints == found.endpoints[: len(told.endpoints)]
    assert told.routes == found.routes and [one.ref for one in told.backends] == [one.ref for one in found.backends]


@pytest.mark.parametrize("behind", [(), endpoints(1), endpoints(5000)], ids=["nothing", "one", "many"])
def test_nothing_is_sent_where_routes_are_too_long_to_be_told(behind: tuple[wire.Endpoint, ...]) -> None:
    told = said(wire.Destination("service", SERVICE, "http1", behind, routes(5000), backends(2, len(behind))))
    assert told == wire.Destination("service", SERVICE, "http1")


def test_nothing_is_sent_where_routes_have_more_regular_expressions_than_a_sidecar_takes() -> None:
    matches = [wire.HttpMatch(wire.PathMatch("RegularExpression", f"/{at}.*")) for at in range(PATTERNS_MAX + 1)]
    few, many = (
        wire.Destination("service", SERVICE, "http1", endpoints(1), (wire.ServiceRoute(SERVICE, "http", (), (rule,), (wire.Action(),)),))
        for rule in (wire.Rule(tuple(matches[:-1])), wire.Rule(tuple(matches)))
    )
    assert said(few) == few
    assert said(many) == wire.Destination("service", SERVICE, "http1")
