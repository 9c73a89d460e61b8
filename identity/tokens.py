"""Whose bearer token is this: the interface, and its answer from the Kubernetes API server (TokenReview).

Decides which workload and pod a token stands for; it must not decide what they get (`service`). The local runner's tokens are in
`local_tokens`. A token is never logged, nor repeated in an error.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import h11
import msgspec
import trio

from core.names import InvalidName, WorkloadId
from identity.exchange import ExchangeFailed, exchange
from identity.wire import AUDIENCE, TOKEN_MAX_BYTES

_POD_NAME = "authentication.kubernetes.io/pod-name"  # Kubernetes: extra of a token bound to a pod
_POD_UID = "authentication.kubernetes.io/pod-uid"
_REVIEW_TIMEOUT_S = 5.0
_ANSWER_MAX_BYTES = 256 * 1024
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


@dataclass(frozen=True)
class ApiServer:
    """How to reach the Kubernetes API server. token_file: our own service account token, read anew for each call."""

    host: str
    port: int
    token_file: Path
    ca_file: Path
    tls: ssl.SSLContext = field(repr=False)

    @classmethod
    def at(cls, host: str, port: int, token_file: Path, ca_file: Path) -> ApiServer:
        """Trusts ``ca_file`` only; raises OSError when it cannot be read."""
        tls = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(ca_file))
        tls.minimum_version = ssl.TLSVersion.TLSv1_2  # what API servers in service still offer
        return cls(host, port, token_file, ca_file, tls)


class KubernetesReviewer:
    """Asks the API server (authentication.k8s.io/v1 TokenReview) with our own audience; there is no second try without audience."""

    def __init__(self, api: ApiServer, trust_domain: str, audience: str = AUDIENCE) -> None:
        self._api = api
        self._trust_domain = trust_domain
        self._audience = audience

    async def review(self, token: str) -> Subject:
        """Raises TokenRefused, or ReviewUnavailable when the API server does not answer."""
        if not 1 <= len(token) <= TOKEN_MAX_BYTES:
            raise TokenRefused("the token is empty or too long")
        try:
            with trio.fail_after(_REVIEW_TIMEOUT_S):
                status, answer = await self._ask(token)
        except (OSError, ssl.SSLError, trio.BrokenResourceError, trio.TooSlowError, ExchangeFailed) as error:
            raise ReviewUnavailable(f"the API server at {self._api.host}:{self._api.port} did not answer: {error!r}") from None
        if status not in (200, 201):
            raise ReviewUnavailable(f"the API server answered the TokenReview with {status}; may this service account create tokenreviews?")
        try:
            review = msgspec.json.decode(answer, type=_Review).status
        except msgspec.DecodeError as error:
            raise ReviewUnavailable(f"the API server's answer is not a TokenReview: {error}") from None
        return self._subject(review)

    def _subject(self, review: _Status) -> Subject:
        if not review.authenticated:
            raise TokenRefused(f"the API server does not accept the token: {review.error[:300] or 'not authenticated'}")
        if self._audience not in review.audiences:
            raise TokenRefused(f"the token is not meant for {self._audience}")
        extra = review.user.extra
        return subject_of(self._trust_domain, review.user.username, _only(extra.get(_POD_NAME)), _only(extra.get(_POD_UID)))

    async def _ask(self, token: str) -> tuple[int, bytes]:
        own_token = (await trio.Path(self._api.token_file).read_text("ascii")).strip()
        body = msgspec.json.encode(
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "spec": {"token": token, "audiences": [self._audience]},
            }
        )
        request = h11.Request(
            method="POST",
            target="/apis/authentication.k8s.io/v1/tokenreviews",
            headers=[
                ("host", f"{self._api.host}:{self._api.port}"),
                ("authorization", f"Bearer {own_token}"),
                ("content-type", "application/json"),
                ("accept", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ],
        )
        transport = await trio.open_tcp_stream(self._api.host, self._api.port)
        stream = trio.SSLStream(transport, self._api.tls, server_hostname=self._api.host, https_compatible=True)
        async with stream:
            return await exchange(stream, h11.Connection(h11.CLIENT), request, body, _ANSWER_MAX_BYTES)


def _only(values: list[str] | None) -> str | None:
    return values[0] if values and len(values) == 1 else None
