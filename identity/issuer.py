"""The certificates of the mesh: a self-made root, an issuer below it, and the leaves that the issuer signs.

Decides every field of a certificate. It must not decide who gets one (`service`), nor read a clock or a file (`store`): times are
arguments, seconds since the epoch. Called by `authority`. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.key_usage import key_usage
from core.names import WorkloadId
from identity.bundle import IssuerRef
from identity.chains import InvalidBundle, anchor_above, certificate_id, read_bundle_untrusted

LEAF_LIFETIME_S = 24 * 3600.0  # Linkerd: issuanceLifetime
CLOCK_SKEW_S = 20.0  # Linkerd: clockSkewAllowance of the Helm chart
ROOT_LIFETIME_S = 10 * 365 * 86400.0
ISSUER_LIFETIME_S = 365 * 86400.0
_REMAINING_MIN_S = 5.0  # a leaf that ends sooner than this would be dead on arrival


class IssuerInvalid(ValueError):
    """Key and certificates that cannot issue; the text says what is wrong and what is expected."""


class IssuerExpired(Exception):
    """A link of the chain has run out: no leaf can be issued until the issuer is renewed."""


@dataclass(frozen=True)
class Pair:
    """A CA certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate alone."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """PKCS#8, unencrypted."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@dataclass(frozen=True)
class Issuer:
    """What signs leaves. chain: the issuer's certificate first, then intermediates, without the anchor; anchor: where it ends."""

    pair: Pair
    chain: tuple[x509.Certificate, ...]
    anchor: x509.Certificate

    @property
    def not_after(self) -> float:
        """When the earliest link of the chain, the anchor included, runs out."""
        return min(link.not_valid_after_utc.timestamp() for link in (self.pair.certificate, *self.chain, self.anchor))

    @property
    def ref(self) -> IssuerRef:
        """Its name in the trust state."""
        return IssuerRef(certificate_id(self.pair.certificate), certificate_id(self.anchor), self.not_after)


@dataclass(frozen=True)
class SignedLeaf:
    """A certified leaf. chain_pem: leaf first, then the issuer's chain without the anchor."""

    chain_pem: bytes
    not_before: float
    not_after: float


