"""Serving certificates of webhooks: made, shared, renewed, and always one that the API server trusts at that moment."""

from __future__ import annotations

import base64
import dataclasses
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from core.k8s.api import Api
from core.k8s.serving import NotServing, ServingCertificate, SharedSecret, ca_bundle_patch, service_name
from core.k8s.serving_pair import LIFETIME_S, RENEW_LEFT_S, InvalidPair, Keep, Pair, Replace, make_pair, plan, read_pair, trusts
from tests.core.fake_apiserver import FakeApiServer, running

NAME = service_name("hook", "ns")
NOW = time.time()
RENEWAL_S = LIFETIME_S - RENEW_LEFT_S + 60
EARLIER = NOW - RENEWAL_S  # OpenSSL knows the real time only
WEBHOOKS = [("mutatingwebhookconfigurations", "hook")]


def handshake(serving: ServingCertificate | ssl.SSLContext, ca_pem: bytes, name: str = NAME) -> None:
    """As the API server connects; raises ssl.SSLError when it would not."""
    server = serving if isinstance(serving, ssl.SSLContext) else serving.context
    client = ssl.create_default_context(cadata=ca_pem.decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ends = [(ssl.MemoryBIO(), ssl.MemoryBIO()) for _ in range(2)]
    talking = [
        client.wrap_bio(ends[0][0], ends[0][1], server_hostname=name),
        server.wrap_bio(ends[1][0], ends[1][1], server_side=True),
    ]
    for _ in range(4):
        for number, end in enumerate(talking):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            ends[1 - number][0].write(ends[number][1].read())


# --- the plan --------------------------------------------------------------------------------------------------------


def test_a_fresh_pair_is_kept_until_a_third_of_its_life_is_left() -> None:
    pair = make_pair([NAME], NOW)
    for now, kind in ((NOW, Keep), (NOW + LIFETIME_S - RENEW_LEFT_S - 1, Keep), (NOW + LIFETIME_S - RENEW_LEFT_S + 1, Replace)):
        assert isinstance(plan(pair.files(), [NAME], now), kind)
    step = plan(pair.files(), [NAME], NOW)
    assert isinstance(step, Keep) and step.pair == pair


def damaged(**files: bytes) -> dict[str, bytes]:
    return {**make_pair([NAME], NOW).files(), **{name.replace("_", "."): content for name, content in files.items()}}


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, "tls.crt is missing"),
        (damaged(tls_key=b""), "tls.key is missing"),
        (damaged(ca_crt=b""), "ca.crt is missing"),
        (damaged(tls_crt=b"-----BEGIN CERTIFICATE-----\nx\n"), "cannot be read"),
        (damaged(tls_key=make_pair([NAME], NOW).key_pem), "does not belong"),
        (damaged(ca_crt=make_pair([NAME], NOW).ca_pem), "not issued by"),
        (damaged(ca_crt=b"nonsense"), "not issued by"),
        (make_pair(["other.ns.svc"], NOW).files(), "is not for hook.ns.svc"),
        (make_pair([NAME], NOW + 9999).files(), "begins at"),
        (make_pair([NAME], NOW - LIFETIME_S).files(), "ends at"),
    ],
)
def test_whatever_does_not_serve_is_replaced(found: dict[str, bytes], why: str) -> None:
    step = plan(found, [NAME], NOW)
    assert isinstance(step, Replace) and why in step.why
    assert isinstance(plan(step.pair.files(), [NAME], NOW), Keep)


@given(st.dictionaries(st.sampled_from(["tls.crt", "tls.key", "ca.crt"]), st.binary(max_size=30)))
def test_no_secret_breaks_the_plan(found: dict[str, bytes]) -> None:
    assert isinstance(plan(found, [NAME], NOW), Replace)


def test_after_a_renewal_replicas_with_the_earlier_certificate_are_trusted_still() -> None:
    earlier = make_pair([NAME], EARLIER)
    step = plan(earlier.files(), [NAME], NOW)
    assert isinstance(step, Replace)
    assert trusts(step.pair.ca_pem, earlier.ca_pem)
    for pair in (earlier, step.pair):
        context = _loaded(pair)
        handshake(context, step.pair.ca_pem)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(_loaded(step.pair), earlier.ca_pem)


def _loaded(pair: Pair) -> ssl.SSLContext:
    from core.k8s.https import server_context
    from core.k8s.serving import load

    context = server_context()
    load(context, pair)
    return context


def test_the_bundle_of_earlier_authorities_is_bounded_and_drops_what_has_ended() -> None:
    pair = make_pair([NAME], NOW - 2 * LIFETIME_S)
    for _ in range(9):
        pair = make_pair([NAME], NOW, pair.ca_pem)
    assert pair.ca_pem.count(b"BEGIN CERTIFICATE") == 4
    assert make_pair([NAME], NOW + LIFETIME_S + 1, pair.ca_pem).ca_pem.count(b"BEGIN CERTIFICATE") == 1


