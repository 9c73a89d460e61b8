"""Bundles and chains from outside: read or refused by name, and a leaf that fits nobody else."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from core.names import WorkloadId
from identity.chains import ANCHORS_MAX, InvalidBundle, leaf_unfit, read_bundle_untrusted
from identity.issuer import make_issuer, make_root, sign_leaf

ROOT = make_root("cluster.local", 1e9)


@given(
    st.binary(max_size=200)
    | st.builds(lambda head, tail: head + ROOT.certificate_pem + tail, st.binary(max_size=20), st.binary(max_size=20))
)
def test_any_bytes_are_a_bundle_or_the_one_error(data: bytes) -> None:
    try:
        assert len(read_bundle_untrusted(data)) == 1
    except InvalidBundle:
        pass


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ROOT.certificate_pem * (ANCHORS_MAX + 1),
        ROOT.certificate_pem + ROOT.key_pem,
        ROOT.certificate_pem + b" " * 70_000,
    ],
    ids=["nothing", "no certificate", "too many", "with a key", "too long"],
)
def test_what_is_no_bundle_is_refused(pem: bytes) -> None:
    with pytest.raises(InvalidBundle):
        read_bundle_untrusted(pem)


def test_a_leaf_is_fit_only_for_its_key_its_name_and_a_bundle_it_ends_in() -> None:
    key, cart, web = ec.generate_private_key(ec.SECP256R1()), WorkloadId("c.l", "shop", "cart"), WorkloadId("c.l", "shop", "web")
    chain = sign_leaf(make_issuer("c.l", ROOT, 1e9), key.public_key(), cart, 1e9, 60).chain_pem
    bundle = ROOT.certificate_pem
    assert leaf_unfit(chain, bundle, key.public_key(), cart) == ""
    assert "another key" in leaf_unfit(chain, bundle, ec.generate_private_key(ec.SECP256R1()).public_key(), cart)
    assert "does not name" in leaf_unfit(chain, bundle, key.public_key(), web)
    assert "does not end in" in leaf_unfit(chain, make_root("c.l", 1e9).certificate_pem, key.public_key(), cart)
