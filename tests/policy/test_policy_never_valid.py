"""A route that was never understood closes what it stood for, wherever it comes from; the Server's wider policies do not decide instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.k8s.fields import InvalidObject
from core.k8s.folder import FolderSource
from core.k8s.source import Apply, Event
from policy.admission import parse_object
from policy.authorize import Client, NoRoute, Permit, PortAuthorizer
from policy.index import Index
from tests.policy.policy_lab import CART, namespace, pod, route, server

ANYBODY = Client("10.0.0.9", None, "plaintext")


def decision(index: Index, target: bytes) -> object:
    authorizer = PortAuthorizer(index.inbound_policy("shop", "cart-0", 8080), CART.trust_domain)
    return authorizer.for_client(ANYBODY).request(b"GET", target, b"cart", ())


def misread(**more: Any) -> dict[str, Any]:
    """A route with a rule that the Gateway API does not know, as one stored while no webhook looked."""
    raw = route(path="/admin")
    raw["spec"]["rules"][0]["matches"][0]["path"] |= {"type": "Glob", **more}
    return raw


def taken_from(folder: Path) -> Index:
    index = Index()
    source = FolderSource(folder, parse_object)
    events: list[Event] = []
    for _ in range(2):  # nothing is believed before two looks agree
        events += source.look()
    for event in events:
        assert isinstance(event, Apply)
        index.apply(event.object)
    assert [str(refusal.ref) for refusal in source.refusals] in ([], ["httproute shop/web"]), source.refusals
    return index


def test_a_server_that_is_open_to_all_is_closed_by_a_route_that_nobody_understands(tmp_path: Path) -> None:
    things = [namespace(), pod(), server(accessPolicy="all-unauthenticated")]
    (tmp_path / "a.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": things}))
    assert isinstance(decision(taken_from(tmp_path), b"/admin"), Permit)
    (tmp_path / "b.json").write_text(json.dumps(misread()))
    closed = taken_from(tmp_path)
    assert isinstance(decision(closed, b"/admin"), NoRoute)
    assert isinstance(decision(closed, b"/"), NoRoute)


def test_what_stands_in_names_the_fault_and_matches_nothing() -> None:
    with pytest.raises(InvalidObject, match=r"path\.type") as caught:
        parse_object(misread())
    stands_in = caught.value.instead
    assert stands_in.servers == ("cart",)
    assert stands_in.rules == ()
    assert "Glob" in stands_in.unsupported


def test_a_route_of_nobody_leaves_nothing_behind() -> None:
    raw = misread()
    raw["metadata"]["name"] = "Not A Name"
    with pytest.raises(InvalidObject) as caught:
        parse_object(raw)
    assert caught.value.instead is None
