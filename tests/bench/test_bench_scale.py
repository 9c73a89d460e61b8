"""The simulated cluster of ``bench.scale`` is one that the controller understands whole."""

from __future__ import annotations

from bench.scale import objects
from bench.scale.objects import Size
from policy.admission import parse_object
from policy.index import Index

SIZE = Size(pods=40, services=10, policies=10, sidecars=4, namespaces=2)


def filled() -> Index:
    index = Index()
    for raw in objects.everything(SIZE):
        parsed = parse_object(raw)
        assert parsed is not None, raw["kind"]
        index.apply(parsed)
    return index


def test_every_object_is_understood_and_there_are_as_many_as_asked_for() -> None:
    kinds = [ref.kind for ref in filled().store.objects]
    counted = {kind: kinds.count(kind) for kind in ("Pod", "Service", "Server", "AuthorizationPolicy")}
    assert counted == {"Pod": 40, "Service": 11, "Server": 10, "AuthorizationPolicy": 10}


def test_changes_change_what_they_are_meant_to() -> None:
    index = filled()
    addr = f"{objects.vip_of(3)}:80"
    assert len(index.destination(addr).endpoints) == 4
    changed = parse_object(objects.slice_object(SIZE, 3, unready=2))
    assert changed is not None and index.apply(changed)
    assert len(index.destination(addr).endpoints) == 3
    policy = index.inbound_policy("team-000", "svc-3-0-0", objects.PORT)
    narrower = parse_object(objects.policy_object(SIZE, 3, "somebody"))
    assert narrower is not None and index.apply(narrower)
    assert index.inbound_policy("team-000", "svc-3-0-0", objects.PORT) != policy
