"""The certificates and the service-account key of a throw-away Kubernetes."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Signer = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]

_API_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost")


def write(folder: Path, addresses: Sequence[str], service_address: str) -> None:
    """One pair ``<name>.crt``, ``<name>.key`` for each component; ``addresses`` are the nodes', the first one has the API server."""
    folder.mkdir(parents=True, exist_ok=True)
    ca = _issue(folder, "ca", "kubernetes")
    _issue(folder, "apiserver", "kube-apiserver", names=(*_API_NAMES, "127.0.0.1", service_address, addresses[0]), ca=ca)
    _issue(folder, "admin", "admin", group="system:masters", ca=ca)
    _issue(folder, "front-proxy", "front-proxy", ca=ca)
    for component in ("controller-manager", "scheduler", "proxy"):
        _issue(folder, "kube-proxy" if component == "proxy" else component, f"system:kube-{component}", ca=ca)
    for number, address in enumerate(addresses, 1):
        _issue(folder, f"node{number}", f"system:node:node{number}", group="system:nodes", names=(f"node{number}", address), ca=ca)
    accounts = ec.generate_private_key(ec.SECP256R1())
    _write_key(folder, "sa", accounts)
    public = accounts.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "sa.pub").write_bytes(public)


def _issue(folder: Path, file: str, name: str, *, group: str = "", names: Sequence[str] = (), ca: Signer | None = None) -> Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
    subject = x509.Name([*groups, x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca[1].subject if ca else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
    if ca:
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(usages, critical=False)
    certificate = builder.sign(ca[0] if ca else key, hashes.SHA256())
    _write_key(folder, file, key)
    (folder / f"{file}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return key, certificate


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write_key(folder: Path, file: str, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    path = folder / f"{file}.key"
    path.touch(mode=0o600)
    path.write_bytes(pem)


def self_signed(certificate: Path, key: Path) -> None:
    """A pair that nobody trusts, for an app that wants one."""
    _, made = _issue(certificate.parent, certificate.stem, "app", names=("app",))
    assert certificate.suffix == ".crt" and key == certificate.with_suffix(".key") and made
