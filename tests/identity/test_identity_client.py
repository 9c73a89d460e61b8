"""What keeps a sidecar certified, run through hours on a virtual clock."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from core.credentials import Credentials
from core.names import WorkloadId
from identity.bundle import Step
from identity.client import Anchors, IdentityAway, keep_certified
from identity.issuer import make_root
from identity.wire import POLL_S
from tests.identity.identity_lab import TRUST_DOMAIN, Workload, kept_certified
from tests.identity.identity_memory import MemoryLab, started, virtual_now


@asynccontextmanager
async def memory_lab(directory: Path, lifetime_s: float = 86400) -> AsyncIterator[MemoryLab]:
    async with trio.open_nursery() as nursery:
        yield MemoryLab(directory, nursery, lifetime_s)
        nursery.cancel_scope.cancel()


async def test_a_30_second_certificate_is_renewed_with_a_fresh_key_and_never_runs_out(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with memory_lab(tmp_path, 30) as lab:
        cart = lab.workload()
        left: list[float] = []
        async with kept_certified(cart):
            await cart.wait_certified()
            for _ in range(600):
                left.append((await cart.wait_certified()).not_after - virtual_now())
                await trio.sleep(1)
    assert 600 / 35 - 1 <= len(cart.seen.certificates) <= 600 / 35 + 2  # 70 % of 30 s and the skew of 20 s
    assert len({credentials.key_pem for credentials in cart.seen.certificates}) == len(cart.seen.certificates)
    assert min(left) > 10
    assert not cart.seen.failures


async def test_the_certificate_in_use_stays_while_the_service_is_away_and_is_renewed_when_it_is_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with memory_lab(tmp_path, 3600) as lab:
        cart = lab.workload()
        async with kept_certified(cart):
            first = await cart.wait_certified()
            await trio.sleep(1)
            await lab.go_down()
            await trio.sleep(3000)  # beyond 70 % of the life
            assert cart.cell.value is first
            assert {reason for reason, _ in cart.seen.failures} <= {"connect-failed", "connection-lost"}
            assert len(cart.seen.failures) < 2 * (3000 / 30 * 1.1 + 6)  # two tasks, capped at 30 s, which they reach in six steps
            lab.down = False
            await trio.sleep(31)
            assert cart.cell.value is not None
            assert cart.cell.value.not_after > first.not_after


async def test_an_expired_certificate_stays_in_the_cell_for_the_proxy_to_judge(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with memory_lab(tmp_path, 30) as lab:
        cart = lab.workload()
        async with kept_certified(cart):
            first = await cart.wait_certified()
            await trio.sleep(1)
            await lab.go_down()
            await trio.sleep(300)
            assert cart.cell.value is first
            assert first.not_after < virtual_now()


async def test_a_new_bundle_joins_the_present_key_at_once_and_is_reported(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        cart = lab.workload()
        async with kept_certified(cart):
            first = await cart.wait_certified()
            await trio.sleep(5)
            assert lab.authority.rotate(Step.ADD) is None
            await trio.sleep(0.2)
            second = await cart.wait_certified()
            assert second.bundle_pem == lab.authority.trust.value.bundle_pem != first.bundle_pem
            assert (second.key_pem, second.chain_pem, second.not_after) == (first.key_pem, first.chain_pem, first.not_after)
            assert cart.seen.generations == [2]
            assert lab.authority.blocking() == []


async def test_a_new_issuer_is_followed_with_a_fresh_key_within_seconds(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        cart = lab.workload(chance=0.9)
        async with kept_certified(cart):
            first = await cart.wait_certified()
            lab.authority.rotate(Step.ADD)
            await trio.sleep(1)
            assert lab.authority.rotate(Step.SWITCH) is None
            refusal = lab.authority.rotate(Step.DROP)
            assert refusal is not None
            assert "shop/cart-0" in refusal.sentence
            await trio.sleep(3)
            second = await cart.wait_certified()
            assert second.key_pem != first.key_pem
            assert len(cart.seen.certificates) == 2
            assert lab.authority.rotate(Step.DROP) is None
            await trio.sleep(1)
            third = await cart.wait_certified()
            assert (third.key_pem, third.bundle_pem) == (second.key_pem, lab.authority.trust.value.bundle_pem)
            assert not cart.seen.failures


async def test_a_quiet_mesh_costs_one_poll_in_thirty_seconds(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        cart = lab.workload()
        async with kept_certified(cart):
            await cart.wait_certified()
            await trio.sleep(600)
        polls = [at for at, target in lab.requests if target.startswith("/v1/bundle?generation=1&issuer=")]
        assert abs(len(polls) - 600 / POLL_S) <= 1
        assert len(lab.guests.seen) <= 1 + 600 / 60  # the token is not reviewed for each


async def test_a_restarted_service_that_differs_is_never_polled_in_a_spin(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        cart = lab.workload()
        async with kept_certified(cart):
            await cart.wait_certified()
            other = '{"bundle": ' + repr(lab.anchors_file.read_text()).replace("'", '"') + ', "generation": 0, "issuer": "other"}'
            lab.answer_instead = (200, other.encode())
            await trio.sleep(POLL_S)
            lab.requests.clear()
            await trio.sleep(60)
            assert len(lab.requests) < 60


async def expect_failure(lab: MemoryLab, cart: Workload, reason: str, detail: str) -> None:
    with trio.move_on_after(20):
        await keep_certified(cart.settings, cart.cell, cart.seen)
    assert cart.cell.value is None
    assert cart.seen.failures
    assert {found for found, _ in cart.seen.failures} == {reason}
    assert detail in cart.seen.failures[0][1]


async def test_a_service_with_another_identity_gets_no_request(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        lab.serves_as = WorkloadId(TRUST_DOMAIN, "shop", "cart")
        await expect_failure(lab, lab.workload(), "tls-failed", "identity-mismatch")
        assert lab.requests == []


async def test_a_service_below_another_anchor_gets_no_request(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        lab.anchors_file.write_bytes(make_root(TRUST_DOMAIN, started()).certificate_pem)
        await expect_failure(lab, lab.workload(), "tls-failed", "unknown-issuer")
        assert lab.requests == []


async def test_an_anchor_file_that_is_corrected_is_used_without_a_restart(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        good = lab.anchors_file.read_bytes()
        lab.anchors_file.write_bytes(make_root(TRUST_DOMAIN, started()).certificate_pem)
        cart = lab.workload()
        async with kept_certified(cart):
            await trio.sleep(10)
            assert cart.cell.value is None
            lab.anchors_file.write_bytes(good)
            await cart.wait_certified()


@pytest.mark.parametrize("content", [None, b"", b"nonsense"], ids=["no file", "empty", "nonsense"])
async def test_without_anchors_nothing_is_trusted(tmp_path: Path, autojump_clock: trio.testing.MockClock, content: bytes | None) -> None:
    async with memory_lab(tmp_path) as lab:
        lab.anchors_file.unlink()
        if content is not None:
            lab.anchors_file.write_bytes(content)
        await expect_failure(lab, lab.workload(), "no-trust-anchors", "anchors.pem")
        assert lab.requests == []


async def test_the_token_is_read_anew_for_each_request(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        cart = lab.workload()
        cart.settings.token_file.write_text("stale")
        async with kept_certified(cart):
            await trio.sleep(5)
            assert cart.cell.value is None
            assert cart.seen.failures[0] == ("status-401", "nobody knows this token")
            cart.settings.token_file.write_text("token-of-cart\n")
            await cart.wait_certified()


@pytest.mark.parametrize("content", [None, b"", b"two words", b"a\x00b", b"x" * 9000, "tökèn".encode()])
async def test_a_file_without_a_token_is_a_failure_that_names_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, content: bytes | None
) -> None:
    async with memory_lab(tmp_path) as lab:
        cart = lab.workload()
        cart.settings.token_file.unlink()
        if content is not None:
            cart.settings.token_file.write_bytes(content)
        await expect_failure(lab, cart, "no-token", "cart.token")


async def test_a_token_of_another_workload_is_refused_and_the_reason_is_told(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with memory_lab(tmp_path) as lab:
        cart, _ = lab.workload("cart"), lab.workload("web")
        cart.settings.token_file.write_text("token-of-web")
        await expect_failure(lab, cart, "status-403", "the request is for spiffe://cluster.local/ns/shop/sa/cart, the token is of")


@pytest.mark.parametrize(
    "answer", [b"", b"null", b"{}", b"[" * 60_000, b'{"chain":"","bundle":"","generation":1,"issuer":"a","not_before":0,"not_after":0}']
)
async def test_an_answer_that_makes_no_sense_changes_nothing(tmp_path: Path, autojump_clock: trio.testing.MockClock, answer: bytes) -> None:
    async with memory_lab(tmp_path) as lab:
        lab.answer_instead = (200, answer)
        await expect_failure(lab, lab.workload(), "invalid-answer", "")


async def test_a_huge_answer_is_not_read(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        lab.answer_instead = (200, b" " * 1_000_000)
        await expect_failure(lab, lab.workload(), "connection-lost", "longer than")


async def test_a_certificate_for_somebody_elses_key_is_not_used(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with memory_lab(tmp_path) as lab:
        recorded: list[bytes] = []
        cart = lab.workload()
        real = lab._asgi

        async def record(*arguments: object) -> tuple[int, bytes]:
            status, answer = await real(*arguments)  # type: ignore[arg-type]
            recorded.append(answer)
            return status, answer

        lab._asgi = record  # type: ignore[method-assign, assignment]
        async with kept_certified(cart):
            await cart.wait_certified()
        lab.answer_instead = (200, recorded[0])
        await expect_failure(lab, lab.workload(), "invalid-answer", "another key")


def test_after_a_rotation_an_unchanged_file_is_never_trusted_again(tmp_path: Path) -> None:
    old, new, newest = (make_root(TRUST_DOMAIN, time.time()).certificate_pem for _ in range(3))
    path = tmp_path / "anchors.pem"
    path.write_bytes(old)
    anchors = Anchors(path)
    assert anchors.bundle_pem() == old
    anchors.sent(new)
    assert anchors.bundle_pem() == new
    path.write_bytes(newest)
    assert anchors.bundle_pem() == newest
    anchors.sent(new)
    assert anchors.bundle_pem() == new
    path.unlink()
    assert anchors.bundle_pem() == new


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(IdentityAway, match="nowhere"):
        Anchors(tmp_path / "nowhere").bundle_pem()


def test_the_key_stays_out_of_the_text_of_credentials() -> None:
    assert "secret" not in repr(Credentials(WorkloadId("a", "b", "c"), b"secret", b"", b"", 0, 0))
