"""The validating webhook: the model's words, and nothing that a caller sends ends it."""

from __future__ import annotations

import json
from typing import Any

import policy_lab as lab
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.k8s import review
from policy.admission import admit
from policy.webhook import Webhook


def asked(object_: dict[str, Any] | None, operation: str = "CREATE", old: dict[str, Any] | None = None) -> review.Request:
    request = {"uid": "1", "operation": operation, "object": object_, "oldObject": old}
    body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
    return review.read_review_untrusted(json.dumps(body).encode())


def answered(request: review.Request) -> dict[str, Any]:
    response: dict[str, Any] = json.loads(Webhook().answer(request))["response"]
    return response


GOOD = [lab.server(), lab.policy(), lab.mesh_tls("m", "*"), lab.networks("n", "10.0.0.0/8"), lab.route(), lab.route(kind="GRPCRoute")]
BAD = [
    lab.server(port=0),
    lab.server(proxyProtocol="HTTP/3"),
    lab.policy("p", lab.ref("NetworkAuthentication", "a"), lab.ref("NetworkAuthentication", "b")),
    lab.policy("p", at=lab.target("Namespace", "other")),
    lab.mesh_tls("m", "front.shop"),
    lab.networks("n", "10.0.0.0/8", excluded=("11.0.0.0/8",)),
    lab.route(path="/a/../b"),
]


@pytest.mark.parametrize("raw", GOOD, ids=lambda raw: raw["kind"])
def test_what_the_model_understands_may_be_stored(raw: dict[str, Any]) -> None:
    assert answered(asked(raw)) == {"uid": "1", "allowed": True}


@pytest.mark.parametrize("raw", BAD, ids=lambda raw: raw["kind"])
def test_what_the_model_refuses_is_refused_with_its_words(raw: dict[str, Any]) -> None:
    response = answered(asked(raw, "UPDATE", lab.server()))
    assert response["allowed"] is False
    assert response["status"] == {"code": 422, "reason": "Invalid", "message": admit(raw)}


def test_an_object_whose_spec_nobody_touched_can_still_be_cleaned_up() -> None:
    old = lab.server(port=0)
    relabelled = old | {"metadata": old["metadata"] | {"labels": {"a": "b"}}}
    response = answered(asked(relabelled, "UPDATE", old))
    assert response["allowed"] is True and "spec.port" in response["warnings"][0]


def test_deletions_and_kinds_of_others_are_no_business_of_ours() -> None:
    assert answered(asked(None, "DELETE", lab.server(port=0)))["allowed"] is True
    assert answered(asked({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}}))["allowed"] is True


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner, max_size=3)))
def test_any_object_gets_an_answer(value: Any) -> None:
    raw = {"apiVersion": "policy.pillion.dev/v1alpha1", "kind": "Server", "metadata": {"name": "a"}, "spec": value}
    assert answered(asked(raw))["allowed"] in (True, False)
