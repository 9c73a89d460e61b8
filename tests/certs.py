"""Certificates for tests: a self-made authority and leaves with any name, lifetime or flaw a test asks for."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.credentials import Credentials
from core.names import WorkloadId, parse_workload_id


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@dataclass
class Authority:
    """A trust anchor that signs leaves directly."""

    name: str = "test anchor"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_now() - dt.timedelta(hours=1))
            .not_valid_after(_now() + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def bundle_pem(self) -> bytes:
        return _pem(self.certificate)

    def credentials(
        self,
        identity: WorkloadId | str,
        *,
        names: list[x509.GeneralName] | None = None,
        starts_in: float = -600,
        ends_in: float = 3600,
        bundle_pem: bytes | None = None,
        signs: bool = False,
    ) -> Credentials:
        """A certified key. names replaces the SAN; starts_in and ends_in are seconds from now; signs: as a CA's certificate."""
        who = parse_workload_id(identity) if isinstance(identity, str) else identity
        key = ec.generate_private_key(ec.SECP256R1())
        begin, end = _now() + dt.timedelta(seconds=starts_in), _now() + dt.timedelta(seconds=ends_in)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        )
        if signs:
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        sans = [x509.UniformResourceIdentifier(who.uri)] if names is None else names
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=True)
        leaf = builder.sign(self.key, hashes.SHA256())
        key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return Credentials(who, key_pem, _pem(leaf), bundle_pem or self.bundle_pem, begin.timestamp(), end.timestamp())
