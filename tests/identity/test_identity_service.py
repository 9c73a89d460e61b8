"""The real service over loopback HTTPS with real workloads: certify, rotate, restart, refuse."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from identity.authority import Authority
from identity.bundle import Step
from identity.store import Store
from tests.identity.identity_lab import TRUST_DOMAIN, Lab, kept_certified, wait_until


def new_lab(directory: Path) -> Lab:
    return Lab(directory, Authority.self_made(TRUST_DOMAIN, Store(directory / "ca")))


async def test_a_workload_is_certified_for_the_identity_of_its_token(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    async with lab.serving():
        cart = lab.workload("cart")
        async with kept_certified(cart):
            credentials = await cart.wait_certified()
    leaf = x509.load_pem_x509_certificates(credentials.chain_pem)[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["spiffe://cluster.local/ns/shop/sa/cart"]
    assert credentials.bundle_pem == lab.authority.trust.value.bundle_pem


async def test_a_rotation_reaches_running_workloads_step_by_step(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    old = lab.authority.trust.value
    async with lab.serving():
        cart, web = lab.workload("cart"), lab.workload("web")
        async with kept_certified(cart, web):
            await cart.wait_certified()
            await web.wait_certified()
            assert lab.authority.rotate(Step.ADD) is None
            await wait_until(lambda: not lab.authority.blocking())
            assert lab.authority.rotate(Step.SWITCH) is None
            await wait_until(lambda: not lab.authority.blocking())
            assert lab.authority.rotate(Step.DROP) is None
            new = lab.authority.trust.value
            for workload in (cart, web):
                found = await workload.cell.wait_for(lambda value: value is not None and value.bundle_pem == new.bundle_pem)
                assert found is not None
                issuer = x509.load_pem_x509_certificates(found.chain_pem)[1]
                anchor = x509.load_pem_x509_certificate(new.bundle_pem)
                issuer.verify_directly_issued_by(anchor)
                assert len(workload.seen.certificates) == 2
                assert not workload.seen.failures
    assert len(new.anchors) == 1
    assert new.anchors[0].id != old.anchors[0].id
