"""Several real replicas on a fake API server: one authority, a bundle in every namespace, rotations, given issuers, outages."""

from __future__ import annotations

import base64
import socket
import time
from dataclasses import replace
from pathlib import Path

import h11
import pytest
import trio

from core.runtime.tls import TlsStream, client_context
from identity.cluster import anchors, app, census, leader, peers, shared
from identity.exchange import exchange
from identity.issuer import Issuer, Pair, make_issuer, make_root
from identity.snapshot import read_secret
from identity.wire import bundle_untrusted
from tests.identity.identity_api import Mesh, data, mesh
from tests.identity.identity_lab import Workload, kept_certified, wait_until
from tests.ports import unused_port


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits of a cluster, in the time of a test."""
    monkeypatch.setattr(shared, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(leader, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(leader, "_WAIT_S", 0.05)
    monkeypatch.setattr(leader, "_TEND_EVERY_S", 0.1)
    monkeypatch.setattr(census, "SETTLED_S", 0.2)
    monkeypatch.setattr(app, "_ISSUER_RETRY_S", 0.05)
    monkeypatch.setattr(anchors, "_RETRY_FIRST_S", 0.05)


@pytest.fixture
def port() -> int:
    return unused_port()


async def test_the_leader_makes_the_authority_and_every_replica_serves_it(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        one, two = await cluster.ready(await cluster.start()), await cluster.ready(await cluster.start())
        assert [replica.elector.leader.value for replica in (one, two)] == [True, False]
        first, second = one.shared.authority.value, two.shared.authority.value
        assert first is not None
        assert second is not None
        assert first.issuer.ref == second.issuer.ref
        secret = cluster.server.get("Secret", "pillion", "pillion-issuer")
        assert secret["metadata"]["labels"] == {"app.kubernetes.io/part-of": "pillion"}
        assert read_secret(secret).state is not None
        cart, web = cluster.workload("cart", "identity-2"), cluster.workload("web", "identity-3")
        async with kept_certified(cart, web):
            assert (await cart.wait_certified()).bundle_pem == (await web.wait_certified()).bundle_pem
        await wait_until(lambda: "IssuerStored" in {event["reason"] for event in cluster.server.events()})


async def test_without_its_secret_a_replica_is_not_ready_and_says_what_to_do(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        cluster.server.remove("Secret", "pillion", "pillion-issuer")
        replica = cluster.replicas[await cluster.start()]
        await wait_until(lambda: any("`pillion install` makes it" in reason for reason in replica.not_ready()))
        cluster.server.secret("pillion-issuer")
        await wait_until(lambda: not replica.not_ready())


async def test_a_secret_of_somebody_else_is_not_overwritten(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        cluster.server.secret("pillion-issuer", **{"tls.crt": "YQ=="})
        replica = cluster.replicas[await cluster.start()]
        await wait_until(lambda: any("was not written by the identity service" in reason for reason in replica.not_ready()))
        await trio.sleep(0.2)
        assert data(cluster.server.get("Secret", "pillion", "pillion-issuer")) == {"tls.crt": "YQ=="}


async def test_a_secret_that_somebody_emptied_gets_the_same_authority_back(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        await cluster.ready(await cluster.start())
        before = data(cluster.server.get("Secret", "pillion", "pillion-issuer"))
        cluster.server.secret("pillion-issuer")
        await wait_until(lambda: data(cluster.server.get("Secret", "pillion", "pillion-issuer")) == before)


async def test_the_bundle_is_in_every_namespace_and_stays_there(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        await cluster.ready(await cluster.start())
        await wait_until(lambda: cluster.bundle("shop") == cluster.bundle("pillion") != "")
        bundle = cluster.bundle("shop")
        cluster.server.namespace("fresh")
        await wait_until(lambda: cluster.bundle("fresh") == bundle)
        edited = cluster.server.get("ConfigMap", "shop", "pillion-trust-anchors")
        cluster.server.put({**edited, "data": {"ca-bundle.crt": "evil", "more": "kept"}})
        await wait_until(lambda: cluster.bundle("shop") == bundle)
        assert cluster.server.get("ConfigMap", "shop", "pillion-trust-anchors")["data"]["more"] == "kept"
        cluster.server.remove("ConfigMap", "shop", "pillion-trust-anchors")
        await wait_until(lambda: cluster.bundle("shop") == bundle)
        cluster.server.put(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ending", "deletionTimestamp": "2026-01-01T00:00:00Z"}}
        )
        cluster.server.namespace("last")
        await wait_until(lambda: cluster.bundle("last") == bundle)
        assert cluster.bundle("ending") == ""


@pytest.mark.slow
async def test_a_rotation_goes_through_with_workloads_at_every_replica(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        for _ in range(3):
            await cluster.ready(await cluster.start())
        await wait_until(lambda: cluster.bundle("shop") != "")
        workloads = [cluster.workload(f"w{number}", f"identity-{number}") for number in (2, 3, 4)]
        async with kept_certified(*workloads):
            for workload in workloads:
                await workload.wait_certified()
            assert len((await cluster.status()).workloads) == 3
            old = cluster.bundle("shop")
            for step in ("add", "switch", "drop"):
                await cluster.step(step)
            status = await cluster.status()
            assert (status.generation, status.due, len(status.anchors)) == (3, "add", 1)
            await wait_until(lambda: cluster.bundle("shop") not in ("", old))
            for workload in workloads:
                await workload.cell.wait_for(lambda value: value is not None and value.bundle_pem.decode() == cluster.bundle("shop"))
                assert not workload.seen.failures


@pytest.mark.slow
async def test_a_rotation_goes_through_with_workloads_that_ask_one_replica_and_report_to_another(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        for _ in range(3):
            await cluster.ready(await cluster.start())
        await wait_until(lambda: cluster.bundle("shop") != "")
        workloads = [cluster.roaming(account) for account in ("cart", "web", "bank", "mail")]
        async with kept_certified(*workloads):
            for workload in workloads:
                await workload.wait_certified()
            for step in ("add", "switch", "drop") * 2:
                await cluster.step(step)
            assert (await cluster.status()).generation == 5


@pytest.mark.slow
async def test_a_rotation_survives_the_leader_and_every_replica_in_turn(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        for _ in range(2):
            await cluster.ready(await cluster.start())
        for step in ("add", "switch", "drop"):
            await cluster.step(step)
            await cluster.stop((await cluster.leader()).config.pod_name)
            await cluster.ready(await cluster.start())
        assert ((await cluster.status()).generation, (await cluster.status()).due) == (3, "add")


async def test_a_pod_that_is_deleted_blocks_no_longer_and_one_that_is_silent_does(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        await cluster.ready(await cluster.start())
        await wait_until(lambda: cluster.bundle("shop") != "")
        cart = cluster.workload("cart", "identity-2")
        async with kept_certified(cart):
            await cart.wait_certified()
        await cluster.step("add")
        assert [who for who in (await cluster.status()).blocking if who.startswith("shop/cart-0 ")]
        cluster.server.remove("Pod", "shop", "cart-0")
        await cluster.step("switch")
        cluster.server.pod("shop", "web", "web-0")
        assert (await cluster.status()).blocking == ["shop/web-0 runs and has not been heard of by any replica"]
        await cluster.step("drop", ignore_absent=True)


async def test_a_replica_that_is_behind_or_away_blocks(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        await cluster.ready(await cluster.start())
        await cluster.step("add")
        with socket.create_server(("127.0.0.250", port)):  # accepts, and says nothing
            cluster.server.pod("pillion", "pillion-identity", "identity-hung", "127.0.0.250")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(peers, "_TIMEOUT_S", 0.1)
                assert "identity replica identity-hung cannot be asked (no answer within 0.1 s)" in (await cluster.status()).blocking
        await cluster.step("switch")  # nobody listens there any more


async def test_only_a_replica_is_told_what_another_knows(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        one = await cluster.ready(await cluster.start())
        await cluster.ready(await cluster.start())
        assert one.leader is not None
        one.config.token_file.write_text(cluster.server.pod("shop", "cart", "cart-0"))  # type: ignore[union-attr]
        cluster.server.remove("Pod", "shop", "cart-0")
        await cluster.step("add")
        cluster.server.pod("shop", "cart", "cart-0")
        blocking = (await cluster.status()).blocking
        assert any("it answers 403" in who and "the token is of spiffe://cluster.local/ns/shop/sa/cart" in who for who in blocking)


async def test_a_replica_that_does_not_lead_says_who_does(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        await cluster.ready(await cluster.start())
        other = await cluster.ready(await cluster.start())
        await wait_until(lambda: other.elector.holder == "identity-2")
        answer = await other.answer(b'{"verb": "rotate"}')
        assert (answer.error, answer.again) == ("this replica, identity-3, does not lead; ask identity-2", True)


@pytest.mark.slow
async def test_while_the_api_server_is_away_the_authority_stays_and_nobody_leads(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        replica = await cluster.ready(await cluster.start())
        cluster.server.failures[:] = [503] * 10_000
        await wait_until(lambda: not replica.elector.leader.value)
        assert replica.not_ready() == []
        assert b"pillion_identity_api_unreachable 1" in replica.metrics()
        cluster.server.failures.clear()
        await wait_until(lambda: replica.elector.leader.value)
        await cluster.step("add")


# --- an issuer that others give ----------------------------------------------------------------------------------------------


def given(cluster: Mesh, issuer: Issuer, *roots: Pair) -> None:
    """What cert-manager keeps in its Secret."""
    values = {
        "tls.crt": issuer.pair.certificate_pem,
        "tls.key": issuer.pair.key_pem,
        "ca.crt": b"".join(root.certificate_pem for root in roots),
    }
    cluster.server.secret("pillion-issuer", **{name: base64.b64encode(value).decode() for name, value in values.items()})


@pytest.mark.slow
async def test_a_given_issuer_is_followed_and_a_new_anchor_waits_for_the_workloads(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        now = time.time()
        old, new = make_root("cluster.local", now), make_root("cluster.local", now)
        cluster.server.secret("pillion-identity-state")
        first = make_issuer("cluster.local", old, now)
        given(cluster, first, old)
        await cluster.ready(await cluster.start("pillion-issuer"))
        await cluster.ready(await cluster.start("pillion-issuer"))
        await wait_until(lambda: cluster.bundle("shop") == old.certificate_pem.decode())
        cart = cluster.workload("cart", "identity-3")
        async with kept_certified(cart):
            await cart.wait_certified()
            renewed = make_issuer("cluster.local", old, now)
            given(cluster, renewed, old)
            await cart.cell.wait_for(lambda value: value is not None and renewed.pair.certificate_pem in value.chain_pem)
            given(cluster, make_issuer("cluster.local", new, now), new)
            with trio.fail_after(30):
                await cart.cell.wait_for(lambda value: value is not None and value.bundle_pem == new.certificate_pem)
            assert [(reason, detail) for reason, detail in cart.seen.failures] == []
        await wait_until(lambda: cluster.bundle("shop") == new.certificate_pem.decode())
        await wait_until(lambda: "TrustChanged" in {event["reason"] for event in cluster.server.events()})


async def test_a_given_issuer_that_does_not_do_changes_nothing_and_is_told(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        now = time.time()
        root, stranger = make_root("cluster.local", now), make_root("cluster.local", now)
        issuer = make_issuer("cluster.local", root, now)
        cluster.server.secret("pillion-identity-state")
        replica = cluster.replicas[await cluster.start("pillion-issuer")]
        await wait_until(lambda: any("it has no tls.crt, tls.key, ca.crt" in reason for reason in replica.not_ready()))
        given(cluster, issuer, root)
        await wait_until(lambda: not replica.not_ready())
        given(cluster, make_issuer("cluster.local", root, now), stranger)
        await wait_until(lambda: any(event["reason"] == "IssuerInvalid" for event in cluster.server.events()))
        authority = replica.shared.authority.value
        assert authority is not None
        assert authority.issuer.ref == issuer.ref
        answer = await cluster.ask_step("add")
        assert "the issuer is given: change Secret pillion/pillion-issuer" in answer.error


# --- attacks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "reason", "expected"),
    [
        pytest.param("shop/cart/gone-0", "status-401", "service account token has been invalidated", id="of a deleted pod"),
        pytest.param("shop/cart/cart-0/vault", "status-401", "invalid for the target audiences", id="of another audience"),
        pytest.param("shop/web/web-0", "status-403", "the token is of spiffe://cluster.local/ns/shop/sa/web", id="of another account"),
        pytest.param("nonsense", "status-401", "invalid bearer token", id="of nobody"),
    ],
)
async def test_a_token_that_does_not_prove_the_identity_gets_no_certificate(
    tmp_path: Path, port: int, token: str, reason: str, expected: str
) -> None:
    async with mesh(tmp_path, port) as cluster:
        await cluster.ready(await cluster.start())
        await wait_until(lambda: cluster.bundle("shop") != "")
        cluster.server.pod("shop", "web", "web-0")
        cart = cluster.workload("cart", "identity-2")
        cart.settings.token_file.write_text(token)
        async with kept_certified(cart):
            await wait_until(lambda: bool(cart.seen.failures))
        assert cart.cell.value is None
        assert cart.seen.failures[0][0] == reason
        assert expected in cart.seen.failures[0][1]
        if reason == "status-403":
            await wait_until(lambda: any(event["reason"] == "IdentityMismatch" for event in cluster.server.events()))
            [event] = [event for event in cluster.server.events() if event["reason"] == "IdentityMismatch"]
            assert event["regarding"]["name"] == "web-0"
            assert event["metadata"]["namespace"] == "shop"


async def test_a_replica_that_lags_looks_again_before_it_tells_a_workload_the_past(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mesh(tmp_path, port) as cluster:
        await cluster.ready(await cluster.start())
        monkeypatch.setattr(shared, "LOOK_EVERY_S", 3600)
        lagging = await cluster.ready(await cluster.start())
        await cluster.step("add")
        assert lagging.shared.authority.value is not None
        assert lagging.shared.authority.value.trust.value.generation == 1
        await wait_until(lambda: cluster.bundle("shop").count("BEGIN") == 2)
        cart = cluster.workload("cart", "identity-2")
        async with kept_certified(cart):
            await cart.wait_certified()
        roaming = replace(cart, settings=replace(cart.settings, addr=(lagging.config.listen.ip, port)))
        assert await reported(roaming, 2) == 2
        assert lagging.shared.authority.value.trust.value.generation == 2


async def reported(workload: Workload, generation: int) -> int:
    """Which generation the replica has, after a workload told it one."""
    settings = workload.settings
    context = client_context(None, settings.anchors_file.read_bytes(), (b"http/1.1",))
    stream = TlsStream.client(await trio.open_tcp_stream(*settings.addr), context, settings.expect.server_name, settings.expect)
    headers = [("host", "x"), ("content-length", "0"), ("authorization", f"Bearer {settings.token_file.read_text()}")]
    request = h11.Request(method="GET", target=f"/v1/bundle?generation={generation}&issuer=old", headers=headers)
    async with stream:
        await stream.do_handshake()
        _, answer = await exchange(stream, h11.Connection(h11.CLIENT), request, b"", 100_000)
    return bundle_untrusted(answer).generation


@pytest.mark.slow
async def test_an_authority_of_our_own_gives_way_to_a_given_one_without_a_break(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        own = await cluster.start()
        await cluster.ready(own)
        for step in ("add", "switch", "drop"):
            await cluster.step(step)
        await wait_until(lambda: cluster.bundle("shop").count("BEGIN") == 1)
        mine = cluster.bundle("shop")
        cluster.server.secret("pillion-identity-state")
        for _ in range(2):  # as a rolling update does: the old one leads until the new ones are ready
            assert await cluster.ready(await cluster.start("pillion-issuer"))
        await cluster.stop(own)
        assert (await cluster.status()).generation == 3
        assert cluster.bundle("shop") == mine
        cart = cluster.roaming("cart")
        async with kept_certified(cart):
            await cart.wait_certified()
            root = make_root("cluster.local", time.time())
            given(cluster, make_issuer("cluster.local", root, time.time()), root)
            with trio.fail_after(30):
                await cart.cell.wait_for(lambda value: value is not None and value.bundle_pem == root.certificate_pem)
            assert cart.seen.failures == []


async def test_a_given_authority_gives_way_to_one_of_our_own_from_a_copy_of_its_state(tmp_path: Path, port: int) -> None:
    async with mesh(tmp_path, port) as cluster:
        root = make_root("cluster.local", time.time())
        cluster.server.secret("pillion-identity-state")
        given(cluster, make_issuer("cluster.local", root, time.time()), root)
        before = await cluster.start("pillion-issuer")
        await cluster.ready(before)
        await wait_until(lambda: cluster.bundle("shop") == root.certificate_pem.decode())
        cluster.server.secret("pillion-issuer", **data(cluster.server.get("Secret", "pillion", "pillion-identity-state")))
        await cluster.stop(before)
        await cluster.ready(await cluster.start())
        for step in ("add", "switch", "drop"):
            await cluster.step(step)
        await wait_until(lambda: cluster.bundle("shop").count("BEGIN") == 1)
        assert cluster.bundle("shop") != root.certificate_pem.decode()
