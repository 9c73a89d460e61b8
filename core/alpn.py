"""What sidecars say to each other in ALPN: which protocol is inside the TLS connection.

The names are our own, so that a TLS server of an app behind a sidecar can never be mistaken for a sidecar, nor the other way round.
"""

from __future__ import annotations

HTTP1 = b"pillion-http/1.1"
HTTP2 = b"pillion-h2"
OPAQUE = b"pillion-tcp"
POLICY = b"pillion-policy/1"

BETWEEN_SIDECARS: tuple[bytes, ...] = (HTTP1, HTTP2, OPAQUE)