def make_root(trust_domain: str, now: float) -> Pair:
    """A fresh self-signed P-256 root that may have one CA below it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("root", key, trust_domain)
    builder = _ca_builder(name, name, key, key, now - CLOCK_SKEW_S, now + ROOT_LIFETIME_S, path_length=1)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def make_issuer(trust_domain: str, root: Pair, now: float) -> Issuer:
    """A fresh P-256 issuer below ``root`` that may sign leaves only."""
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + ISSUER_LIFETIME_S, root.certificate.not_valid_after_utc.timestamp())
    subject = _name("issuer", key, trust_domain)
    builder = _ca_builder(subject, root.certificate.subject, key, root.key, now - CLOCK_SKEW_S, until, path_length=0)
    certificate = builder.sign(root.key, hashes.SHA256())
    return Issuer(Pair(certificate, key), (certificate,), root.certificate)


def _name(what: str, key: ec.EllipticCurvePrivateKey, trust_domain: str) -> x509.Name:
    # One name a key: with equal names a verifier tries several, and takes a CA below another for self-issued, which no path length limits.
    key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Pillion {what} {key_id} {trust_domain}"[:64])])  # RFC 5280: at most 64


def _ca_builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    not_before: float,
    not_after: float,
    *,
    path_length: int,
) -> x509.CertificateBuilder:
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return (
        _builder(subject, issuer, key.public_key(), authority, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(key_usage(ca=True), critical=True)
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    authority: x509.AuthorityKeyIdentifier,
    not_before: float,
    not_after: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())  # 159 random bits
        .not_valid_before(_utc(not_before))
        .not_valid_after(_utc(not_after))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(authority, critical=False)
    )


def _authority_of(issuer: Pair) -> x509.AuthorityKeyIdentifier:
    """What a verifier finds the issuer by: the identifier in its own certificate, which not everybody makes by SHA-1 (Go: SHA-256)."""
    try:
        own = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _utc(at: float) -> datetime:
    # X.509 counts whole seconds: rounding down never outlives a clamp.
    return datetime.fromtimestamp(int(at), UTC)


def sign_leaf(issuer: Issuer, key: ec.EllipticCurvePublicKey, identity: WorkloadId, now: float, lifetime_s: float) -> SignedLeaf:
    """Certify ``key`` for ``identity``: now - skew to now + lifetime + skew, clamped to the chain. Raises IssuerExpired.

    The subject is empty, so the SAN is critical (RFC 5280 section 4.2.1.6). Usage: digitalSignature; server and client.
    """
    not_before = now - CLOCK_SKEW_S
    not_after = min(now + lifetime_s + CLOCK_SKEW_S, issuer.not_after)
    if not_after - now < _REMAINING_MIN_S:
        raise IssuerExpired(f"the issuer's chain ends at {_utc(issuer.not_after).isoformat()}; renew the issuer first")
    certificate = (
        _builder(x509.Name([]), issuer.pair.certificate.subject, key, _authority_of(issuer.pair), not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), critical=True)
        .sign(issuer.pair.key, hashes.SHA256())
    )
    chain = certificate.public_bytes(Encoding.PEM) + b"".join(link.public_bytes(Encoding.PEM) for link in issuer.chain)
    return SignedLeaf(chain, float(int(not_before)), float(int(not_after)))


def load_issuer(certificates_pem: bytes, key_pem: bytes, anchors_pem: bytes, now: float) -> tuple[Issuer, list[x509.Certificate]]:
    """An issuer given as PEM (kubernetes.io/tls: tls.crt, tls.key, ca.crt) and the anchors given with it.

    The issuer must be an ECDSA P-256 CA in force whose chain ends in one of the anchors; anchors may be P-256 or RSA of 2048 bits and
    more (Linkerd's rule). Raises IssuerInvalid.
    """
    try:
        chain, anchors = read_bundle_untrusted(certificates_pem), read_bundle_untrusted(anchors_pem)
    except InvalidBundle as error:
        raise IssuerInvalid(str(error)) from None
    try:
        key = load_pem_private_key(key_pem, None)
    except Exception as error:  # an open set; the text never repeats the key
        raise IssuerInvalid(f"the issuer's key cannot be read ({type(error).__name__}): expected unencrypted PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IssuerInvalid("the issuer's key is not ECDSA P-256")
    if chain[0].public_key() != key.public_key():
        raise IssuerInvalid("the issuer's key does not belong to the first certificate beside it")
    for link in (*chain, *anchors):
        _check_ca(link, now)
    anchor = anchor_above(chain, anchors)
    if anchor is None:
        raise IssuerInvalid("the issuer's chain does not end in any of the trust anchors given with it")
    return Issuer(Pair(chain[0], key), tuple(link for link in chain if link != anchor), anchor), anchors


def _check_ca(certificate: x509.Certificate, now: float) -> None:
    who = f"certificate {certificate_id(certificate)} ({certificate.subject.rfc4514_string() or 'no subject'})"
    try:
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    if not is_ca:
        raise IssuerInvalid(f"{who} is not a CA: basicConstraints CA:TRUE is missing")
    if not certificate.not_valid_before_utc.timestamp() - CLOCK_SKEW_S <= now < certificate.not_valid_after_utc.timestamp():
        raise IssuerInvalid(
            f"{who} is valid from {certificate.not_valid_before_utc.isoformat()} to {certificate.not_valid_after_utc.isoformat()}, not now"
        )
    key = certificate.public_key()
    strong = (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)) or (
        isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048
    )
    if not strong:
        raise IssuerInvalid(f"{who} has a key that is neither ECDSA P-256 nor RSA of at least 2048 bits")
