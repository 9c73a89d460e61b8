"""The authority over the years: issuers renewed in time, reports believed no further than they can be true."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from core.names import WorkloadId
from identity.authority import Authority
from identity.bundle import Step
from identity.issuer import ISSUER_LIFETIME_S, ROOT_LIFETIME_S
from identity.store import Store
from identity.tokens import Subject
from tests.identity.identity_lab import TRUST_DOMAIN

CART = Subject(WorkloadId(TRUST_DOMAIN, "shop", "cart"), "cart-0", "uid-1")
KEY = ec.generate_private_key(ec.SECP256R1()).public_key()


def test_a_self_made_issuer_is_renewed_below_its_root_when_a_third_of_its_life_is_left(tmp_path: Path) -> None:
    now = [1e9]
    authority = Authority.self_made(TRUST_DOMAIN, Store(tmp_path / "ca"), clock=lambda: now[0])
    first = authority.trust.value
    now[0] += ISSUER_LIFETIME_S * 0.6
    authority.tend()
    assert authority.trust.value == first
    now[0] += ISSUER_LIFETIME_S * 0.1
    authority.tend()
    second = authority.trust.value
    assert second.issuer.id != first.issuer.id
    assert (second.generation, second.anchors) == (first.generation, first.anchors)
    assert second.issuer.not_after > first.issuer.not_after + ISSUER_LIFETIME_S / 2
    assert Authority.self_made(TRUST_DOMAIN, Store(tmp_path / "ca"), clock=lambda: now[0]).trust.value == second


def test_an_issuer_is_not_renewed_in_vain_below_a_root_that_ends_as_soon() -> None:
    now = [1e9]
    authority = Authority.self_made(TRUST_DOMAIN, None, clock=lambda: now[0])
    now[0] += ROOT_LIFETIME_S - ISSUER_LIFETIME_S / 10
    authority.tend()
    before = authority.trust.value
    authority.tend()
    assert authority.trust.value == before


def test_a_generation_that_does_not_exist_yet_counts_as_none() -> None:
    authority = Authority.self_made(TRUST_DOMAIN, None)
    authority.report(CART, 999, authority.issuer.ref.id)
    assert authority.rotate(Step.ADD) is None
    refusal = authority.rotate(Step.SWITCH)
    assert refusal is not None
    assert "shop/cart-0" in refusal.sentence


def test_a_certificate_that_cannot_be_booked_is_not_handed_out(tmp_path: Path) -> None:
    authority = Authority.self_made(TRUST_DOMAIN, Store(tmp_path / "ca"))
    (tmp_path / "ca" / "ledger.jsonl").unlink()
    (tmp_path / "ca" / "ledger.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        authority.certify(KEY, CART)
