"""What a certificate's key may be used for (RFC 5280 section 4.2.1.3): an authority's signs certificates, any other key signs handshakes.

Used by whoever makes certificates: the identity service, and the control plane for its webhooks. Pure.
"""

from __future__ import annotations

from cryptography import x509


def key_usage(*, ca: bool) -> x509.KeyUsage:
    """The extension for an authority's certificate, or for a leaf's."""
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
