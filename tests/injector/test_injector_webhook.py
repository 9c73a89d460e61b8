"""The webhook over real HTTPS: what the API server is told, and what a stranger cannot do to it."""

from __future__ import annotations

import json
import ssl
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from injector_lab import NAME, review_of, webhook

from core.k8s import review
from injector.decide import Refuse, Skip
from injector.mesh import Mesh
from injector.patch import apply_patch
from injector.webhook import NamespaceUnknown

ENABLED = {"pillion.dev/inject": "enabled"}


def pod(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"generateName": "web-"}, "spec": {"containers": [{"name": "app", "image": "app"}], **spec}}


def annotated(value: str = "enabled", **spec: Any) -> dict[str, Any]:
    found = pod(**spec)
    found["metadata"]["annotations"] = {"pillion.dev/inject": value}
    return found


async def test_a_pod_of_an_annotated_namespace_gets_the_sidecar() -> None:
    async with webhook() as lab:
        lab.namespaces.known["shop"] = ENABLED
        response = await lab.review(pod())
        assert response["allowed"] is True and "warnings" not in response
        after = apply_patch(pod(), response["patch"])
        assert [container["name"] for container in after["spec"]["initContainers"]] == ["pillion-capture", "pillion-proxy"]
        assert response["auditAnnotations"] == {"injection": "injected"}
        assert b'pillion_injector_decisions_total{decision="injected",reason=""} 1.0' in lab.metrics.exposition()


async def test_other_pods_are_allowed_as_they_are() -> None:
    async with webhook() as lab:
        response = await lab.review(pod())
        assert response["allowed"] is True and "patch" not in response and "warnings" not in response
        assert lab.told.events == []


async def test_a_pod_that_was_wanted_in_the_mesh_and_cannot_be_is_allowed_and_everybody_is_told() -> None:
    async with webhook() as lab:
        response = await lab.review(annotated(hostNetwork=True))
        assert response["allowed"] is True and "patch" not in response
        assert response["warnings"] == [
            "not in the mesh: the pod uses the network of its node (hostNetwork: true), which a sidecar must not capture"
        ]
        ((namespace, decision),) = lab.told.events
        assert namespace == "shop" and isinstance(decision, Skip) and decision.reason == "host-network"


async def test_a_refusal_is_a_sentence_and_an_event() -> None:
    async with webhook() as lab:
        response = await lab.review(annotated("yes"))
        assert response["allowed"] is False
        assert response["status"]["code"] == 422 and "expected enabled or disabled" in response["status"]["message"]
        ((_, decision),) = lab.told.events
        assert isinstance(decision, Refuse)


async def test_a_dry_run_gets_the_same_answer_and_does_nothing() -> None:
    async with webhook() as lab:
        wet, dry = await lab.review(annotated("yes")), await lab.review(annotated("yes"), dryRun=True)
        assert wet == dry and len(lab.told.events) == 1


async def test_new_settings_count_at_once() -> None:
    async with webhook() as lab:
        lab.mesh.set(Mesh(image="other:2", capture="agent"))
        after = apply_patch(annotated(), (await lab.review(annotated()))["patch"])
        assert {container["image"] for container in after["spec"]["initContainers"]} == {"other:2"}


async def test_when_the_namespace_cannot_be_read_the_failure_policy_decides() -> None:
    async with webhook() as lab:
        lab.namespaces.known["shop"] = NamespaceUnknown("namespace shop: timeout")
        status, answer = await lab.post(json.dumps(review_of(pod(), "shop")).encode())
        assert (status, answer) == (503, b"namespace shop: timeout\n")


async def test_a_mistake_of_ours_never_lets_a_pod_that_is_wanted_in_the_mesh_pass_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("oops")

    async with webhook() as lab:
        monkeypatch.setattr("injector.webhook.review_pod", broken)
        response = await lab.review(annotated())
        assert response["allowed"] is False and "its log says why" in response["status"]["message"]
        status, _ = await lab.post(json.dumps(review_of(pod(), "shop")).encode())
        assert status == 500, "for the others the failure policy decides"


