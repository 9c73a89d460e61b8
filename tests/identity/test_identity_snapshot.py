"""One Secret holds the whole authority, and any content of it is an authority or a refusal."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import load_pem_x509_certificates
from hypothesis import given
from hypothesis import strategies as st

from identity.authority import Authority
from identity.bundle import Step
from identity.snapshot import SnapshotDamaged, SnapshotStore, read_secret, secret_data, secret_values
from identity.store import StoreUnsafe


def made(*steps: Step) -> tuple[Authority, SnapshotStore]:
    store = SnapshotStore()
    authority = Authority.self_made("cluster.local", store)
    for step in steps:
        assert authority.rotate(step) is None
    return authority, store


@pytest.mark.parametrize("steps", [(), (Step.ADD,), (Step.ADD, Step.SWITCH), (Step.ADD, Step.SWITCH, Step.DROP)])
def test_an_authority_comes_back_from_its_secret_at_every_step(steps: tuple[Step, ...]) -> None:
    authority, store = made(*steps)
    read = read_secret({"data": secret_data(store)})
    assert read == store
    assert read.state is not None
    again = Authority.restored(read.state, read, "cluster.local", lifetime_s=3600, clock=authority.clock)
    assert again.trust.value == authority.trust.value
    assert again.issuer.pair.key_pem == authority.issuer.pair.key_pem


def test_the_issuer_in_force_lies_where_kubernetes_tls_has_it() -> None:
    authority, store = made(Step.ADD)
    values = secret_values({"data": secret_data(store)})
    assert load_pem_x509_certificates(values["tls.crt"]) == [authority.issuer.pair.certificate]
    assert values["tls.key"] == authority.issuer.pair.key_pem
    assert values["ca.crt"] == authority.trust.value.bundle_pem
    assert len([name for name in values if name.endswith(".key")]) == 4  # the issuer's, the next one's, both roots'


def test_keys_that_are_of_no_more_use_are_gone() -> None:
    _, store = made(Step.ADD, Step.SWITCH, Step.DROP)
    assert len(store.keys) == 2


def test_a_copy_is_changed_alone() -> None:
    _, store = made()
    copy = store.copy()
    copy.save_key("root", "x", b"y")
    assert copy != store


def test_another_trust_domain_is_refused() -> None:
    authority, store = made()
    assert store.state is not None
    with pytest.raises(StoreUnsafe, match="the setting says other"):
        Authority.restored(store.state, store, "other", lifetime_s=3600, clock=authority.clock)


def encoded(**values: bytes) -> dict[str, str]:
    return {name.replace("_", "."): base64.b64encode(value).decode() for name, value in values.items()}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param({}, "no state.json", id="empty"),
        pytest.param({"tls.crt": "%"}, "tls.crt is not base64", id="no base64"),
        pytest.param(encoded(state_json=b"{}"), "state.json cannot be read", id="no state"),
        pytest.param(encoded(tls_crt=b"x" * 300_000), "more than", id="too long"),
        pytest.param([], "no state.json", id="null"),
        pytest.param("text", "not a mapping", id="no mapping"),
    ],
)
def test_what_is_no_state_is_refused_with_the_reason(data: object, expected: str) -> None:
    with pytest.raises(SnapshotDamaged, match=expected):
        read_secret({"data": data})


@given(
    st.dictionaries(st.sampled_from(["state.json", "tls.key", "tls.crt", "root-a.key", "x"]), st.binary(max_size=40) | st.text(max_size=9))
)
def test_any_secret_is_a_snapshot_or_refused(content: dict[str, bytes | str]) -> None:
    data = {name: base64.b64encode(value).decode() if isinstance(value, bytes) else value for name, value in content.items()}
    with pytest.raises(SnapshotDamaged):
        read_secret({"data": data})


def test_a_secret_without_the_key_is_refused() -> None:
    _, store = made()
    data = secret_data(store)
    del data["tls.key"]
    with pytest.raises(SnapshotDamaged, match=r"no tls\.key"):
        read_secret({"data": data})


def test_a_key_of_another_kind_is_refused() -> None:
    authority, store = made()
    assert store.state is not None
    key = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    other = SnapshotStore(store.state, {**store.keys, ("issuer", store.state.issuer.id): key})
    with pytest.raises(StoreUnsafe, match="not ECDSA P-256"):
        Authority.restored(store.state, other, "cluster.local", lifetime_s=3600, clock=authority.clock)


def test_a_key_that_somebody_replaced_is_not_signed_with() -> None:
    authority, store = made()
    _, stranger = made()
    assert store.state is not None
    data = secret_data(store) | {"tls.key": secret_data(stranger)["tls.key"]}
    read = read_secret({"data": data})
    with pytest.raises(StoreUnsafe, match="does not belong to its certificate"):
        Authority.restored(store.state, read, "cluster.local", lifetime_s=3600, clock=authority.clock)
