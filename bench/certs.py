"""Certificates for every contestant: one ECDSA P-256 authority, one leaf for each pod, valid for two days.

Each leaf carries the SPIFFE URI that Envoy and Pillion verify; the server's also the DNS name that HAProxy verifies. Pillion gets only
the authority and makes its own leaves through its identity service; the client's leaf is also that of loads that speak mutual TLS.
Called by `bench.__main__` once per run; nothing is kept afterwards.
"""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.key_usage import key_usage

TRUST_DOMAIN = "cluster.local"
NAMESPACE = "bench"


def spiffe(account: str) -> str:
    """The identity of a bench workload."""
    return f"spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{account}"


def dns_name(account: str) -> str:
    """The name that addresses a bench workload in SNI (core.names.WorkloadId.server_name)."""
    return f"{account}.{NAMESPACE}.sa.pillion.{TRUST_DOMAIN}"


@dataclass(frozen=True)
class Certificates:
    """Files of one run. ``<name>.pem`` is the chain, ``<name>.key`` the PKCS#8 key, ``<name>.both.pem`` both in one (HAProxy)."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca.key"

    def chain(self, account: str) -> Path:
        return self.folder / f"{account}.pem"

    def key(self, account: str) -> Path:
        return self.folder / f"{account}.key"

    def both(self, account: str) -> Path:
        return self.folder / f"{account}.both.pem"


def make(folder: Path, accounts: tuple[str, ...] = ("client", "server"), owner_uid: int | None = None) -> Certificates:
    """Write a fresh authority and a leaf for each account into ``folder``; keys are readable by ``owner_uid`` and root only."""
    folder.mkdir(parents=True, exist_ok=True)
    now = dt.datetime.now(dt.UTC)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench root")])
    authority = (
        _builder(subject, subject, authority_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    certificates = Certificates(folder)
    certificates.ca.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    secrets = [certificates.ca_key]
    certificates.ca_key.touch(0o600)
    certificates.ca_key.write_bytes(_pem(authority_key))
    for account in accounts:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = (
            _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, account)]), subject, key.public_key(), now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(_names(account)), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        chain = leaf.public_bytes(serialization.Encoding.PEM)
        certificates.chain(account).write_bytes(chain)
        for path, content in ((certificates.key(account), _pem(key)), (certificates.both(account), chain + _pem(key))):
            path.touch(0o600)
            path.write_bytes(content)
            secrets.append(path)
    if owner_uid is not None:
        for path in secrets:
            os.chown(path, owner_uid, -1)
    return certificates


def _names(account: str) -> list[x509.GeneralName]:
    # Pillion takes a peer with exactly one name only, and never sees the server's leaf.
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe(account))]
    return [*names, x509.DNSName(dns_name(account))] if account == "server" else names


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=2))
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
