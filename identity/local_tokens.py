"""Tokens of the local runner: short-lived ES256 JWTs of the shape Kubernetes gives to pods, and their review.

The runner holds the private key (`LocalSigner`), the identity service the public one (`LocalReviewer`). Must not be imported by the
sidecar: PyJWT is not part of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from identity.tokens import Subject, TokenRefused, subject_of
from identity.wire import AUDIENCE, TOKEN_MAX_BYTES

ISSUER = "https://local.pillion.dev"
TOKEN_LIFETIME_S = 600.0
_LEEWAY_S = 5.0


class LocalSigner:
    """Issues tokens for the pods of one local mesh."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> LocalSigner:
        """With a fresh P-256 key."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, path: Path) -> LocalSigner:
        """The key that `save` wrote; raises PermissionError when others may read it, ValueError when it is no P-256 key."""
        if path.stat().st_mode & 0o077:
            raise PermissionError(f"{path} may be read by others than its owner: chmod 600 {path}")
        key = load_pem_private_key(path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError(f"{path} holds no P-256 key")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the private key, 0600 from its first byte on; refuses to replace a file."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    @property
    def public_pem(self) -> bytes:
        """What `LocalReviewer` needs."""
        return self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def issue(
        self,
        namespace: str,
        service_account: str,
        pod_name: str,
        pod_uid: str,
        now: float,
        *,
        lifetime_s: float = TOKEN_LIFETIME_S,
        audience: str = AUDIENCE,
    ) -> str:
        """A token bound to one pod. now: seconds since the epoch."""
        claims = {
            "iss": ISSUER,
            "aud": [audience],
            "sub": f"system:serviceaccount:{namespace}:{service_account}",
            "iat": int(now),
            "nbf": int(now),
            "exp": int(now + lifetime_s),
            "kubernetes.io": {
                "namespace": namespace,
                "pod": {"name": pod_name, "uid": pod_uid},
                "serviceaccount": {"name": service_account},
            },
        }
        return jwt.encode(claims, self._key, algorithm="ES256")


class LocalReviewer:
    """Accepts exactly what `LocalSigner` issues: ES256 with this key, our issuer and audience, unexpired, bound to a pod."""

    def __init__(self, public_pem: bytes, trust_domain: str, audience: str = AUDIENCE) -> None:
        """Raises ValueError when the PEM is no P-256 public key."""
        key = load_pem_public_key(public_pem)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("the token key is no P-256 public key")
        self._key = key
        self._trust_domain = trust_domain
        self._audience = audience

    async def review(self, token: str) -> Subject:
        """Raises TokenRefused."""
        return self.review_untrusted(token)

    def review_untrusted(self, token: str) -> Subject:
        """As `review`, without waiting."""
        if not 1 <= len(token) <= TOKEN_MAX_BYTES:
            raise TokenRefused("the token is empty or too long")
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=["ES256"],
                audience=self._audience,
                issuer=ISSUER,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "iat", "aud", "sub", "iss"]},
            )
        except jwt.ExpiredSignatureError:
            raise TokenRefused("the token has expired") from None
        except jwt.InvalidAudienceError:
            raise TokenRefused(f"the token is not meant for {self._audience}") from None
        except jwt.InvalidSignatureError:
            raise TokenRefused("the token is not signed with the key of this mesh") from None
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise TokenRefused(f"not a token of this mesh: {type(error).__name__}") from None
        return self._subject(claims)

    def _subject(self, claims: dict[str, Any]) -> Subject:
        bound = claims.get("kubernetes.io")
        pod = bound.get("pod") if isinstance(bound, dict) else None
        account = bound.get("serviceaccount") if isinstance(bound, dict) else None
        if not isinstance(bound, dict) or not isinstance(pod, dict) or not isinstance(account, dict):
            raise TokenRefused("the token is not bound to a pod")
        subject = subject_of(self._trust_domain, str(claims["sub"]), pod.get("name"), pod.get("uid"))
        if (bound.get("namespace"), account.get("name")) != (subject.identity.namespace, subject.identity.service_account):
            raise TokenRefused("the token's claims disagree about namespace or service account")
        return subject
