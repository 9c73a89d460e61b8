"""The access log: which finished exchanges are written, and as which fields. The schema is documented in docs/access-log.md.

Pure: makes entries; the caller hands them to its logger. Query strings are never part of an entry, because they carry tokens; neither
are header values but the two that are meant for logs (user agent, trace id). Called by record.py.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from core.refs import Ref

_TEXT_BYTES_MAX = 1024

EVENT = "access"
"""The event name of every entry."""

TRACE_HEADERS: tuple[bytes, ...] = (b"traceparent", b"x-b3-traceid", b"x-request-id", b"x-amzn-trace-id")
"""Where a trace id is looked for, in this order."""


class Mode(enum.Enum):
    """The setting PILLION_ACCESS_LOG."""

    OFF = "off"
    ERRORS = "errors"
    ALL = "all"


def wanted(mode: Mode, status: int, cause: str | None, grpc_status: int = -1) -> bool:
    """Whether an exchange is written. ``errors``: the proxy refused or failed it, or the app answered 5xx, a gRPC status that is not OK,
    or not at all."""
    if mode is Mode.ALL:
        return True
    return mode is Mode.ERRORS and (cause is not None or status >= 500 or status == 0 or grpc_status > 0)


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished request and its answer, or a finished opaque connection (then without method, target, authority and status).

    client_id: verified SPIFFE URI, empty without one. target: origin-form as received. status: what the client saw, 0 if nothing.
    request_bytes, response_bytes: bodies, None when not counted. server, route, authorization: what decided. reason: why it was
    denied, a sentence. cause: ``Cause.value`` when the proxy refused or failed it.
    """

    direction: str
    protocol: str
    client_addr: str
    client_id: str
    server_addr: str
    duration_ms: float
    method: bytes = b""
    target: bytes = b""
    authority: bytes = b""
    status: int = 0
    grpc_status: int | None = None
    request_bytes: int | None = None
    response_bytes: int | None = None
    server: Ref | None = None
    route: Ref | None = None
    authorization: Ref | None = None
    audit: bool = False
    reason: str = ""
    cause: str | None = None
    user_agent: bytes | None = None
    trace_id: bytes | None = None


def fields_of(entry: Entry) -> dict[str, str | int | float | bool]:
    """The fields of an entry, in the documented order; what is empty or unknown is left out."""
    fields: dict[str, str | int | float | bool | None] = {
        "direction": entry.direction,
        "protocol": entry.protocol,
        "client_addr": entry.client_addr,
        "client_id": entry.client_id or None,
        "server_addr": entry.server_addr,
        "method": _text(entry.method),
        "path": _text(entry.target.partition(b"?")[0]),
        "host": _text(entry.authority),
        "status": entry.status if entry.method else None,
        "grpc_status": entry.grpc_status,
        "request_bytes": entry.request_bytes,
        "response_bytes": entry.response_bytes,
        "duration_ms": round(entry.duration_ms, 3),
        "server": _ref(entry.server),
        "route": _ref(entry.route),
        "authorization": _ref(entry.authorization),
        "audit": entry.audit or None,
        "error": entry.cause,
        "reason": entry.reason or None,
        "user_agent": _text(entry.user_agent),
        "trace_id": _text(entry.trace_id),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _ref(ref: Ref | None) -> str | None:
    return None if ref is None else str(ref)


def _text(value: bytes | None) -> str | None:
    """Bounded; bytes outside ASCII stay visible as Latin-1, control characters are the logger's business."""
    if not value:
        return None
    return value[:_TEXT_BYTES_MAX].decode("latin-1") + ("..." if len(value) > _TEXT_BYTES_MAX else "")