def test_another_name_is_not_served() -> None:
    pair = make_pair([NAME], NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(_loaded(pair), pair.ca_pem, "other.ns.svc")


@pytest.mark.needs("openssl")
def test_openssl_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    pair = make_pair([NAME], NOW)
    for name, content in pair.files().items():
        (tmp_path / name).write_bytes(content)
    words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", NAME, "-CAfile", "ca.crt", "tls.crt"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_key_is_not_shown() -> None:
    assert "PRIVATE" not in repr(make_pair([NAME], NOW))
    with pytest.raises(InvalidPair) as caught:
        read_pair(damaged(tls_key=b"-----BEGIN PRIVATE KEY-----\nsecret\n"))
    assert "secret" not in str(caught.value)


# --- shared by a Secret ----------------------------------------------------------------------------------------------


def empty_secret(**metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hook-tls", "namespace": "ns", **metadata}, "type": "Opaque"}


def configuration(hooks: int = 2) -> dict[str, Any]:
    webhooks = [{"name": f"{number}.x", "clientConfig": {"service": {"name": "hook", "namespace": "ns"}}} for number in range(hooks)]
    metadata = {"name": "hook"}
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": metadata,
        "webhooks": webhooks,
    }


@asynccontextmanager
async def cluster() -> AsyncIterator[tuple[FakeApiServer, Api]]:
    async with running() as server:
        server.put(empty_secret())
        server.put(configuration())
        api = Api(server.access)
        try:
            yield server, api
        finally:
            await api.close()


def bundles(server: FakeApiServer) -> set[bytes]:
    found = server.get("MutatingWebhookConfiguration", "", "hook")
    return {base64.b64decode(hook["clientConfig"].get("caBundle", "")) for hook in found["webhooks"]}


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def replica(api: Api, clock: Clock, settle_s: float = 0.0) -> ServingCertificate:
    return ServingCertificate(SharedSecret(api, "ns", "hook-tls", [NAME], WEBHOOKS, clock, settle_s), clock)


async def test_the_first_replica_fills_the_secret_and_the_bundle_and_the_second_serves_the_same() -> None:
    async with cluster() as (server, api):
        first, second = replica(api, Clock()), replica(api, Clock())
        assert first.not_ready == ["there is no serving certificate yet"]
        await first.refresh()
        (bundle,) = bundles(server)
        secret = server.get("Secret", "ns", "hook-tls")
        version = secret["metadata"]["resourceVersion"]
        await second.refresh()
        assert server.get("Secret", "ns", "hook-tls")["metadata"]["resourceVersion"] == version
        for serving in (first, second):
            assert serving.not_ready == [] and serving.problem == ""
            handshake(serving, bundle)
        assert base64.b64decode(secret["data"]["ca.crt"]) == bundle


async def test_replicas_that_begin_together_agree() -> None:
    async with cluster() as (server, api):
        serving = [replica(api, Clock()) for _ in range(4)]
        async with trio.open_nursery() as nursery:
            for one in serving:
                nursery.start_soon(one.refresh)
        for one in serving:
            await one.refresh()
        assert len(bundles(server)) == 1
        for one in serving:
            handshake(one, bundles(server).pop())


async def test_a_renewal_is_known_to_the_api_server_before_anybody_serves_it() -> None:
    async with cluster() as (server, api):
        clock = Clock(EARLIER)
        first, second = replica(api, clock), replica(api, clock)
        await first.refresh()
        await second.refresh()
        clock.now += RENEWAL_S
        server.requests.clear()
        await first.refresh()
        (bundle,) = bundles(server)
        handshake(second, bundle)
        handshake(first, bundle)
        writes = [line for line in server.requests if not line.startswith("GET")]
        assert [line.partition(" ")[0] for line in writes] == ["PUT", "PATCH"]
        await second.refresh()
        handshake(second, bundle)
        assert second.not_after == first.not_after > clock.now + RENEW_LEFT_S


async def test_the_new_certificate_waits_until_every_api_server_has_seen_the_bundle() -> None:
    async with cluster() as (server, api):
        clock = Clock(EARLIER)
        serving = replica(api, clock, settle_s=3600)
        await serving.refresh()  # nothing was served before: nothing to wait for
        first = serving.not_after
        clock.now += RENEWAL_S
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serving.refresh)
            with trio.fail_after(30):
                await server.wait_requests("PATCH /apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/hook", 2)
            await trio.testing.wait_all_tasks_blocked(0.05)
            handshake(serving, bundles(server).pop())
            assert serving.not_after == first
            nursery.cancel_scope.cancel()


async def test_a_bundle_that_somebody_emptied_is_written_again() -> None:
    async with cluster() as (server, api):
        serving = replica(api, Clock())
        await serving.refresh()
        server.put(configuration(3))
        await serving.refresh()
        (bundle,) = bundles(server)
        handshake(serving, bundle)


