"""The JSON of the identity service, for both ends. Pure.

``POST /v1/certify`` takes `CertifyRequest`, answers `Certified`. ``GET /v1/bundle?generation=N&issuer=ID`` answers `Bundle` as soon as
the trust bundle or the issuer differs from what the caller names, 204 when nothing did within `POLL_S`. ``GET /v1/ledger``, for other
replicas of the identity service only, answers `Known`. All need ``Authorization: Bearer <token>``. Everything else is answered with
`Refused`.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from identity.ledger import Holding

T = TypeVar("T")

POLL_S = 30.0
BODY_MAX_BYTES = 16 * 1024
ANSWER_MAX_BYTES = 128 * 1024
TOKEN_MAX_BYTES = 8 * 1024
AUDIENCE = "identity.pillion.dev"


class CertifyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """csr: PEM."""

    csr: str


class Certified(msgspec.Struct):
    """chain: PEM, leaf first. bundle: PEM of every anchor. issuer: its id. Times: seconds since the epoch."""

    chain: str
    bundle: str
    generation: int
    issuer: str
    not_before: float
    not_after: float


class Bundle(msgspec.Struct):
    """What is in force now."""

    bundle: str
    generation: int
    issuer: str


class Known(msgspec.Struct):
    """What one replica knows. generation, issuer: in force there. up_s: since it began to serve."""

    generation: int
    issuer: str
    up_s: float
    holdings: list[Holding]


class Refused(msgspec.Struct):
    """error: one sentence naming what was wrong."""

    error: str


class WireError(ValueError):
    """Bytes that are not the expected message."""


def certify_request_untrusted(data: bytes) -> CertifyRequest:
    """Raises WireError."""
    return _decode(data, CertifyRequest)


def certified_untrusted(data: bytes) -> Certified:
    """Raises WireError."""
    return _decode(data, Certified)


def bundle_untrusted(data: bytes) -> Bundle:
    """Raises WireError."""
    return _decode(data, Bundle)


def known_untrusted(data: bytes) -> Known:
    """Raises WireError."""
    return _decode(data, Known)


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a {kind.__name__}: {error}") from None
