"""What both HTTP engines ask their gate, and what the gate answers.

A gate belongs to one client connection. It decides about one request at a time, synchronously when everything it needs is at hand;
otherwise it returns `LATER` and calls the engine's ``proceed(token, verdict)`` once it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

from core.spelling import Spellings
from proxy.rescue import Cause, Redirect

_DEFAULT_PORTS: Final[Mapping[bytes, tuple[bytes, ...]]] = {b"http": (b":80",), b"https": (b":443",), b"": (b":80", b":443")}


def same_authority(one: bytes, other: bytes, scheme: bytes) -> bool:
    """Whether two authorities name the same host and port. One of them may leave out the default port of the scheme.

    RFC 3986 section 6.2.3, RFC 9113 section 8.3.1. scheme: lower case; empty for CONNECT, whose target is an authority alone.
    """
    one, other = one.lower(), other.lower()
    return one == other or any(one.removesuffix(port) == other.removesuffix(port) for port in _DEFAULT_PORTS.get(scheme, ()))


class RequestHead(Protocol):
    """The parts of a request that decisions look at; the rest of it is never touched."""

    method: bytes
    target: bytes
    """The request target in origin-form as received, query included (``:path`` in HTTP/2). Absolute-form was reduced to it."""
    authority: bytes
    """Host header or ``:authority`` as received, empty when there is none."""
    grpc: bool
    """The content type begins with ``application/grpc``: failures become a grpc-status."""
    bodiless: bool
    """No body follows: the head alone is enough to send the request again."""

    def values(self, names: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        """The value of each of these lower-case names, None where there is no such field.

        When a name occurs in several fields, their values are joined by LF, which no value can contain. A rule that saw only the first
        of them could be evaded, because the app might act on another. Cookie fields are joined by ``; `` as the one value they are.
        ``host`` is answered under HTTP/2 too, where only ``:authority`` carries it.
        """
        ...

    def respelled(self, names: Spellings) -> bool:
        """Whether some field's name is another spelling of one of these names (core.spelling)."""
        ...


class ResponseRule(NamedTuple):
    """What is changed in the head of a response, and which responses cause a retry. Trailers and interim responses (1xx) are left alone.

    strip: lower-case names whose fields are removed wherever they occur. add: fields appended, lower-case name and value. retry_on: the
    statuses after which `Gate.retry_by_rule` is asked, as it is when no response came at all; None when the rule has no retries.
    """

    strip: tuple[bytes, ...] = ()
    add: tuple[tuple[bytes, bytes], ...] = ()
    retry_on: frozenset[int] | None = None


class HeadEdit(NamedTuple):
    """What is changed in a request head on its way: constant for a connection, so that it costs no decision per request.

    strip: lower-case names whose fields are removed wherever they occur. add: fields appended, lower-case name and value. host: the new
    Host or :authority, empty to keep the received one. retarget: makes the new request target from the received one (origin-form), None
    to keep it. Neither is applied to a request without a path (CONNECT). response: what is done to the response, None for nothing.
    trailers: names removed from the trailers, because the request was decided on by them: a receiver that merges trailers into the head
    must not find others there. `strip` and `trailers` remove every spelling of a name (core.spelling).
    """

    strip: tuple[bytes, ...] = ()
    add: tuple[tuple[bytes, bytes], ...] = ()
    host: bytes = b""
    retarget: Callable[[bytes], bytes] | None = None
    response: ResponseRule | None = None
    trailers: tuple[bytes, ...] = ()


class Forward:
    """Send the request to this upstream. exchange: the gate's own note about the request, handed back in `finished`.

    A plain class with slots, like `Answer`: one is made per request, and a tuple type costs twice as much to make.
    """

    __slots__ = ("edit", "exchange", "upstream")

    def __init__(self, upstream: Any, edit: HeadEdit, exchange: object) -> None:
        self.upstream = upstream  # Http1Upstream or Http2Upstream, according to the engine
        self.edit = edit
        self.exchange = exchange


class Answer:
    """Do not forward; the client gets what rescue.py says. explain: the client is meshed and may be told the cause.

    redirect: with Cause.REDIRECTED, where to; `Gate.finished` is then told of no cause.
    """

    __slots__ = ("cause", "exchange", "explain", "redirect")

    def __init__(self, cause: Cause, explain: bool, exchange: object = None, redirect: Redirect | None = None) -> None:
        self.redirect = redirect
        self.cause = cause
        self.explain = explain
        self.exchange = exchange


IDEMPOTENT: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))
"""Idempotent methods (RFC 9110 section 9.2.2). When an upstream may have acted on a request already, only these are sent again, unless a
rule of the route allows more."""

CONTENTLESS: Final = IDEMPOTENT - {b"PUT"}
"""Methods whose content has no meaning (RFC 9110 section 9.3). Some servers leave it unread, and then take it for the next request."""

LATER: Final = None
"""The gate will call the engine's ``proceed``; until then the engine holds the request."""

Verdict = Forward | Answer


class Bodies(Protocol):
    """What an engine knows of the bodies of an exchange; asked for only by who wants to log it, while `Gate.finished` runs."""

    def body_bytes(self) -> tuple[int, int]:
        """Bytes of the request's and of the response's body that arrived, without framing; of a tunnel, what went through it."""
        ...


class Gate(Protocol):
    """Decides about the requests of one client connection."""

    explain: bool
    """The client is a verified meshed peer: answers made by the proxy may name their cause."""

    def request(self, head: RequestHead, token: int) -> Verdict | None:
        """Decide. token: the stream id under HTTP/2, a running number under HTTP/1; names the request in ``proceed``."""
        ...

    def retry_unprocessed(self, exchange: object, head: RequestHead, token: int, cause: Cause) -> Verdict | None:
        """Decide where a request goes that failed and can safely be sent again (gRPC's "transparent retry"), or what to answer.

        cause: UPSTREAM_RESET when the upstream closed before a byte of its response; one of rescue.UNREACHED when the sidecar that was
        asked could not connect to its app.
        """
        ...

    def retry_by_rule(self, exchange: object, token: int, cause: Cause) -> bool:
        """Decide whether a request is sent again because its route has a retry policy, even though an app may have acted on it.

        Asked only when the rule has `ResponseRule.retry_on`, the whole request is at hand, and the client was sent nothing of a response.
        True: the gate will call ``proceed``, but not before this call has returned. cause: why the last attempt failed.
        """
        ...

    def tunnel(self, exchange: object, head: RequestHead) -> Cause | None:
        """Decide whether the request may become a tunnel, or stay one: None, or the cause for which it must end.

        A tunnel may outlive the policy that let its request in. So this is asked when the tunnel begins, and again whenever the gate has
        called the engine's ``review``.
        """
        ...

    def finished(self, exchange: object, status: int, cause: Cause | None, grpc_status: int, bodies: Bodies) -> None:
        """The exchange ended. status: what the client saw, 0 if nothing. cause: why it failed, None for a complete response.
        grpc_status: 0 to 16, -1 when there was none."""
        ...

    def refused(self, cause: Cause, detail: str) -> None:
        """The engine answered or closed by itself (bad bytes, limits, timeouts), before any decision was asked for."""
        ...

    def cancelled(self, token: int) -> None:
        """The client went away while the gate still owed a verdict; ``proceed`` for this token will be ignored."""
        ...
