"""What the API server refuses with, as exceptions: a type for each case that a caller treats differently. Pure.

Source: Status objects (apimachinery meta/v1 Status) and HTTP status codes of the Kubernetes API conventions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

_read_status = msgspec.json.Decoder(dict[str, Any]).decode
_MESSAGE_MAX = 1000


class ApiError(Exception):
    """status: the HTTP code, 0 when there was no answer. reason: the Status' CamelCase word. message: its sentence."""

    def __init__(self, message: str, status: int = 0, reason: str = "", details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.reason = reason
        self.details: Mapping[str, Any] = details or {}


class BadRequest(ApiError):
    """400: the request itself is wrong."""


class Unauthorized(ApiError):
    """401: the server does not know who we are."""


class Forbidden(ApiError):
    """403: we may not do that; the message names verb and resource. Also what an admission webhook refuses."""


class NotFound(ApiError):
    """404: no such object, or no such kind (then ``unknown_kind``)."""

    @property
    def unknown_kind(self) -> bool:
        """The path itself does not exist: its CustomResourceDefinition is not installed."""
        return "name" not in self.details and self.reason in ("", "NotFound") and "kind" not in self.details


class Conflict(ApiError):
    """409: the object has changed since it was read; read again. See AlreadyExists."""


class AlreadyExists(Conflict):
    """409: an object of that name is there already."""


class Gone(ApiError):
    """410: that resourceVersion (or page) is too old; list again."""


class Invalid(ApiError):
    """422: the object is not valid."""


class Unavailable(ApiError):
    """No answer, or one that means: later (429, 5xx). retry_after_s: what the server asked for, 0.0 when it did not say."""

    def __init__(self, message: str, status: int = 0, reason: str = "", details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, status, reason, details)
        self.retry_after_s = 0.0


_BY_STATUS: Mapping[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: Unavailable,
}


def error_of(status: int, body: bytes, doing: str, headers: Mapping[str, str]) -> ApiError:
    """The exception for a response that is none of 2xx. doing: ``GET /api/v1/pods``, for the message. Any bytes give an error."""
    try:
        read = _read_status(body)
    except (msgspec.DecodeError, RecursionError):
        read = {}
    reason, details = read.get("reason"), read.get("details")
    reason = reason if isinstance(reason, str) else ""
    details = details if isinstance(details, dict) else {}
    message = read.get("message")
    said = message if isinstance(message, str) and message else body[:200].decode("utf-8", "replace").strip() or f"HTTP {status}"
    type_ = _BY_STATUS.get(status, Unavailable if status >= 500 else ApiError)
    if reason == "AlreadyExists":
        type_ = AlreadyExists
    if reason == "Expired":
        type_ = Gone
    error = type_(f"{doing}: {said[:_MESSAGE_MAX]}", status, reason, details)
    if isinstance(error, Unavailable):
        error.retry_after_s = _seconds(headers.get("retry-after", "")) or _seconds(str(details.get("retryAfterSeconds", "")))
    return error


def _seconds(text: str) -> float:
    return min(float(text), 300.0) if text.isascii() and text.isdigit() and len(text) <= 6 else 0.0