@pytest.mark.parametrize(
    "request_",
    [
        {"operation": "DELETE", "object": None},
        {"operation": "UPDATE"},
        {"kind": {"group": "", "version": "v1", "kind": "Service"}},
        {"kind": {"group": "x", "version": "v1", "kind": "Pod"}},
    ],
)
async def test_what_is_no_creation_of_a_pod_is_allowed(request_: dict[str, Any]) -> None:
    async with webhook() as lab:
        response = await lab.review(**{"pod": annotated(), **request_}) if "object" not in request_ else await lab.review(None, **request_)
        assert response == {"uid": "u-1", "allowed": True}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}', b"\xff" * 9]
)
async def test_other_bytes_are_refused(body: bytes) -> None:
    async with webhook() as lab:
        status, answer = await lab.post(body)
        assert status == 400 and b"AdmissionReview" in answer


async def test_v1beta1_is_refused() -> None:
    async with webhook() as lab:
        status, answer = await lab.post(json.dumps({**review_of(pod(), "shop"), "apiVersion": "admission.k8s.io/v1beta1"}).encode())
        assert status == 400 and b"expected admission.k8s.io/v1" in answer


async def test_a_body_that_is_too_long_is_refused() -> None:
    async with webhook() as lab:
        status, _ = await lab.post(b" " * (review.BODY_MAX_BYTES + 1))
        assert status == 413
        assert (await lab.review(annotated()))["allowed"] is True


async def test_a_large_pod_is_reviewed_and_large_ones_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[int] = []
    inside = 0

    async def slow(*_: Any) -> dict[str, str]:
        nonlocal inside
        inside += 1
        at_once.append(inside)
        await trio.sleep(0.02)
        inside -= 1
        return {}

    large = annotated()
    large["spec"]["containers"][0]["env"] = [{"name": f"N{number}", "value": "x" * 100} for number in range(5000)]
    async with webhook() as lab:
        monkeypatch.setattr(lab.namespaces, "annotations", slow)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(lab.review, large)
        assert at_once == [1, 1, 1, 1]
        assert (await lab.review(large))["allowed"] is True


NOISE = [
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"POST /mutate HTTP/1.1\r\n\r\n",
    b"POST /mutate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    b"POST /mutate HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST /mutate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /mutate HTTP/1.1\r\n" + b"a: " + b"b" * 40_000 + b"\r\n\r\n",
    b"POST /mutate HTTP/9.9\r\nhost: x\r\n\r\n",
    b"GET /mutate HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\xff" * 64,
    bytes(range(256)) * 64,
]


async def test_noise_inside_tls_ends_its_own_connection_only() -> None:
    async with webhook() as lab:
        context = ssl.create_default_context(cadata=lab.ca_pem.decode())
        for noise in NOISE:
            tcp = await trio.open_tcp_stream("127.0.0.1", lab.port)
            stream = trio.SSLStream(tcp, context, server_hostname=NAME, https_compatible=True)
            await stream.send_all(noise)
            answer = b""
            with trio.move_on_after(0.2):
                try:
                    while chunk := await stream.receive_some():
                        answer += chunk
                except trio.BrokenResourceError:
                    pass
            assert b" 200 " not in answer.partition(b"\r\n")[0]
            await trio.aclose_forcefully(stream)
        assert (await lab.review(annotated()))["allowed"] is True


@pytest.mark.parametrize(
    "head",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",
        b"GET /mutate HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n",
    ],
    ids=["preface", "upgrade"],
)
async def test_http_2_is_not_spoken(head: bytes) -> None:
    async with webhook() as lab:
        context = ssl.create_default_context(cadata=lab.ca_pem.decode())
        tcp = await trio.open_tcp_stream("127.0.0.1", lab.port)
        stream = trio.SSLStream(tcp, context, server_hostname=NAME, https_compatible=True)
        await stream.send_all(head)
        with trio.fail_after(30):
            assert (await stream.receive_some()).startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 405 "))
        await trio.aclose_forcefully(stream)


