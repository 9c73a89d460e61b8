"""Whose bearer token is this: the interface, and its answer from the Kubernetes API server (TokenReview).

Decides which workload and pod a token stands for; it must not decide what they get (`service`). The local runner's tokens are in
`local_tokens`. A token is never logged, nor repeated in an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec
import trio

from core.k8s.api import Api
from core.k8s.errors import ApiError, Forbidden, NotFound, Unauthorized
from core.names import InvalidName, WorkloadId
from identity.wire import AUDIENCE, TOKEN_MAX_BYTES

_POD_NAME = "authentication.kubernetes.io/pod-name"  # Kubernetes: extra of a token bound to a pod
_POD_UID = "authentication.kubernetes.io/pod-uid"
_REVIEW_TIMEOUT_S = 5.0
_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
_POD_FIELD_MAX = 253


class TokenRefused(Exception):
    """The token does not prove who the caller is; the text says why, without the token."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ReviewUnavailable(Exception):
    """Nobody could be asked about the token: the caller may try again."""


@dataclass(frozen=True)
class Subject:
    """Who a token stands for: a workload, and the one pod the token is bound to. pod_uid names the instance in the ledger."""

    identity: WorkloadId
    pod_name: str
    pod_uid: str

    @property
    def pod(self) -> str:
        """``namespace/name``"""
        return f"{self.identity.namespace}/{self.pod_name}"


class TokenReviewer(Protocol):
    """Knows whose a token is."""

    async def review(self, token: str) -> Subject:
        """Raises TokenRefused, or ReviewUnavailable."""
        ...


def subject_of(trust_domain: str, username: str, pod_name: object, pod_uid: object) -> Subject:
    """The subject from a user name ``system:serviceaccount:<ns>:<sa>`` and the pod a token is bound to; raises TokenRefused."""
    parts = username.split(":")
    if len(parts) != 4 or parts[:2] != ["system", "serviceaccount"]:
        raise TokenRefused(f"the token belongs to {username[:300]!r}, not to a service account")
    try:
        identity = WorkloadId.checked(trust_domain, parts[2], parts[3])
    except InvalidName as error:
        raise TokenRefused(f"the token's service account is not a valid name: {error}") from None
    for what, value in (("name", pod_name), ("uid", pod_uid)):
        if not isinstance(value, str) or not 1 <= len(value) <= _POD_FIELD_MAX or not value.isascii() or not value.isprintable():
            raise TokenRefused(f"the token is not bound to a pod (no pod {what}); mount it as a projected service account token")
    return Subject(identity, str(pod_name), str(pod_uid))


class _User(msgspec.Struct):
    username: str = ""
    extra: dict[str, list[str]] = {}


class _Status(msgspec.Struct):
    authenticated: bool = False
    user: _User = msgspec.field(default_factory=_User)
    audiences: list[str] = []
    error: str = ""


class _Review(msgspec.Struct):
    status: _Status = msgspec.field(default_factory=_Status)


class KubernetesReviewer:
    """Asks the API server (authentication.k8s.io/v1 TokenReview) with our own audience; there is no second try without audience."""

    def __init__(self, api: Api, trust_domain: str, audience: str = AUDIENCE) -> None:
        self._api = api
        self._trust_domain = trust_domain
        self._audience = audience

    async def review(self, token: str) -> Subject:
        """Raises TokenRefused, or ReviewUnavailable when the API server does not answer."""
        if not 1 <= len(token) <= TOKEN_MAX_BYTES:
            raise TokenRefused("the token is empty or too long")
        try:
            with trio.fail_after(_REVIEW_TIMEOUT_S):
                answer = await self._api.post(_PATH, self._question(token))
        except (Forbidden, Unauthorized, NotFound) as error:
            raise ReviewUnavailable(f"{error.message}; may this service account create tokenreviews?") from None
        except ApiError as error:
            raise ReviewUnavailable(error.message) from None
        except trio.TooSlowError:
            raise ReviewUnavailable(f"the API server did not answer within {_REVIEW_TIMEOUT_S:g} s") from None
        try:
            review = msgspec.convert(answer, type=_Review).status
        except msgspec.ValidationError as error:
            raise ReviewUnavailable(f"the API server's answer is not a TokenReview: {error}") from None
        return self._subject(review)

    def _subject(self, review: _Status) -> Subject:
        if not review.authenticated:
            raise TokenRefused(f"the API server does not accept the token: {review.error[:300] or 'not authenticated'}")
        if self._audience not in review.audiences:
            raise TokenRefused(f"the token is not meant for {self._audience}")
        extra = review.user.extra
        return subject_of(self._trust_domain, review.user.username, _only(extra.get(_POD_NAME)), _only(extra.get(_POD_UID)))

    def _question(self, token: str) -> dict[str, object]:
        spec = {"token": token, "audiences": [self._audience]}
        return {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}


def _only(values: list[str] | None) -> str | None:
    return values[0] if values and len(values) == 1 else None
