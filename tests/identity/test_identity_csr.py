"""Which certificate signing requests are refused, each by name, and that nothing else can come out of the check."""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID, NameOID
from hypothesis import assume, given
from hypothesis import strategies as st

from core.names import WorkloadId
from identity import csr
from identity.csr import CSR_DER_MAX_BYTES, CSR_PEM_MAX_BYTES, CsrRefused, make_csr, read_csr_untrusted

CART = WorkloadId("cluster.local", "shop", "cart")
KEY = ec.generate_private_key(ec.SECP256R1())
URI = x509.UniformResourceIdentifier(CART.uri)
GOOD_PEM = make_csr(KEY, CART)
GOOD = x509.load_pem_x509_csr(GOOD_PEM)
GOOD_DER = GOOD.public_bytes(Encoding.DER)
UNUSED_BITS = len(GOOD_DER) - len(GOOD.signature) - 1
"""Where it says how many bits of the signature are unused: one, where the last is 0, is the same signature."""


def builder(*names: x509.GeneralName, subject: x509.Name | None = None) -> x509.CertificateSigningRequestBuilder:
    made = x509.CertificateSigningRequestBuilder().subject_name(subject or x509.Name([]))
    return made.add_extension(x509.SubjectAlternativeName(names), critical=True) if names else made


def signed(made: x509.CertificateSigningRequestBuilder, key: object = KEY, digest: hashes.HashAlgorithm | None = None) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
    return made.sign(key, algorithm).public_bytes(Encoding.PEM)  # type: ignore[arg-type]


@pytest.mark.parametrize("request_bytes", [GOOD_PEM, GOOD_DER, b"\n" + GOOD_PEM + b"\n", GOOD_PEM.replace(b"\n", b"\r\n")])
def test_what_we_make_is_accepted_as_pem_and_der(request_bytes: bytes) -> None:
    assert read_csr_untrusted(request_bytes) == (KEY.public_key(), CART)


def test_what_we_make_is_accepted_by_openssl(tmp_path: Path) -> None:
    path = tmp_path / "csr.pem"
    path.write_bytes(GOOD_PEM)
    done = subprocess.run(["openssl", "req", "-in", path, "-noout", "-verify", "-text"], capture_output=True, text=True, check=True)
    assert "verify OK" in done.stderr + done.stdout
    assert f"URI:{CART.uri}" in done.stdout


def test_a_request_made_by_openssl_is_accepted(tmp_path: Path) -> None:
    command = "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -subj / -keyout"
    made = ["openssl", *command.split(), str(tmp_path / "key"), "-addext", f"subjectAltName=URI:{CART.uri}"]
    pem = subprocess.run(made, capture_output=True, check=True).stdout
    assert read_csr_untrusted(pem)[1] == CART


def test_an_identity_of_the_longest_names_fits() -> None:
    longest = WorkloadId.checked("t" * 255, "n" * 63, ".".join(["s" * 62] * 4))
    assert read_csr_untrusted(make_csr(KEY, longest)) == (KEY.public_key(), longest)


