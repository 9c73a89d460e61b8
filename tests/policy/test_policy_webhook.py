"""The validating webhook: the model's words, and nothing that a caller sends ends it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import policy_lab as lab
import pytest
import trio
import trio.testing
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


# --- over HTTP -------------------------------------------------------------------------------------------------------


class Posts:
    """Requests to one webhook, at the application's door."""

    def __init__(self) -> None:
        self.webhook = Webhook()
        self._application = self.webhook.application()

    async def post(self, receive: Callable[[], Awaitable[dict[str, Any]]], length: int) -> int:
        """The status of the answer."""
        status: list[int] = []

        async def send(message: Any) -> None:
            status.extend([message["status"]] if message["type"] == "http.response.start" else [])

        headers = [(b"content-length", str(length).encode())]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/validate", "headers": headers, "query_string": b""}
        await self._application(scope, receive, send)  # type: ignore[arg-type]
        return status[0]

    async def review(self, length: int = 0) -> int:
        """Of a good Server, as long as asked."""
        body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {"uid": "1", "object": lab.server()}}
        data = json.dumps(body).encode().ljust(length)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": data}

        return await self.post(receive, len(data))


async def test_reviews_that_do_not_come_keep_no_other_from_its_answer() -> None:
    posts = Posts()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(posts.post, trio.sleep_forever, 1000)
        await trio.testing.wait_all_tasks_blocked()
        assert await posts.review() == 200
        nursery.cancel_scope.cancel()


async def test_of_large_reviews_one_is_held_at_a_time_and_its_end_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    posts, begun = Posts(), 0

    async def never() -> dict[str, Any]:
        nonlocal begun
        begun += 1
        await trio.sleep_forever()
        raise AssertionError

    found: list[int] = []

    async def post() -> None:
        found.append(await posts.post(never, 3 << 20))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(post)
        await trio.testing.wait_all_tasks_blocked()
        assert begun == 1
    assert sorted(found) == [408, 503, 503]
    assert await posts.review(1 << 20) == 200
    assert posts.webhook.failed == 3
