"""AdmissionReview (admission.k8s.io/v1), both ways: what the API server asks a webhook, and what it is told. Pure.

Decides nothing about the object inside. Called by the webhooks of injector and policy controller.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

API_VERSION = "admission.k8s.io/v1"
BODY_MAX_BYTES = 4 << 20  # kube-apiserver takes objects of at most 3 MiB; a review of a creation holds it once, and a little more
_SENTENCE_MAX = 1000  # of a message or warning: they end up in events and terminals
_WARNINGS_MAX = 8

_Short = Annotated[str, msgspec.Meta(max_length=512)]
_Namespace = Annotated[str, msgspec.Meta(max_length=63, pattern=r"\A([a-z0-9]([-a-z0-9]*[a-z0-9])?)?\Z")]  # it becomes part of a path


class InvalidReview(ValueError):
    """Bytes that are no AdmissionReview request; the text says what was expected."""


class _Struct(msgspec.Struct, frozen=True, rename="camel"):
    pass


class Kind(_Struct, frozen=True):
    """AdmissionRequest.kind."""

    group: _Short = ""
    version: _Short = ""
    kind: _Short = ""


class Request(_Struct, frozen=True):
    """AdmissionRequest: what somebody wants to do. object: None for a deletion. dry_run: nothing will be stored, so nothing may be done."""

    uid: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
    kind: Kind = Kind()
    operation: _Short = ""
    namespace: _Namespace = ""
    name: _Short = ""
    object: dict[str, Any] | None = None
    old_object: dict[str, Any] | None = None
    dry_run: bool | None = None


class _Review(_Struct, frozen=True):
    api_version: _Short
    kind: _Short
    request: Request


_decode = msgspec.json.Decoder(_Review).decode


def read_review_untrusted(body: bytes) -> Request:
    """The request of an AdmissionReview; raises InvalidReview for everything else."""
    if len(body) > BODY_MAX_BYTES:
        raise InvalidReview(f"expected at most {BODY_MAX_BYTES} bytes, found {len(body)}")
    try:
        review = _decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidReview(f"expected an AdmissionReview: {str(error)[:300]}") from None
    if (review.api_version, review.kind) != (API_VERSION, "AdmissionReview"):
        raise InvalidReview(f"expected {API_VERSION} AdmissionReview, found {review.api_version[:80]} {review.kind[:80]}")
    return review.request


def allowed(
    request: Request,
    patch: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] = (),
    audit: Mapping[str, str] | None = None,
) -> bytes:
    """Yes, with a JSON patch, sentences for the caller's terminal, and audit annotations (keys without the webhook's name)."""
    response: dict[str, Any] = {"uid": request.uid, "allowed": True}
    if patch:
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(msgspec.json.encode(patch)).decode()
    return _answer(response, warnings, audit)


def refused(
    request: Request, sentence: str, *, code: int = 422, warnings: Sequence[str] = (), audit: Mapping[str, str] | None = None
) -> bytes:
    """No. sentence: what the caller sees behind ``admission webhook "..." denied the request:``."""
    status = {"code": code, "reason": "Invalid" if code == 422 else "Forbidden", "message": _cut(sentence)}
    return _answer({"uid": request.uid, "allowed": False, "status": status}, warnings, audit)


def _answer(response: dict[str, Any], warnings: Sequence[str], audit: Mapping[str, str] | None) -> bytes:
    if warnings:
        response["warnings"] = [_cut(warning) for warning in warnings[:_WARNINGS_MAX]]
    if audit:
        response["auditAnnotations"] = dict(audit)
    return msgspec.json.encode({"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response})


def _cut(sentence: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in sentence)
    return printable if len(printable) <= _SENTENCE_MAX else printable[:_SENTENCE_MAX] + "..."
