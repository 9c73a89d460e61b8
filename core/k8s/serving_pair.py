"""The certificate a webhook serves with, and when it must be replaced. Pure: times are arguments, seconds since the epoch.

A pair is a leaf below a CA of its own whose key is thrown away once the leaf is signed: whoever reads the Secret can pose as this
webhook and mint nothing. ``ca_pem`` holds that CA and the earlier ones still in force, so that while replicas change over, the API server
trusts those that serve the earlier leaf as well as those that serve the new one. Called by `core.k8s.serving`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.key_usage import key_usage

LIFETIME_S = 90 * 86400.0
RENEW_LEFT_S = 30 * 86400.0  # a cluster that was switched off for three weeks comes back with a certificate that serves
SKEW_S = 300.0
_EARLIER_MAX = 3
_FILES = ("tls.crt", "tls.key", "ca.crt")  # the layout of kubernetes.io/tls, and cert-manager's


class InvalidPair(ValueError):
    """Certificate, key and CA that do not serve; the text says what is wrong."""


@dataclass(frozen=True)
class Pair:
    """certificate_pem: the leaf, then its chain. ca_pem: what a client must trust; empty when that is somebody else's care."""

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    ca_pem: bytes
    names: tuple[str, ...]
    not_before: float
    not_after: float

    def files(self) -> dict[str, bytes]:
        """As they stand in a Secret."""
        return dict(zip(_FILES, (self.certificate_pem, self.key_pem, self.ca_pem), strict=True))


@dataclass(frozen=True)
class Keep:
    """Serve with this."""

    pair: Pair


@dataclass(frozen=True)
class Replace:
    """Store this new pair, then serve with it. why: for the log."""

    pair: Pair
    why: str


def plan(found: Mapping[str, bytes], names: Sequence[str], now: float) -> Keep | Replace:
    """What to do about the files of a Secret, which may be missing or wrong."""
    earlier: bytes = found.get("ca.crt", b"")
    try:
        pair = read_pair(found)
        why = _why_replace(pair, names, now)
    except InvalidPair as error:
        why = str(error)
        pair = None
    if pair is not None and not why:
        return Keep(pair)
    return Replace(make_pair(names, now, earlier), why)


def _why_replace(pair: Pair, names: Sequence[str], now: float) -> str:
    if why := unfit(pair, names, now):
        return why
    return f"the certificate ends at {_text(pair.not_after)}" if pair.not_after - now < RENEW_LEFT_S else ""


def unfit(pair: Pair, names: Sequence[str], now: float) -> str:
    """Why the API server would not believe this pair, whoever made it; empty when it would."""
    if missing := sorted(set(names) - set(pair.names)):
        return f"the certificate is not for {missing[0]}"
    if not pair.ca_pem:
        return "ca.crt is missing"
    return "" if pair.not_before <= now else f"the certificate begins at {_text(pair.not_before)} only"


def read_pair(files: Mapping[str, bytes]) -> Pair:
    """A pair from tls.crt, tls.key and, if there, ca.crt; raises InvalidPair."""
    for name in _FILES[:2]:
        if not files.get(name, b"").strip():
            raise InvalidPair(f"{name} is missing")
    try:
        chain = x509.load_pem_x509_certificates(files["tls.crt"])
        key = load_pem_private_key(files["tls.key"], None)
    except Exception as error:  # an open set; the text never repeats the key
        raise InvalidPair(f"tls.crt or tls.key cannot be read ({type(error).__name__}): expected unencrypted PEM") from None
    leaf = chain[0]
    if _der(leaf.public_key()) != _der(key.public_key()):
        raise InvalidPair("tls.key does not belong to the first certificate of tls.crt")
    ca_pem = files.get("ca.crt", b"")
    if ca_pem.strip() and not _issued_by_any(chain[-1], ca_pem):
        raise InvalidPair("tls.crt was not issued by any certificate of ca.crt")
    try:
        names = tuple(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName))
    except (x509.ExtensionNotFound, ValueError):
        names = ()
    return Pair(
        files["tls.crt"], files["tls.key"], ca_pem, names, leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    )


def _issued_by_any(certificate: x509.Certificate, ca_pem: bytes) -> bool:
    try:
        authorities = x509.load_pem_x509_certificates(ca_pem)
    except ValueError:
        return False
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return True
    return False


def _der(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined,no-any-return]  # any public key


def make_pair(names: Sequence[str], now: float, earlier_ca_pem: bytes = b"", lifetime_s: float = LIFETIME_S) -> Pair:
    """A new leaf for DNS ``names`` below a new CA; keeps the earlier CAs that are still in force in ``ca_pem``."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    not_before, not_after = int(now - SKEW_S), int(now + lifetime_s)
    serial = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()).digest.hex()[:16]
    # a name of its own: with equal names a verifier may try the wrong CA first, and some stop there
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Pillion webhook {serial}")])
    ca = (
        _builder(ca_name, ca_name, ca_key, ca_key, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(ca=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        _builder(x509.Name([]), ca_name, key, ca_key, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    ca_pem = with_earlier(ca.public_bytes(Encoding.PEM), earlier_ca_pem, now)
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Pair(leaf.public_bytes(Encoding.PEM), key_pem, ca_pem, tuple(names), float(not_before), float(not_after))


def with_earlier(ca_pem: bytes, earlier_ca_pem: bytes, now: float) -> bytes:
    """``ca_pem`` and after it those of the earlier ones that are still in force, a bounded number of them."""
    try:
        earlier = x509.load_pem_x509_certificates(earlier_ca_pem) if earlier_ca_pem.strip() else []
    except ValueError:
        earlier = []
    in_force = [ca.public_bytes(Encoding.PEM) for ca in earlier if ca.not_valid_after_utc.timestamp() > now][:_EARLIER_MAX]
    return b"".join([ca_pem.rstrip() + b"\n", *in_force])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    not_before: int,
    not_after: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(not_before, UTC))
        .not_valid_after(datetime.fromtimestamp(not_after, UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )


def _text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def trusts(bundle_pem: bytes, ca_pem: bytes) -> bool:
    """Are all certificates of ``ca_pem`` in ``bundle_pem``? Order and white space do not matter."""
    try:
        have = {ca.public_bytes(Encoding.DER) for ca in x509.load_pem_x509_certificates(bundle_pem)}
        return {ca.public_bytes(Encoding.DER) for ca in x509.load_pem_x509_certificates(ca_pem)} <= have
    except ValueError:
        return False