def with_other_signature() -> bytes:
    other = x509.load_pem_x509_csr(make_csr(ec.generate_private_key(ec.SECP256R1()), CART))
    mine = x509.load_pem_x509_csr(GOOD_PEM)
    assert len(mine.tbs_certrequest_bytes) == len(other.tbs_certrequest_bytes)
    return GOOD_DER.replace(mine.tbs_certrequest_bytes, other.tbs_certrequest_bytes)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "no name": (lambda: signed(builder()), "extension requests, expected one"),
    "two URIs": (lambda: signed(builder(URI, x509.UniformResourceIdentifier("spiffe://cluster.local/ns/a/sa/b"))), "2 URIs, expected one"),
    "the same URI twice": (lambda: signed(builder(URI, URI)), "2 URIs, expected one"),
    "a URI that is no identity": (lambda: signed(builder(x509.UniformResourceIdentifier("https://a.b/c"))), "expected spiffe://"),
    "a DNS name": (lambda: signed(builder(URI, x509.DNSName("cart.shop"))), "DNS name 'cart.shop'"),
    "an IP address": (lambda: signed(builder(URI, x509.IPAddress(ipaddress.ip_address("10.0.0.1")))), "IP address '10.0.0.1'"),
    "an email address": (lambda: signed(builder(URI, x509.RFC822Name("a@b.c"))), "email address 'a@b.c'"),
    "a directory name": (lambda: signed(builder(URI, x509.DirectoryName(x509.Name([])))), "directory name"),
    "another name alone": (lambda: signed(builder(x509.OtherName(x509.ObjectIdentifier("1.2.3"), b"\x05\x00"))), "other name"),
    "a subject": (
        lambda: signed(builder(URI, subject=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admin")]))),
        "leave the subject empty",
    ),
    "a CA": (
        lambda: signed(builder(URI).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)),
        "extension basicConstraints",
    ),
    "a usage": (
        lambda: signed(builder(URI).add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)),
        "extension extendedKeyUsage",
    ),
    "a usage alone": (
        lambda: signed(builder().add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)),
        "extension extendedKeyUsage",
    ),
    "a password": (lambda: signed(builder(URI).add_attribute(AttributeOID.CHALLENGE_PASSWORD, b"secret")), "attribute challengePassword"),
    "a P-384 key": (lambda: signed(builder(URI), ec.generate_private_key(ec.SECP384R1())), "curve secp384r1, expected P-256"),
    "a secp256k1 key": (lambda: signed(builder(URI), ec.generate_private_key(ec.SECP256K1())), "curve secp256k1, expected P-256"),
    "an RSA key": (lambda: signed(builder(URI), rsa.generate_private_key(65537, 2048)), "RSA, expected ECDSA P-256"),
    "an Ed25519 key": (lambda: signed(builder(URI), ed25519.Ed25519PrivateKey.generate()), "Ed25519, expected ECDSA P-256"),
    "SHA-384": (lambda: signed(builder(URI), digest=hashes.SHA384()), "1.2.840.10045.4.3.3, expected ECDSA with SHA-256"),
    "a signature of another key": (with_other_signature, "was not made with the key in the request"),
    "a broken signature": (lambda: GOOD_DER[:-1] + bytes([GOOD_DER[-1] ^ 1]), "signature"),
    "too many bytes of DER": (lambda: GOOD_DER + bytes(CSR_DER_MAX_BYTES), "at most 4096 are read"),
    "too many bytes of PEM": (lambda: GOOD_PEM + b"\n" * CSR_PEM_MAX_BYTES, "at most 6144 are read"),
    "DER with a tail": (lambda: GOOD_DER + b"\x00", "not a PKCS#10 request"),
    "two PEM blocks": (lambda: GOOD_PEM + GOOD_PEM, "exactly one PEM block"),
    "text beside the PEM": (lambda: b"# mine\n" + GOOD_PEM, "exactly one PEM block"),
    "a certificate": (lambda: GOOD_PEM.replace(b"CERTIFICATE REQUEST", b"CERTIFICATE"), "exactly one PEM block"),
    "PEM that is no base64": (lambda: GOOD_PEM.replace(b"MI", b"M=", 1), "not base64"),
    "nothing": (lambda: b"", "not a PKCS#10 request"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_refusal_names_what_was_wrong(case: str) -> None:
    make, expected = REFUSED[case]
    with pytest.raises(CsrRefused) as refused:
        read_csr_untrusted(make())
    assert expected in str(refused.value)


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(CsrRefused):
        read_csr_untrusted(data)


@given(st.integers(0, len(GOOD_DER) - 1), st.integers(1, 255), st.booleans())
def test_any_damage_to_a_request_is_refused_by_name(at: int, flip: int, cut: bool) -> None:
    damaged = GOOD_DER[:at] if cut else GOOD_DER[:at] + bytes([GOOD_DER[at] ^ flip]) + GOOD_DER[at + 1 :]
    assume(cut or at != UNUSED_BITS)
    with pytest.raises(CsrRefused):
        read_csr_untrusted(damaged)


@given(st.integers(0, len(GOOD_PEM) - 1), st.binary(max_size=3))
def test_damaged_pem_gives_the_request_or_the_refusal(at: int, patch: bytes) -> None:
    damaged = GOOD_PEM[:at] + patch + GOOD_PEM[at + len(patch) :]
    try:
        assert read_csr_untrusted(damaged) == (KEY.public_key(), CART)
    except CsrRefused:
        pass


def test_a_block_without_an_end_costs_no_more_than_its_length() -> None:
    """With the square of it this would not return within a day; a request of the size that is read stopped the service for 0.2 s."""
    assert csr._PEM.fullmatch(b"-----BEGIN CERTIFICATE REQUEST-----" + b"\n" * 1_000_000) is None
