"""What our certificates say, read by openssl, and which issuers are not accepted."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from core.names import WorkloadId
from identity.chains import anchor_above
from identity.issuer import (
    CLOCK_SKEW_S,
    Issuer,
    IssuerExpired,
    IssuerInvalid,
    Pair,
    load_issuer,
    make_issuer,
    make_root,
    sign_leaf,
)

NOW = 1_800_000_000.0
CART = WorkloadId("cluster.local", "shop", "cart")
ROOT = make_root("cluster.local", NOW)
ISSUER = make_issuer("cluster.local", ROOT, NOW)
KEY = ec.generate_private_key(ec.SECP256R1())


def openssl(*arguments: object) -> str:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def leaf(lifetime_s: float = 86400, issuer: Issuer = ISSUER, now: float = NOW) -> x509.Certificate:
    return x509.load_pem_x509_certificate(sign_leaf(issuer, KEY.public_key(), CART, now, lifetime_s).chain_pem)


def test_openssl_reads_the_leaf_as_meant(tmp_path: Path) -> None:
    path = tmp_path / "leaf.pem"
    path.write_bytes(leaf().public_bytes(Encoding.PEM))
    text = " ".join(openssl("x509", "-in", path, "-noout", "-text").split())
    assert "Version: 3" in text
    assert "Signature Algorithm: ecdsa-with-SHA256" in text
    assert "Subject: Subject Public Key" in text  # an empty one
    assert "NIST CURVE: P-256" in text
    assert "X509v3 Basic Constraints: critical CA:FALSE" in text
    assert "X509v3 Key Usage: critical Digital Signature X509v3" in text
    assert "X509v3 Extended Key Usage: TLS Web Server Authentication, TLS Web Client Authentication X509v3" in text
    assert f"X509v3 Subject Alternative Name: critical URI:{CART.uri} Signature" in text


@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
def test_openssl_verifies_the_chain_for_both_ends(tmp_path: Path, purpose: str) -> None:
    chain = sign_leaf(ISSUER, KEY.public_key(), CART, NOW, 60).chain_pem
    (tmp_path / "leaf").write_bytes(chain)
    (tmp_path / "issuer").write_bytes(ISSUER.pair.certificate_pem)
    (tmp_path / "root").write_bytes(ROOT.certificate_pem)
    arguments = ["verify", "-x509_strict", "-purpose", purpose, "-attime", int(NOW), "-CAfile", tmp_path / "root"]
    assert openssl(*arguments, "-untrusted", tmp_path / "issuer", tmp_path / "leaf").endswith(": OK\n")
    assert "error 20" in str(failed_verify(*arguments, tmp_path / "leaf"))


def failed_verify(*arguments: object) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize("identifier", [x509.SubjectKeyIdentifier(bytes(range(20))), None])
def test_openssl_verifies_below_an_issuer_whose_maker_computes_key_identifiers_another_way(
    tmp_path: Path, identifier: x509.SubjectKeyIdentifier | None
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "given")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, *(datetime.fromtimestamp(NOW + day, UTC) for day in (-9, 86400)))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = (builder.add_extension(identifier, critical=False) if identifier else builder).sign(key, hashes.SHA256())
    given = Issuer(Pair(certificate, key), (), certificate)
    (tmp_path / "root").write_bytes(given.pair.certificate_pem)
    (tmp_path / "leaf").write_bytes(sign_leaf(given, KEY.public_key(), CART, NOW, 60).chain_pem)
    assert openssl("verify", "-attime", int(NOW), "-CAfile", tmp_path / "root", tmp_path / "leaf").endswith(": OK\n")


def test_an_issuer_below_our_issuer_does_not_verify(tmp_path: Path) -> None:
    rogue = make_issuer("cluster.local", Pair(ISSUER.pair.certificate, ISSUER.pair.key), NOW)
    (tmp_path / "leaf").write_bytes(sign_leaf(rogue, KEY.public_key(), CART, NOW, 60).chain_pem)
    (tmp_path / "between").write_bytes(ISSUER.pair.certificate_pem + rogue.pair.certificate_pem)
    (tmp_path / "root").write_bytes(ROOT.certificate_pem)
    error = failed_verify(
        "verify", "-attime", int(NOW), "-CAfile", tmp_path / "root", "-untrusted", tmp_path / "between", tmp_path / "leaf"
    )
    assert "path length constraint exceeded" in error


def test_validity_is_widened_by_the_clock_skew_on_both_sides() -> None:
    signed = sign_leaf(ISSUER, KEY.public_key(), CART, NOW, 30)
    assert (signed.not_before, signed.not_after) == (NOW - CLOCK_SKEW_S, NOW + 30 + CLOCK_SKEW_S)
    certificate = x509.load_pem_x509_certificate(signed.chain_pem)
    assert certificate.not_valid_before_utc.timestamp() == signed.not_before
    assert certificate.not_valid_after_utc.timestamp() == signed.not_after


def test_serials_are_random_and_long() -> None:
    serials = {leaf().serial_number for _ in range(20)}
    assert len(serials) == 20
    assert max(serials).bit_length() > 140


def test_a_leaf_never_outlives_its_issuer() -> None:
    late = ISSUER.not_after - 100
    assert leaf(86400, now=late).not_valid_after_utc.timestamp() == ISSUER.not_after


def test_a_leaf_never_outlives_the_anchor_either() -> None:
    short_root = make_root("cluster.local", NOW - 10 * 365 * 86400 + 3600)
    issuer = make_issuer("cluster.local", short_root, NOW)
    assert leaf(86400, issuer).not_valid_after_utc.timestamp() == short_root.certificate.not_valid_after_utc.timestamp() == NOW + 3600


def test_nothing_is_signed_by_a_chain_at_its_end() -> None:
    with pytest.raises(IssuerExpired, match="renew the issuer"):
        leaf(now=ISSUER.not_after - 1)


def test_the_chain_handed_out_is_leaf_and_issuer_without_the_anchor() -> None:
    chain = x509.load_pem_x509_certificates(sign_leaf(ISSUER, KEY.public_key(), CART, NOW, 60).chain_pem)
    assert chain[1:] == [ISSUER.pair.certificate]
    assert anchor_above(chain, [ROOT.certificate]) == ROOT.certificate
    assert anchor_above(chain, [make_root("cluster.local", NOW).certificate]) is None


def ca(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    signer: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    subject: str,
    issuer: str,
    *,
    is_ca: bool = True,
    days: float = 10,
) -> x509.Certificate:
    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    made = x509.CertificateBuilder(name(issuer), name(subject), key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(datetime.fromtimestamp(NOW - 86400 * 5, UTC)).not_valid_after(
        datetime.fromtimestamp(NOW + 86400 * days, UTC)
    )
    return made.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True).sign(signer, hashes.SHA256())


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def key_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


RSA = rsa.generate_private_key(65537, 2048)


def test_a_given_issuer_below_an_rsa_anchor_through_an_intermediate_signs_leaves() -> None:
    middle = ec.generate_private_key(ec.SECP256R1())
    anchor, between = ca(RSA, RSA, "root", "root"), ca(middle, RSA, "middle", "root")
    own = ca(KEY, middle, "issuer", "middle")
    issuer, anchors = load_issuer(pem(own, between), key_pem(KEY), pem(anchor), NOW)
    chain = x509.load_pem_x509_certificates(sign_leaf(issuer, KEY.public_key(), CART, NOW, 60).chain_pem)
    assert chain[1:] == [own, between]
    assert anchor_above(chain, anchors) == anchor


def test_an_issuer_that_is_its_own_anchor_stays_out_of_the_chain() -> None:
    own = ca(KEY, KEY, "root", "root")
    issuer, _ = load_issuer(pem(own), key_pem(KEY), pem(own), NOW)
    assert len(x509.load_pem_x509_certificates(sign_leaf(issuer, KEY.public_key(), CART, NOW, 60).chain_pem)) == 1


OTHER = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
SMALL = rsa.generate_private_key(65537, 1024)
ANCHOR = ca(OTHER, OTHER, "root", "root")
GOOD = ca(KEY, OTHER, "issuer", "root")


@pytest.mark.parametrize(
    ("certificates", "key", "anchors", "expected"),
    [
        pytest.param(b"", key_pem(KEY), pem(ANCHOR), "expected 1 to", id="no certificate"),
        pytest.param(pem(GOOD), b"nonsense", pem(ANCHOR), "key cannot be read", id="no key"),
        pytest.param(pem(GOOD), key_pem(OTHER), pem(ANCHOR), "does not belong", id="another key"),
        pytest.param(pem(ca(P384, OTHER, "issuer", "root")), key_pem(P384), pem(ANCHOR), "not ECDSA P-256", id="P-384"),
        pytest.param(pem(ca(RSA, OTHER, "issuer", "root")), key_pem(RSA), pem(ANCHOR), "not ECDSA P-256", id="RSA issuer"),
        pytest.param(pem(ca(KEY, OTHER, "issuer", "root", is_ca=False)), key_pem(KEY), pem(ANCHOR), "not a CA", id="no CA"),
        pytest.param(pem(ca(KEY, OTHER, "issuer", "root", days=-1)), key_pem(KEY), pem(ANCHOR), "not now", id="expired"),
        pytest.param(pem(ca(KEY, KEY, "issuer", "root")), key_pem(KEY), pem(ANCHOR), "does not end in any", id="another anchor"),
        pytest.param(pem(GOOD, ca(P384, P384, "x", "x")), key_pem(KEY), pem(ANCHOR), "neither ECDSA P-256", id="a stray link"),
        pytest.param(pem(GOOD), key_pem(KEY), pem(ANCHOR, ca(SMALL, SMALL, "root", "root")), "neither ECDSA P-256", id="a weak anchor"),
        pytest.param(pem(GOOD) + key_pem(KEY), key_pem(KEY), pem(ANCHOR), "no other", id="a key among the certificates"),
    ],
)
def test_an_issuer_that_cannot_issue_is_refused_by_name(certificates: bytes, key: bytes, anchors: bytes, expected: str) -> None:
    with pytest.raises(IssuerInvalid, match=expected):
        load_issuer(certificates, key, anchors, NOW)


def test_keys_stay_out_of_the_text_of_values() -> None:
    assert "PRIVATE" not in repr(ISSUER)
    assert "key=" not in repr(ROOT)
