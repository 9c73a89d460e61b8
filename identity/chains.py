"""Trust bundles and certificate chains as others hand them to us, in PEM: read within bounds, and compared link by link. Pure.

Decides whether a chain fits, not who may have it. Called by the sidecar's `client` for what the service sends, and by the service for what
operators keep (`issuer`, `authority`).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from core.names import WorkloadId

BUNDLE_PEM_MAX_BYTES = 64 * 1024
ANCHORS_MAX = 32
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----")


class InvalidBundle(ValueError):
    """PEM that is not a trust bundle or a chain; the text says why."""


def certificate_id(certificate: x509.Certificate) -> str:
    """The name of an anchor or issuer in reports: the first 16 hex digits of the SHA-256 of its DER."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()[:16]


def read_bundle_untrusted(pem: bytes) -> list[x509.Certificate]:
    """1 to 32 certificates and nothing else in PEM; raises InvalidBundle."""
    if len(pem) > BUNDLE_PEM_MAX_BYTES:
        raise InvalidBundle(f"{len(pem)} bytes of PEM, at most {BUNDLE_PEM_MAX_BYTES} are read")
    kinds = _BLOCK.findall(pem)
    if not 1 <= len(kinds) <= ANCHORS_MAX or any(kind != b"CERTIFICATE" for kind in kinds):
        raise InvalidBundle(f"expected 1 to {ANCHORS_MAX} PEM blocks CERTIFICATE and no other, found {len(kinds)} block(s)")
    try:
        return x509.load_pem_x509_certificates(pem)
    except Exception as error:  # an open set of exceptions, all of which mean the same
        raise InvalidBundle(f"a certificate cannot be read: {(str(error).splitlines() or ['?'])[0][:200]}") from None


def anchor_above(chain: Sequence[x509.Certificate], anchors: Iterable[x509.Certificate]) -> x509.Certificate | None:
    """The anchor that the last link of ``chain`` is signed by (or is itself), None when a link does not fit the next."""
    for below, above in itertools.pairwise(chain):
        if not _signed_by(below, above):
            return None
    return next((anchor for anchor in anchors if chain[-1] == anchor or _signed_by(chain[-1], anchor)), None)


def _signed_by(below: x509.Certificate, above: x509.Certificate) -> bool:
    try:
        below.verify_directly_issued_by(above)
    except Exception:  # wrong name, key type or signature: all mean "not by this one"
        return False
    return True


def leaf_unfit(chain_pem: bytes, bundle_pem: bytes, key: ec.EllipticCurvePublicKey, identity: WorkloadId) -> str:
    """Why a chain that the service handed us is of no use to the holder of ``key``; an empty text when it is fine.

    Raises InvalidBundle when either PEM cannot be read.
    """
    chain, anchors = read_bundle_untrusted(chain_pem), read_bundle_untrusted(bundle_pem)
    try:
        names = list(chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        same_key = chain[0].public_key() == key
    except Exception as error:  # an open set of exceptions of the parser
        return f"the leaf cannot be read ({type(error).__name__})"
    if not same_key:
        return "the leaf is for another key"
    if [name.value for name in names] != [identity.uri]:
        return f"the leaf does not name {identity.uri}"
    return "" if anchor_above(chain, anchors) else "the leaf's chain does not end in the bundle that came with it"
