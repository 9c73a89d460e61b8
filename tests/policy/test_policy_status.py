"""policy.status: what the controller says about routes and about our own kinds, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import policy_lab as lab
import pytest
from policy_lab import indexed, parsed

from core.k8s.objects import Service, ServicePort
from policy.forwarding import ServiceParent
from policy.index import Index
from policy.index.report import Problem
from policy.index.routing import means
from policy.status import CONTROLLER, read_stored, wanted

NOW = "2026-02-02T02:02:02Z"
BEFORE = "2026-01-01T01:01:01Z"
SERVER = {"group": lab.POLICY, "kind": "Server", "name": "cart"}
SERVICE = {"group": "", "kind": "Service", "name": "cart"}


def stored(raw: dict[str, Any], generation: int = 3, **status: Any) -> Any:
    raw = {**raw, "metadata": {**raw["metadata"], "generation": generation, "resourceVersion": "7"}, "status": status}
    return read_stored(parsed({key: value for key, value in raw.items() if key != "status"}).ref, raw)


def said(status: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """(type, status, reason) of the only parent."""
    assert status is not None
    (parent,) = status["parents"]
    assert parent["controllerName"] == CONTROLLER
    return [(entry["type"], entry["status"], entry["reason"]) for entry in parent["conditions"]]


def spoken(index: Index, raw: dict[str, Any], refused: str = "") -> list[tuple[str, str, str]]:
    return said(wanted(index, stored(raw), refused, (), NOW))


def test_a_route_that_acts_is_accepted_and_its_references_resolve() -> None:
    index = indexed(lab.server(), lab.route())
    status = wanted(index, stored(lab.route()), "", (), NOW)
    assert said(status) == [("Accepted", "True", "Accepted"), ("ResolvedRefs", "True", "ResolvedRefs")]
    assert status is not None
    (parent,) = status["parents"]
    assert parent["parentRef"] == SERVER
    assert {entry["observedGeneration"] for entry in parent["conditions"]} == {3}
    assert {entry["lastTransitionTime"] for entry in parent["conditions"]} == {NOW}


@pytest.mark.parametrize(
    ("parent", "words"),
    [
        (SERVER | {"name": "nobody"}, "there is no Server nobody in namespace shop"),
        (SERVER | {"namespace": "other"}, "only in its own namespace shop"),
        (SERVER | {"port": 80}, "a Server has one port"),
        (SERVICE | {"name": "nobody"}, "there is no Service nobody in namespace shop"),
        (SERVICE | {"namespace": "other"}, "there is no Service cart in namespace other"),
        (SERVICE | {"port": 81}, "has no such port"),
        (SERVICE | {"sectionName": "grpc"}, "has no such port"),
        (SERVICE | {"sectionName": "web", "port": 81}, "has no such port"),
    ],
)
def test_a_parent_that_is_not_there_is_no_matching_parent_and_nothing_else(parent: dict[str, Any], words: str) -> None:
    route = lab.route(parent=parent)
    status = wanted(indexed(lab.server(), lab.service(), route), stored(route), "", (), NOW)
    assert said(status) == [("Accepted", "False", "NoMatchingParent")]
    assert status is not None and words in status["parents"][0]["conditions"][0]["message"]


def test_a_service_without_an_address_is_no_parent() -> None:
    route = lab.route(parent=SERVICE)
    assert spoken(indexed(lab.service(vip="None"), route), route) == [("Accepted", "False", "NoMatchingParent")]


def to(name: str = "cart", **fields: Any) -> dict[str, Any]:
    return {"name": name, "port": 80, **fields}


def test_a_route_of_a_service_is_accepted_and_says_which_backends_are_there() -> None:
    def resolved(**backend: Any) -> tuple[str, str]:
        route = lab.route(parent=SERVICE | {"port": 80, "sectionName": "web"}, backendRefs=[to(), to(**backend)])
        (accepted, (_, status, reason)) = spoken(indexed(lab.service(), route), route)
        assert accepted == ("Accepted", "True", "Accepted")
        return status, reason

    assert resolved() == ("True", "ResolvedRefs")
    assert resolved(name="nobody") == ("False", "BackendNotFound")
    assert resolved(port=81) == ("False", "BackendNotFound")
    assert resolved(group="example.com", kind="Bucket") == ("False", "InvalidKind")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"filters": [{"type": "RequestMirror", "requestMirror": {}}]}, 'filter "RequestMirror" is not supported'),
        ({"sessionPersistence": {"type": "Cookie"}}, "sessionPersistence is not supported"),
        ({"backendRefs": [to(filters=[{"type": "RequestMirror"}])]}, "spec.rules[0].backendRefs[0].filters[0]"),
    ],
)
def test_what_a_route_of_a_service_cannot_do_is_said(rule: dict[str, Any], words: str) -> None:
    route = lab.route(parent=SERVICE, **rule)
    status = wanted(indexed(lab.service(), route), stored(route), "", (), NOW)
    assert said(status) == [("Accepted", "False", "UnsupportedValue")]
    assert status is not None and words in status["parents"][0]["conditions"][0]["message"]


def test_an_http_route_of_a_service_with_a_grpc_route_is_conflicted() -> None:
    route, winner = lab.route(parent=SERVICE), lab.route("winner", kind="GRPCRoute", parent=SERVICE)
    index = indexed(lab.service(), route, winner)
    assert spoken(index, route) == [("Accepted", "False", "Conflicted")]
    assert spoken(index, winner)[0] == ("Accepted", "True", "Accepted")


@pytest.mark.parametrize(
    ("of_winner", "conflicted"),
    [
        ({}, True),
        ({"port": 80}, True),
        ({"sectionName": "web"}, True),
        ({"port": 80, "sectionName": "web"}, True),
        ({"port": 81}, False),
        ({"sectionName": "more"}, False),
        ({"port": 80, "sectionName": "more"}, False),
        ({"name": "other"}, False),
    ],
)
def test_only_a_grpc_route_of_the_same_port_displaces_an_http_route(of_winner: dict[str, Any], conflicted: bool) -> None:
    service = lab.service()
    service["spec"]["ports"].append({"name": "more", "port": 81})
    route = lab.route(parent=SERVICE | {"port": 80})
    winner = lab.route("winner", kind="GRPCRoute", parent=SERVICE | of_winner)
    reason = ("Accepted", "False", "Conflicted") if conflicted else ("Accepted", "True", "Accepted")
    assert spoken(indexed(service, route, winner), route)[0] == reason


def test_a_verdict_takes_no_look_at_every_route_for_every_port(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ServiceParent] = []

    def counted(parent: ServiceParent, service: Service, port: ServicePort) -> bool:
        asked.append(parent)
        return means(parent, service, port)

    monkeypatch.setattr("policy.index.routing.means", counted)
    monkeypatch.setattr("policy.status.means", counted)
    service = lab.service()
    service["spec"]["ports"] = [{"name": f"p{number}", "port": number} for number in range(1, 201)]
    routes = [lab.route(f"web{number}", parent=SERVICE) for number in range(100)]
    index = indexed(service, *routes)
    assert spoken(index, routes[0])[0] == ("Accepted", "True", "Accepted")
    assert len(asked) == 200, "its own parent and each port"


def test_a_filter_that_cannot_act_is_an_unsupported_value() -> None:
    route = lab.route(filters=[{"type": "RequestMirror"}])
    assert spoken(indexed(lab.server(), route), route) == [("Accepted", "False", "UnsupportedValue")]


def test_a_version_that_is_refused_is_an_unsupported_value_with_the_models_words() -> None:
    status = wanted(indexed(lab.server(), lab.route()), stored(lab.route()), "spec.rules: too many", (), NOW)
    assert status is not None and status["parents"][0]["conditions"][0]["message"] == "spec.rules: too many"


def test_an_http_route_beside_a_grpc_route_is_conflicted() -> None:
    route, winner = lab.route(), lab.route("winner", kind="GRPCRoute")
    index = indexed(lab.server(), route, winner)
    assert spoken(index, route) == [("Accepted", "False", "Conflicted")]
    assert spoken(index, winner)[0] == ("Accepted", "True", "Accepted")


def test_parents_of_others_are_theirs() -> None:
    route = lab.route(parent={"name": "gateway"})
    foreign = {"parentRef": {"name": "gateway"}, "controllerName": "example.com/gateway", "conditions": [{"type": "Odd"}]}
    assert wanted(indexed(route), stored(route, parents=[foreign]), "", (), NOW) is None


def test_entries_of_others_stay_and_our_stale_ones_go() -> None:
    foreign = {"parentRef": SERVER, "controllerName": "example.com/mesh", "conditions": []}
    stale = {"parentRef": SERVER | {"name": "old"}, "controllerName": CONTROLLER, "conditions": []}
    status = wanted(indexed(lab.server(), lab.route()), stored(lab.route(), parents=[stale, foreign]), "", (), NOW)
    assert status is not None
    assert [(entry["controllerName"], entry["parentRef"]["name"]) for entry in status["parents"]] == [
        ("example.com/mesh", "cart"),
        (CONTROLLER, "cart"),
    ]


def test_a_status_that_says_it_already_is_not_written() -> None:
    index = indexed(lab.server(), lab.route())
    status = wanted(index, stored(lab.route()), "", (), BEFORE)
    assert status is not None
    assert wanted(index, stored(lab.route(), **status), "", (), NOW) is None
    defaulted = {**status["parents"][0], "parentRef": {**SERVER, "namespace": "shop"}}  # as another client spells the same parent
    again = wanted(index, stored(lab.route(), parents=[defaulted]), "", (), NOW)
    assert again is not None and len(again["parents"]) == 1
    assert again["parents"][0]["conditions"][0]["lastTransitionTime"] == BEFORE


def test_a_new_generation_is_observed_without_a_transition_and_a_change_is_one() -> None:
    status = wanted(indexed(lab.server(), lab.route()), stored(lab.route()), "", (), BEFORE)
    assert status is not None
    later = wanted(indexed(lab.server(), lab.route()), stored(lab.route(), 4, **status), "", (), NOW)
    assert later is not None
    condition = later["parents"][0]["conditions"][0]
    assert (condition["observedGeneration"], condition["lastTransitionTime"]) == (4, BEFORE)
    gone = wanted(indexed(lab.route()), stored(lab.route(), 4, **later), "", (), NOW)
    assert gone is not None and gone["parents"][0]["conditions"][0]["lastTransitionTime"] == NOW


def conditions(index: Index, raw: dict[str, Any], refused: str = "", problems: tuple[Problem, ...] = ()) -> dict[str, tuple[str, str]]:
    status = wanted(index, stored(raw), refused, problems, NOW)
    assert status is not None
    return {entry["type"]: (entry["status"], entry["reason"]) for entry in status["conditions"]}


def test_our_kinds_are_accepted_when_they_are_understood() -> None:
    good = {"Accepted": ("True", "Accepted")}
    for raw in (lab.server(), lab.mesh_tls("friends", "*"), lab.networks("office", "10.0.0.0/8")):
        assert conditions(indexed(raw), raw) == good
        assert conditions(Index(), raw, "spec: wrong") == {"Accepted": ("False", "Invalid")}


def test_a_policy_says_whether_its_target_and_its_references_are_there() -> None:
    raw = lab.policy("allow", lab.ref("MeshTLSAuthentication", "friends"))
    assert conditions(indexed(raw), raw) == {"Accepted": ("False", "NoMatchingTarget"), "ResolvedRefs": ("False", "RefNotFound")}
    index = indexed(raw, lab.server(), lab.mesh_tls("friends", "*"))
    assert conditions(index, raw) == {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")}


def test_a_policy_for_a_route_without_a_server_has_no_effect_and_says_so() -> None:
    raw = lab.policy("allow", at=lab.target("HTTPRoute", "web"))
    assert conditions(indexed(raw, lab.route(parent=SERVICE)), raw)["Accepted"] == ("False", "NoMatchingTarget")
    assert conditions(indexed(raw, lab.route()), raw)["Accepted"] == ("True", "Accepted")


def test_a_server_that_an_older_one_overlaps_says_so_and_foreign_conditions_stay() -> None:
    raw = lab.server()
    overlap = Problem(parsed(raw).ref, "overlap", "no effect on port 8080")
    assert conditions(indexed(raw), raw, problems=(overlap,)) == {"Accepted": ("True", "Accepted"), "Conflicted": ("True", "OlderServer")}
    theirs = {"type": "example.com/Audited", "status": "True"}
    status = wanted(indexed(raw), stored(raw, conditions=[theirs, {"type": "Conflicted", "status": "True"}]), "", (), NOW)
    assert status is not None
    assert [entry["type"] for entry in status["conditions"]] == ["example.com/Audited", "Accepted"]


@pytest.mark.parametrize(
    "raw",
    [
        {"metadata": {"generation": "x"}, "spec": {"parentRefs": "x"}, "status": []},
        {"metadata": 3, "spec": 3, "status": {"parents": {}}},
        {"metadata": {}, "spec": {"parentRefs": [3, None]}, "status": {"parents": [{"parentRef": 3}]}},
        {"spec": {"parentRefs": [SERVICE | {"name": {}, "port": []}]}, "status": {"parents": [3, {"controllerName": CONTROLLER}]}},
        {
            "spec": {"parentRefs": [SERVER | {"name": ["cart"]}]},
            "status": {"parents": [{"parentRef": {"name": {}}, "controllerName": CONTROLLER}]},
        },
        {},
    ],
)
def test_a_shape_that_nobody_expected_is_no_failure(raw: dict[str, Any]) -> None:
    ref = parsed(lab.route()).ref
    wanted(Index(), read_stored(ref, raw), "", (), NOW)
