"""What a workload asks to have certified: making a certificate signing request, and checking one from a stranger.

The check decides whether the request is exactly of the shape our sidecars send; it must not decide who may have the certificate
(`service` compares with the token). Called by `client` (make) and `service` (check). Pure.
"""

from __future__ import annotations

import binascii
import re

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AttributeOID, ExtensionOID, SignatureAlgorithmOID

from core.names import InvalidName, WorkloadId, parse_workload_id

# A request of ours is about 300 bytes and a SPIFFE URI at most 2048; the rest is head room. Bounds what a stranger makes us parse.
CSR_DER_MAX_BYTES = 4096
CSR_PEM_MAX_BYTES = 6144
_PEM = re.compile(rb"\s*-----BEGIN (?:NEW )?CERTIFICATE REQUEST-----\s([A-Za-z0-9+/=\s]+)-----END (?:NEW )?CERTIFICATE REQUEST-----\s*")


class CsrRefused(ValueError):
    """The request breaks a rule; the text says which and what was found."""


def make_csr(key: ec.EllipticCurvePrivateKey, identity: WorkloadId) -> bytes:
    """A PKCS#10 request in PEM for ``identity``: empty subject, one URI SAN (critical, RFC 5280 section 4.2.1.6), ECDSA-SHA256."""
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(san, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def read_csr_untrusted(der_or_pem: bytes) -> tuple[ec.EllipticCurvePublicKey, WorkloadId]:
    """The public key to certify, and for whom the request is; raises CsrRefused naming the first rule that is broken.

    The rules: PKCS#10 (RFC 2986) of bounded size and nothing beside it; a P-256 key; a valid ECDSA-SHA256 signature made with that
    key; no subject; no attribute but the extension request, no extension but one SAN, in it one name, the URI of a workload.
    """
    csr = _parsed(_der(der_or_pem))
    key = _checked_key(csr)
    if len(list(csr.subject)):
        raise CsrRefused("the request names a subject; a workload is named by its URI only, leave the subject empty")
    _check_attributes(csr)
    return key, _named(csr)


def _der(der_or_pem: bytes) -> bytes:
    if b"-----BEGIN" not in der_or_pem:
        der = der_or_pem
    else:
        if len(der_or_pem) > CSR_PEM_MAX_BYTES:
            raise CsrRefused(f"the request has {len(der_or_pem)} bytes of PEM, at most {CSR_PEM_MAX_BYTES} are read")
        block = _PEM.fullmatch(der_or_pem)
        if block is None:
            raise CsrRefused("expected exactly one PEM block CERTIFICATE REQUEST and nothing beside it")
        try:
            der = binascii.a2b_base64(b"".join(block[1].split()), strict_mode=True)
        except binascii.Error as error:
            raise CsrRefused(f"the PEM block is not base64: {error}") from None
    if len(der) > CSR_DER_MAX_BYTES:
        raise CsrRefused(f"the request has {len(der)} bytes, at most {CSR_DER_MAX_BYTES} are read")
    return der


def _parsed(der: bytes) -> x509.CertificateSigningRequest:
    # The library's parser raises an open set of exceptions (ValueError, UnsupportedAlgorithm, TypeError ...): all mean "not a request".
    try:
        return x509.load_der_x509_csr(der)
    except Exception as error:
        raise CsrRefused(f"not a PKCS#10 request: {_first_line(error)}") from None


def _checked_key(csr: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    try:
        key = csr.public_key()
    except Exception as error:
        raise CsrRefused(f"the key cannot be read: {_first_line(error)}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CsrRefused(f"the key is {type(key).__name__.removesuffix('PublicKey')}, expected ECDSA P-256")
    if not isinstance(key.curve, ec.SECP256R1):
        raise CsrRefused(f"the key is on the curve {key.curve.name}, expected P-256")
    if csr.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        raise CsrRefused(f"the signature algorithm is {csr.signature_algorithm_oid.dotted_string}, expected ECDSA with SHA-256")
    try:
        valid = csr.is_signature_valid
    except Exception as error:
        raise CsrRefused(f"the signature cannot be checked: {_first_line(error)}") from None
    if not valid:
        raise CsrRefused("the signature was not made with the key in the request")
    return key


def _check_attributes(csr: x509.CertificateSigningRequest) -> None:
    try:
        oids = [attribute.oid for attribute in csr.attributes]
    except Exception as error:
        raise CsrRefused(f"the attributes cannot be read: {_first_line(error)}") from None
    for oid in oids:
        if oid != _EXTENSION_REQUEST:
            raise CsrRefused(f"the request carries the attribute {_called(oid)}, expected the extension request only")
    if len(oids) != 1:
        raise CsrRefused(f"the request carries {len(oids)} extension requests, expected one")


def _named(csr: x509.CertificateSigningRequest) -> WorkloadId:
    try:
        extensions = list(csr.extensions)
    except Exception as error:
        raise CsrRefused(f"the extensions cannot be read: {_first_line(error)}") from None
    for extension in extensions:
        if extension.oid != ExtensionOID.SUBJECT_ALTERNATIVE_NAME:
            raise CsrRefused(f"the request asks for the extension {_called(extension.oid)}, expected subjectAltName only")
    if len(extensions) != 1:
        raise CsrRefused("the request has no subject alternative name, expected one URI")
    names = list(extensions[0].value)
    for name in names:
        if not isinstance(name, x509.UniformResourceIdentifier):
            kind = _KINDS.get(type(name), type(name).__name__)
            raise CsrRefused(f"the request asks for the {kind} {str(name.value)[:300]!r}, expected one URI only")
    if len(names) != 1:
        raise CsrRefused(f"the request asks for {len(names)} URIs, expected one")
    try:
        return parse_workload_id(names[0].value)
    except InvalidName as error:
        raise CsrRefused(str(error)) from None


_EXTENSION_REQUEST = x509.ObjectIdentifier("1.2.840.113549.1.9.14")  # RFC 2985 section 5.4.2
_KINDS: dict[type, str] = {
    x509.DNSName: "DNS name",
    x509.IPAddress: "IP address",
    x509.RFC822Name: "email address",
    x509.DirectoryName: "directory name",
    x509.RegisteredID: "registered id",
    x509.OtherName: "other name",
}
_ATTRIBUTES = {AttributeOID.CHALLENGE_PASSWORD: "challengePassword", AttributeOID.UNSTRUCTURED_NAME: "unstructuredName"}


def _called(oid: x509.ObjectIdentifier) -> str:
    return _ATTRIBUTES.get(oid) or getattr(oid, "_name", "") or oid.dotted_string


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
