"""From the cause of a failure to what the client sees, the metric label and the log level: the only such table.

Everything that refuses, denies or fails raises or passes a `Cause`; protocol engines ask here what to answer. Pure.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple


class Grpc:
    """gRPC status codes, those that a proxy gives (grpc/doc/statuscodes.md)."""

    CANCELLED: Final = 1
    DEADLINE_EXCEEDED: Final = 4
    PERMISSION_DENIED: Final = 7
    RESOURCE_EXHAUSTED: Final = 8
    ABORTED: Final = 10
    UNIMPLEMENTED: Final = 12
    INTERNAL: Final = 13
    UNAVAILABLE: Final = 14


class Effect(NamedTuple):
    """status: HTTP status. grpc: one of Grpc (HTTP status is then 200). level: log level.

    keep: the client's connection may live on.
    """

    status: int
    grpc: int
    level: str
    keep: bool


class Cause(enum.Enum):
    """Why a request or connection did not get through. The value is the metric label and the ``pillion-proxy-error`` text."""

    BAD_REQUEST = "bad-request"  # the client broke a rule of the protocol, or the request has two readings
    BAD_TARGET = "ambiguous-path"  # target, header or method have two readings, and a rule looks at what differs
    HEAD_TIMEOUT = "request-head-timeout"
    BODY_TIMEOUT = "request-body-timeout"
    HEAD_TOO_LARGE = "request-head-too-large"
    TARGET_TOO_LONG = "request-target-too-long"
    DENIED = "denied"
    TERMINATED = "terminated"  # a later policy took back the permit of a tunnel
    NO_ROUTE = "no-route"
    REDIRECTED = "redirected"  # a route says so; no failure, and never counted as one
    NO_POLICY = "policy-unknown"  # fail closed: nobody told us yet who may
    NO_IDENTITY = "identity-unknown"  # fail closed: we have no certificate yet
    NO_ENDPOINTS = "no-endpoints"
    NO_BACKEND = "backend-invalid"  # a route sends the request to something that does not exist
    PORT_UNDEFINED = "service-port-undefined"
    CONNECT_REFUSED = "connect-refused"
    CONNECT_TIMEOUT = "connect-timeout"
    CONNECT_FAILED = "connect-failed"
    PEER_IDENTITY = "peer-identity-mismatch"
    TLS_FAILED = "tls-handshake-failed"
    UPSTREAM_RESET = "upstream-reset"  # died before a response
    UPSTREAM_PROTOCOL = "upstream-protocol"  # the response broke a rule of the protocol
    UPSTREAM_TIMEOUT = "upstream-timeout"
    ROUTE_TIMEOUT = "route-timeout"  # a route allows no more time
    RETRIABLE_STATUS = "retriable-status"  # an answer after which a route wants a retry; no client sees this
    CLIENT_GONE = "client-gone"  # the client left before its answer was complete; nobody sees the status
    LOOP = "loop-detected"
    FOREIGN = "foreign-destination"  # led to us, but meant for an address that is not this pod's
    DRAINING = "draining"
    OVERLOADED = "overloaded"
    INTERNAL = "internal"


_TABLE: dict[Cause, Effect] = {
    Cause.BAD_REQUEST: Effect(400, Grpc.INTERNAL, "info", False),
    Cause.BAD_TARGET: Effect(400, Grpc.INTERNAL, "info", True),
    Cause.HEAD_TIMEOUT: Effect(408, Grpc.DEADLINE_EXCEEDED, "info", False),
    Cause.BODY_TIMEOUT: Effect(408, Grpc.DEADLINE_EXCEEDED, "info", False),
    Cause.HEAD_TOO_LARGE: Effect(431, Grpc.RESOURCE_EXHAUSTED, "info", False),
    Cause.TARGET_TOO_LONG: Effect(414, Grpc.RESOURCE_EXHAUSTED, "info", False),
    Cause.DENIED: Effect(403, Grpc.PERMISSION_DENIED, "info", True),
    Cause.TERMINATED: Effect(403, Grpc.PERMISSION_DENIED, "info", False),
    Cause.REDIRECTED: Effect(302, Grpc.UNIMPLEMENTED, "debug", True),
    Cause.NO_ROUTE: Effect(404, Grpc.UNIMPLEMENTED, "info", True),
    Cause.NO_POLICY: Effect(503, Grpc.UNAVAILABLE, "warning", False),
    Cause.NO_IDENTITY: Effect(503, Grpc.UNAVAILABLE, "warning", False),
    Cause.NO_BACKEND: Effect(500, Grpc.UNAVAILABLE, "warning", True),
    Cause.NO_ENDPOINTS: Effect(503, Grpc.UNAVAILABLE, "info", True),
    Cause.PORT_UNDEFINED: Effect(502, Grpc.UNAVAILABLE, "info", False),
    Cause.CONNECT_REFUSED: Effect(502, Grpc.UNAVAILABLE, "info", True),
    Cause.CONNECT_TIMEOUT: Effect(504, Grpc.UNAVAILABLE, "info", True),
    Cause.CONNECT_FAILED: Effect(502, Grpc.UNAVAILABLE, "info", True),
    Cause.PEER_IDENTITY: Effect(502, Grpc.UNAVAILABLE, "warning", True),
    Cause.TLS_FAILED: Effect(502, Grpc.UNAVAILABLE, "warning", True),
    Cause.UPSTREAM_RESET: Effect(502, Grpc.UNAVAILABLE, "info", True),
    Cause.UPSTREAM_PROTOCOL: Effect(502, Grpc.UNAVAILABLE, "warning", True),
    Cause.UPSTREAM_TIMEOUT: Effect(504, Grpc.DEADLINE_EXCEEDED, "info", True),
    Cause.ROUTE_TIMEOUT: Effect(504, Grpc.DEADLINE_EXCEEDED, "info", True),
    Cause.RETRIABLE_STATUS: Effect(502, Grpc.UNAVAILABLE, "info", True),
    Cause.CLIENT_GONE: Effect(499, Grpc.CANCELLED, "debug", False),
    Cause.LOOP: Effect(508, Grpc.ABORTED, "warning", False),
    Cause.FOREIGN: Effect(403, Grpc.PERMISSION_DENIED, "warning", False),
    Cause.DRAINING: Effect(503, Grpc.UNAVAILABLE, "info", False),
    Cause.OVERLOADED: Effect(503, Grpc.UNAVAILABLE, "warning", True),
    Cause.INTERNAL: Effect(500, Grpc.INTERNAL, "error", False),
}

PROXY_ERROR: Final = b"pillion-proxy-error"
"""The field in which a sidecar says why it answered by itself. No app's answer carries it: inbound removes it."""