async def test_who_sends_nothing_does_not_keep_others_waiting() -> None:
    async with webhook() as lab:
        context = ssl.create_default_context(cadata=lab.ca_pem.decode())
        silent = []
        for length in [b"1000"] * 12 + [b"1000000"]:
            tcp = await trio.open_tcp_stream("127.0.0.1", lab.port)
            stream = trio.SSLStream(tcp, context, server_hostname=NAME, https_compatible=True)
            await stream.send_all(b"POST /mutate HTTP/1.1\r\nhost: x\r\ncontent-length: " + length + b"\r\n\r\n{")
            silent.append(stream)
        with trio.fail_after(4.5):  # the silent hold what they have for 5 s
            assert (await lab.review(annotated()))["allowed"] is True
        for stream in silent:
            await trio.aclose_forcefully(stream)


async def test_before_the_end_answers_ask_for_a_new_connection() -> None:
    async with webhook() as lab:
        context = ssl.create_default_context(cadata=lab.ca_pem.decode())
        body = json.dumps(review_of(annotated(), "shop")).encode()
        tcp = await trio.open_tcp_stream("127.0.0.1", lab.port)
        stream = trio.SSLStream(tcp, context, server_hostname=NAME, https_compatible=True)
        for closing in (False, True):
            lab.webhook.closing = closing
            await stream.send_all(b"POST /mutate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            answer = b""
            while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
                answer += await stream.receive_some()
            assert (b"connection: close" in answer.lower()) is closing
        with trio.fail_after(5):
            assert await stream.receive_some() == b""
        await trio.aclose_forcefully(stream)


async def test_other_paths_and_methods_are_refused() -> None:
    async with webhook() as lab:
        assert (await lab.post(b"", "/"))[0] == 404
        assert (await lab.post(b"", "/mutate", "GET"))[0] == 405


async def test_connections_that_say_nothing_do_not_keep_others_out() -> None:
    async with webhook(connections_max=4) as lab:
        silent = [await trio.open_tcp_stream("127.0.0.1", lab.port) for _ in range(8)]
        for stream in silent[:4]:
            with trio.fail_after(5):
                assert await stream.receive_some() == b"", "the oldest are cut"
        assert (await lab.review(annotated()))["allowed"] is True
        for stream in silent:
            await stream.aclose()


async def test_plaintext_does_no_harm() -> None:
    async with webhook() as lab:
        stream = await trio.open_tcp_stream("127.0.0.1", lab.port)
        await stream.send_all(b"POST /mutate HTTP/1.1\r\n\r\n")
        with trio.fail_after(5):
            while await stream.receive_some():
                pass
        await stream.aclose()
        assert (await lab.review(annotated()))["allowed"] is True


# --- the envelope ----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_bytes_give_a_review_or_the_one_error(body: bytes) -> None:
    with pytest.raises(review.InvalidReview):
        review.read_review_untrusted(body)


@given(
    st.dictionaries(
        st.sampled_from(["uid", "kind", "operation", "namespace", "object", "dryRun"]),
        st.none() | st.booleans() | st.text(max_size=3) | st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
    )
)
def test_any_request_gives_a_review_or_the_one_error(request_: dict[str, Any]) -> None:
    body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request_}
    try:
        found = review.read_review_untrusted(json.dumps(body).encode())
    except review.InvalidReview:
        return
    assert json.loads(review.allowed(found))["response"] == {"uid": request_["uid"], "allowed": True}


@pytest.mark.parametrize("namespace", ["/../../secrets", "/?watch=true", "..", ".", "a/b", "shop\n", "Shop", "a" * 64, "-a"])
def test_what_cannot_name_a_namespace_is_refused_before_anybody_is_asked_about_it(namespace: str) -> None:
    with pytest.raises(review.InvalidReview):
        review.read_review_untrusted(json.dumps(review_of({}, namespace)).encode())


def test_nesting_without_end_is_refused() -> None:
    deep = b'{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"x","object":{"a":' + b"[" * 100_000
    with pytest.raises(review.InvalidReview):
        review.read_review_untrusted(deep)


def test_sentences_are_bounded_and_printable() -> None:
    asked = review.read_review_untrusted(json.dumps(review_of(pod(), "x")).encode())
    message = json.loads(review.refused(asked, "a\x1b[31m\n" + "b" * 5000))["response"]["status"]["message"]
    assert len(message) < 1100 and message.isprintable()