async def test_when_the_bundle_cannot_be_written_the_earlier_certificate_is_served_on() -> None:
    async with cluster() as (server, api):
        clock = Clock(EARLIER)
        serving = replica(api, clock)
        await serving.refresh()
        (before,) = bundles(server)
        clock.now += RENEWAL_S
        del server.objects["/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations", "", "hook"]
        with pytest.raises(NotServing, match="pillion install"):
            await serving.refresh()
        assert "hook" in serving.problem and serving.not_ready == []
        handshake(serving, before)
        clock.now += RENEW_LEFT_S
        assert "has expired" in serving.not_ready[0]


async def test_a_missing_secret_is_said_with_the_next_step() -> None:
    async with running() as server:
        api = Api(server.access)
        serving = replica(api, Clock())
        with pytest.raises(NotServing, match="`pillion install` creates it"):
            await serving.refresh()
        assert serving.not_ready == [serving.problem]
        await api.close()


def issued(pair: Pair) -> dict[str, Any]:
    """The Secret as cert-manager keeps it."""
    data = {name: base64.b64encode(content).decode() for name, content in pair.files().items()}
    return {**empty_secret(annotations={"cert-manager.io/certificate-name": "hook"}), "data": data}


async def test_what_cert_manager_keeps_is_only_read_and_made_known() -> None:
    async with cluster() as (server, api):
        pair = make_pair([NAME], NOW - LIFETIME_S + RENEW_LEFT_S / 2)
        server.put(issued(pair))
        serving = replica(api, Clock())
        await serving.refresh()
        handshake(serving, bundles(server).pop())
        writes = [line for line in server.requests if not line.startswith("GET")]
        assert [line.partition(" ")[2].rpartition("/")[0].rpartition("/")[2] for line in writes] == ["mutatingwebhookconfigurations"]


async def test_what_another_authority_issues_is_known_before_anybody_serves_it_and_the_earlier_is_forgotten_later() -> None:
    async with cluster() as (server, api):
        clock = Clock()
        earlier, renewed = make_pair([NAME], NOW), make_pair([NAME], NOW)
        server.put(issued(earlier))
        first, second = replica(api, clock), replica(api, clock)
        await first.refresh()
        await second.refresh()
        server.put(issued(renewed))
        await first.refresh()
        (bundle,) = bundles(server)
        handshake(first, bundle)
        handshake(second, bundle)
        handshake(first, renewed.ca_pem)
        clock.now += 3601
        await second.refresh()
        assert bundles(server) == {bundle}, "a replica that has seen it just now forgets nothing"
        await first.refresh()
        (bundle,) = bundles(server)
        assert trusts(renewed.ca_pem, bundle)
        handshake(second, bundle)


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        (Pair(b"", b"", b"", (), 0, 0), r"tls\.crt is missing"),
        (make_pair(["other.ns.svc"], NOW), "is not for hook.ns.svc"),
        (dataclasses.replace(make_pair([NAME], NOW), ca_pem=b""), r"ca\.crt is missing"),
    ],
)
async def test_what_cert_manager_issues_in_vain_leaves_the_earlier_served(pair: Pair, why: str) -> None:
    async with cluster() as (server, api):
        earlier = make_pair([NAME], NOW)
        server.put(issued(earlier))
        serving = replica(api, Clock())
        await serving.refresh()
        server.put(issued(pair))
        with pytest.raises(NotServing, match=f"cert-manager keeps: .*{why}"):
            await serving.refresh()
        assert serving.not_ready == []
        handshake(serving, bundles(server).pop())


async def test_the_loop_goes_on_whatever_happens(autojump_clock: trio.testing.MockClock) -> None:
    class Flaky:
        def __init__(self) -> None:
            self.asked = 0

        async def current(self) -> Pair:
            self.asked += 1
            if self.asked % 2:
                raise NotServing("not now")
            return make_pair([NAME], NOW)

    flaky = Flaky()
    serving = ServingCertificate(flaky)
    with trio.move_on_after(100):
        await serving.keep()
    assert flaky.asked >= 6 and serving.not_after > NOW


def test_webhooks_are_patched_by_position_in_the_version_that_was_read() -> None:
    pair = make_pair([NAME], NOW)
    found = configuration() | {"metadata": {"name": "hook", "resourceVersion": "7"}}
    found["webhooks"][0]["clientConfig"]["caBundle"] = base64.b64encode(pair.ca_pem + b"\n").decode()
    patch = ca_bundle_patch(found, pair.ca_pem)
    assert patch[0] == {"op": "test", "path": "/metadata/resourceVersion", "value": "7"}
    assert [step["path"] for step in patch[1:]] == ["/webhooks/1/clientConfig/caBundle"]
    assert ca_bundle_patch({"metadata": {}, "webhooks": None}, pair.ca_pem) == []