UNREACHED: Final = frozenset((Cause.CONNECT_REFUSED, Cause.CONNECT_TIMEOUT, Cause.CONNECT_FAILED))
"""No connection was made, so nothing of the request reached an app."""
_UNREACHED: Final = {cause.value.encode(): cause for cause in UNREACHED}

_REASONS = {
    301: b"Moved Permanently",
    302: b"Found",
    303: b"See Other",
    307: b"Temporary Redirect",
    308: b"Permanent Redirect",
    400: b"Bad Request",
    403: b"Forbidden",
    404: b"Not Found",
    408: b"Request Timeout",
    414: b"URI Too Long",
    431: b"Request Header Fields Too Large",
    499: b"Client Closed Request",
    500: b"Internal Server Error",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    508: b"Loop Detected",
}


class Failure(Exception):
    """A cause with the sentence for the log; raised by code that waits, passed as a value by code that does not."""

    def __init__(self, cause: Cause, detail: str = "") -> None:
        super().__init__(detail or cause.value)
        self.cause = cause
        self.detail = detail


class Redirect(NamedTuple):
    """Where a client is to ask instead. location: an absolute URI that may stand in a header field."""

    status: int
    location: bytes


def effect(cause: Cause) -> Effect:
    """What a client of this cause is to see."""
    return _TABLE[cause]


def unreached(error: bytes) -> Cause | None:
    """The cause, when a sidecar's `PROXY_ERROR` says that nothing of the request reached its app."""
    return _UNREACHED.get(error)


def http1_answer(cause: Cause, *, close: bool, explain: bool, redirect: Redirect | None = None) -> bytes:
    """A complete HTTP/1.1 response without a body (RFC 9112). explain: the peer is meshed and may know the reason."""
    row = _TABLE[cause]
    status = redirect.status if redirect is not None else row.status
    lines = [b"HTTP/1.1 %d %s" % (status, _REASONS[status]), b"content-length: 0"]
    if redirect is not None:
        lines.append(b"location: " + redirect.location)
    elif explain:
        lines.append(PROXY_ERROR + b": " + cause.value.encode())
    if close or not row.keep:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def http2_answer(cause: Cause, *, grpc: bool, explain: bool, redirect: Redirect | None = None) -> list[tuple[bytes, bytes]]:
    """The header list of a complete HTTP/2 response without a body: a trailers-only one for gRPC (HTTP status 200)."""
    if redirect is not None:
        return [(b":status", b"%d" % redirect.status), (b"content-length", b"0"), (b"location", redirect.location)]
    row = _TABLE[cause]
    headers = [(b":status", b"200" if grpc else b"%d" % row.status)]
    if grpc:
        headers.append((b"content-type", b"application/grpc"))
        headers.append((b"grpc-status", b"%d" % row.grpc))
        if explain:
            headers.append((b"grpc-message", cause.value.encode()))
    else:
        headers.append((b"content-length", b"0"))
    if explain:
        headers.append((PROXY_ERROR, cause.value.encode()))
    return headers
