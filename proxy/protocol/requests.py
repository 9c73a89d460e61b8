"""What both HTTP engines ask their gate, and what the gate answers.

A gate belongs to one client connection. It decides about one request at a time, synchronously when everything it needs is at hand;
otherwise it returns `LATER` and calls the engine's ``proceed(token, verdict)`` once it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from core.spelling import Spellings
from proxy.rescue import Cause, Redirect


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
    """No body follows, so the request can be sent again as long as nothing was answered."""

    def values(self, names: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        """For each lower-case name its value, or None. Between the values of several fields of a name stands LF, which no value holds:
        rules that looked at the first one only could be walked around where the app acts on another. Cookies are one value anyway.
        ``host`` is there in HTTP/2 too, where only :authority says it."""
        ...

    def respelled(self, names: Spellings) -> bool:
        """Whether a field has another spelling of one of these names."""
        ...


class AnswerRule(NamedTuple):
    """What is changed in the head of an answer, and which answers are not wanted. Trailers and interim answers (1xx) are left alone.

    strip: lower-case names whose fields are removed wherever they occur. add: fields appended, lower-case name and value. again: after an
    answer of these statuses, and where there is none, the gate is asked whether to send the request again; None: it is not asked.
    """

    strip: tuple[bytes, ...] = ()
    add: tuple[tuple[bytes, bytes], ...] = ()
    again: frozenset[int] | None = None


class HeadEdit(NamedTuple):
    """What is changed in a request head on its way: constant for a connection, so that it costs no decision per request.

    strip: lower-case names whose fields are removed wherever they occur. add: fields appended, lower-case name and value. host: what
    Host or :authority becomes, empty when it stays. retarget: makes the target to send of the received one (origin-form), None when it
    stays; both are for requests with a path. answer: what becomes of the answer, None when it goes on as it is. trailers: names that
    decided about the request: a receiver that merges trailers into the head must not find one there. Names have all their spellings.
    """

    strip: tuple[bytes, ...] = ()
    add: tuple[tuple[bytes, bytes], ...] = ()
    host: bytes = b""
    retarget: Callable[[bytes], bytes] | None = None
    answer: AnswerRule | None = None
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
"""Methods of which acting twice is acting once (RFC 9110 section 9.2.2): without a rule that says so, only these are sent again to where
the first one may have been acted on."""

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

    def retry(self, exchange: object, head: RequestHead, token: int, cause: Cause) -> Verdict | None:
        """Nobody acted on the request and it can be sent again: where to, or which failure. cause: UPSTREAM_RESET when the upstream died
        before a byte of its answer; one of rescue.UNREACHED when the sidecar that was asked could not connect to its app."""
        ...

    def send_again(self, exchange: object, token: int, cause: Cause) -> bool:
        """The request's rule has an `AnswerRule.again`, all of the request is at hand, and the client got nothing of an answer: shall it be
        sent again? True: the gate will call ``proceed``, not before this call has returned. cause: what became of it so far."""
        ...

    def tunnel(self, exchange: object, head: RequestHead) -> Cause | None:
        """The request is answered by a tunnel, which may outlive the policy that let it in: why there must not be one, None when there
        may. Asked when it begins and, once the gate has called the engine's ``review``, again."""
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
