"""Reads heads of HTTP/1.1 messages: what is accepted, how the body is framed, which fields end at this hop.

Theory of operation. One regular expression checks all of a head at once: every line is ``token ":" value``, ended by CRLF, without control
characters. So bare CR, bare LF, NUL, obs-fold, spaces before the colon and empty names cannot match. It takes one pass: repeats within a
line are possessive, and a head can be divided into lines in one way only, so there is nothing to backtrack into. The same match finds the
first field that may decide something, judged by the first letters of its name. Only the fields from there on are looked through a second
time; most requests have none after Host.

Strictness errs on the side of refusing: whatever two parsers are known to read differently is an error here, also where RFC 9112 would
let a recipient repair it. Pure; called by client.py and upstream.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from core.spelling import any_spelling
from proxy.protocol.http1.heads import CHUNKED, FIELD, TOKEN, UNTIL_CLOSE, HeadError, RequestHead, ResponseHead, without
from proxy.protocol.http1.limits import Http1Limits
from proxy.protocol.requests import same_authority
from proxy.rescue import PROXY_ERROR, Cause

# How the names of fields that decide something begin: host, connection, content-, transfer-encoding, upgrade, expect, keep-alive,
# proxy-connection, te, and our own (pillion-). Tested letter by letter, so other names may pass too (and are looked at in vain), but none
# of these is missed.
_DECIDING: Final = rb"[CEHKPTUcehkptu][EIOPRXeioprx](?:[AEGLNOPSaeglnops][ELNPRTXelnprtx]|:)"
# Possessive repeats hold no choice, no group and no assertion here: Python before 3.11.5 gets those wrong.
# The fourth group is the Host field where it comes first and is a plain name: nothing more to look at then. The fifth are the fields from
# the first one on that may decide something. It begins with such a one or is not there, so that a head can be divided in one way only.
_match_request: Final = re.compile(
    rb"(" + TOKEN + rb"++) ([\x21\x22\x24-\x7e]++) HTTP/1\.([01])\r\n"
    rb"(?:[Hh]ost: ([A-Za-z0-9._\-]{1,255}(?::[0-9]{1,5})?)\r\n)?"
    rb"(?:(?!" + _DECIDING + rb")" + FIELD + rb")*(?:(?=" + _DECIDING + rb")((?:" + FIELD + rb")*+))?\r\n"
).match
_match_response: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*+)?\r\n(?:" + FIELD + rb")*+\r\n").match
_FRAMING: Final = any_spelling(b"content-length") + rb"|" + any_spelling(b"transfer-encoding")
_request_fields: Final = re.compile(
    rb"\n(host|" + _FRAMING + rb"|connection|upgrade|expect|te|keep-alive|proxy-connection"
    rb"|content-type(?=:[ \t]*application/grpc)):[ \t]*+([^\r]*)"
).findall
_response_fields: Final = re.compile(
    rb"\n(content-length|transfer-encoding|connection|upgrade|keep-alive|proxy-connection|pillion-proxy-error):[ \t]*+([^\r]*)"
).findall
_is_host: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9\-._~!$&'()*+;=%]{0,255})(?::[0-9]{0,5})?").fullmatch
_is_absolute: Final = re.compile(rb"(?i:https?)://([^/?@]+)(/[^?]*)?(\?.*)?").fullmatch
_is_authority: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9\-._~!$&'()*+;=%]{1,255}):[0-9]{1,5}").fullmatch
_is_length: Final = re.compile(rb"[0-9]{1,18}").fullmatch
_is_token: Final = re.compile(TOKEN + rb"+").fullmatch
_breaks_lines: Final = re.compile(rb"(?<!\r)\n|\r[^\n]|\x00").search

# Fields that say where a message ends or whom it is for: a Connection field that names one would make the next hop read another message.
_NEVER_NAMED: Final = frozenset((b"host", b"content-length", b"transfer-encoding", b"content-type", b"content-encoding", b"expect"))
# Names that `_request_fields` may find. It also finds other spellings, such as Content_Length: no server should, but some (uWSGI) take that
# for Content-Length. So any name that is not listed here is refused.
_REQUEST_NAMES: Final = _NEVER_NAMED | {b"connection", b"upgrade", b"te", b"keep-alive", b"proxy-connection"}
# Upgrades to protocols that would carry further requests inside a tunnel, past the gate; those of drafts (h2c-14) too.
_carries_requests: Final = re.compile(rb"(?:^|,)[ \t]*+(?:h2|http|tls)").search
_OPTIONS_MAX: Final = 64  # of a Connection field: each costs a look through the head


def request_untrusted(data: bytes, limits: Http1Limits) -> RequestHead | None:
    """Read the request head at the beginning of ``data``. None: it is not all there yet. Raises HeadError (RFC 9112 sections 2-3, 5-6)."""
    found = _match_request(data)
    if found is None:
        _refuse_untrusted(data, limits.head_bytes, limits.target_bytes)
        return None
    size = found.end()
    method, target, minor, authority, deciding = found.groups()
    if len(target) > limits.target_bytes:
        raise HeadError(Cause.TARGET_TOO_LONG, f"the target has {len(target)} bytes")
    wire = data if size == len(data) else data[:size]
    # The shortest field is four bytes long, so short heads cannot have too many.
    if size > limits.head_bytes or (size > limits.header_count * 4 and wire.count(b"\n") - 2 > limits.header_count):
        raise HeadError(Cause.HEAD_TOO_LARGE, f"the head has {size} bytes or more than {limits.header_count} fields")
    head = RequestHead(size, method, target, authority or b"", wire)
    if authority is None or minor == b"0" or (deciding and not _usual(head, deciding)):
        _request_rules(head, _request_fields(head.lower), minor == b"0")
    elif not deciding:
        head.ordinary = True
    if method == b"HEAD":
        head.plain = False
    if target[0] != 47 or method == b"CONNECT":
        _reduce_target(head)
    return head


def _usual(head: RequestHead, deciding: bytes) -> bool:
    """Apply the fields if they are at most one Content-Length, and others that change nothing; else leave the head alone."""
    length = -1
    for name, value in _request_fields(b"\n" + deciding.lower()):
        if name == b"content-length" and length < 0 and _is_length(value):
            length = int(value)
        elif name != b"connection" or value != b"keep-alive":
            return False
    if length > 0:
        head.length = length
        head.bodiless = False
    return True


def _request_rules(head: RequestHead, fields: list[tuple[bytes, bytes]], old: bool) -> None:
    """Apply the fields that decide something. fields: lower-case name and value, in order."""
    seen = _collect(fields, single=(b"host", b"content-length", b"transfer-encoding", b"expect", b"te"))
    if not _REQUEST_NAMES.issuperset(seen):
        raise HeadError(Cause.BAD_REQUEST, "a field that some servers take for Content-Length or Transfer-Encoding")
    if b"host" not in seen and not old:
        raise HeadError(Cause.BAD_REQUEST, "an HTTP/1.1 request needs a Host field")
    # As received, not in lower case.
    at = head.lower.find(b"\nhost:") + 6
    head.authority = head.wire[at : head.wire.index(b"\r", at)].strip(b" \t") if at > 5 else b""
    if not _is_host(head.authority):
        raise HeadError(Cause.BAD_REQUEST, "the Host field is not a host with an optional port")
    head.old = old
    head.grpc = b"content-type" in seen
    head.length = _length(seen, old, 0)
    head.bodiless = head.length == 0
    # RFC 9110 section 10.1.1: an HTTP/1.0 client does not understand 100.
    head.expects = not old and not head.bodiless and seen.get(b"expect") == b"100-continue"
    _end_request_hop(head, seen)
    head.plain = head.plain and head.keep and not (old or head.expects or head.upgrades)


def _end_request_hop(head: RequestHead, seen: dict[bytes, bytes]) -> None:
    """Cut the fields that are only for this hop (RFC 9110 section 7.6.1) and translate those that the next hop needs too."""
    connection = seen.get(b"connection", b"")
    named = _named(connection)
    head.keep = (b"keep-alive" in named) if head.old else b"close" not in named
    if connection in (b"", b"keep-alive") and not seen.keys() & _REQUEST_HOPS:
        return  # what it says of this hop we would say of the next one
    head.upgrades = b"upgrade" in named and b"upgrade" in seen and not head.old and not _carries_requests(seen[b"upgrade"])
    cut = set(named) | _REQUEST_HOPS | {b"connection"}
    te = seen.get(b"te", b"")
    if te == b"trailers":
        cut.discard(b"te")
    if head.upgrades:
        cut.discard(b"upgrade")
    if (head.upgrades and connection == b"upgrade") or connection == b"keep-alive":
        cut.discard(b"connection")
    wire = without(head.wire, cut)
    if b"connection" in cut and head.upgrades:
        wire = wire[:-2] + b"connection: upgrade\r\n\r\n"
    if b"te" in cut and b"trailers" in te.replace(b" ", b"").split(b","):
        wire = wire[:-2] + b"te: trailers\r\n\r\n"
    head.replace(wire)


_REQUEST_HOPS: Final = frozenset((b"keep-alive", b"proxy-connection", b"te", b"upgrade"))
_RESPONSE_HOPS: Final = frozenset((b"keep-alive", b"proxy-connection", b"upgrade"))


def _reduce_target(head: RequestHead) -> None:
    """CONNECT, asterisk and absolute form (RFC 9112 section 3.2). The reduced target is for decisions, the received one is sent on."""
    target = head.target
    if head.method == b"CONNECT":
        if not _is_authority(target):
            raise HeadError(Cause.BAD_REQUEST, "CONNECT needs host:port as its target")
        if head.length != 0 or head.upgrades:
            raise HeadError(Cause.BAD_REQUEST, "CONNECT with a body or an upgrade")
        head.connects, head.plain = True, False
        scheme, authority = b"", target
    elif target == b"*" and head.method == b"OPTIONS":
        return
    else:
        absolute = _is_absolute(target)
        if absolute is None or not _is_host(absolute[1]):
            raise HeadError(Cause.BAD_REQUEST, "the target is neither a path nor an http URI")
        head.target = (absolute[2] or b"/") + (absolute[3] or b"")
        scheme, authority = target[: target.index(b":")].lower(), absolute[1]
    # By RFC 9112 section 3.2.2 the target wins over Host. A server that lets Host win would serve another site, so the two have to agree.
    if not same_authority(head.authority, authority, scheme) if head.authority else not head.old:
        raise HeadError(Cause.BAD_REQUEST, "the Host field differs from the authority of the target")
    head.authority = authority


def response_untrusted(data: bytes, head_bytes: int) -> ResponseHead | None:
    """Read the response head at the beginning of ``data``. None: it is not all there yet. Raises HeadError (RFC 9112 sections 4-6)."""
    found = _match_response(data)
    if found is None:
        _refuse_untrusted(data, head_bytes, head_bytes)
        return None
    size = found.end()
    if size > head_bytes:
        raise HeadError(Cause.HEAD_TOO_LARGE, f"the head has {size} bytes")
    minor, status = found.groups()
    wire = data if size == len(data) else data[:size]
    head = ResponseHead(size, int(status), wire)
    fields = _response_fields(wire.lower())
    # Kept alive and framed by its length, as nearly all are: known without a second look.
    length = -1
    for name, value in fields:
        if name == b"content-length" and length < 0 and _is_length(value):
            length = int(value)
        elif name == b"connection" and value == b"keep-alive":
            head.connection = value
        elif name == b"keep-alive":  # parameters of this hop, on every response of some servers
            head.plain = False
        else:
            break
    else:
        if length >= 0 and minor == b"1" and status >= b"200" and status != b"204" and status != b"304":
            head.length = length
            if not head.plain:
                head.wire = without(wire, (b"keep-alive",))
            return head
    _response_rules(head, fields, minor == b"0")
    return head


def _response_rules(head: ResponseHead, fields: list[tuple[bytes, bytes]], old: bool) -> None:
    """Apply the fields that decide something. fields: lower-case name and value, in order."""
    seen = _collect(fields, single=(b"content-length", b"transfer-encoding"))
    head.old = old
    head.length = _length(seen, old, UNTIL_CLOSE)
    if head.length not in (0, UNTIL_CLOSE) and (head.status < 200 or head.status == 204):
        raise HeadError(Cause.BAD_REQUEST, f"a {head.status} response with a body")  # RFC 9110 section 8.6, RFC 9112 section 6.1
    head.connection = seen.get(b"connection", b"")
    named = _named(head.connection)
    head.keep = (b"keep-alive" in named) if head.old else b"close" not in named
    hops = seen.keys() & _RESPONSE_HOPS
    if head.connection != b"keep-alive":
        hops.update(named)
    if head.status in (101, 426):  # these two tell the client what to upgrade to
        hops.discard(b"upgrade")
    head.error = seen.get(PROXY_ERROR)
    head.plain = not (hops or old or head.error is not None or head.length < 0 or head.status < 200 or head.status in (204, 304))
    if hops - {b"close"}:
        head.wire = without(head.wire, hops)


def _collect(fields: list[tuple[bytes, bytes]], single: Iterable[bytes]) -> dict[bytes, bytes]:
    """Join repeated list fields as RFC 9110 section 5.3 says; raise HeadError for fields that must not be repeated."""
    seen: dict[bytes, bytes] = {}
    for name, value in fields:
        value = value.rstrip(b" \t")
        if name not in seen:
            seen[name] = value
        elif name in single:
            raise HeadError(Cause.BAD_REQUEST, f"more than one {name.decode()} field")
        else:
            seen[name] += b"," + value
    return seen


def _length(seen: dict[bytes, bytes], old: bool, absent: int) -> int:
    """How the body is framed (RFC 9112 section 6.3). absent: when no field says so."""
    coding = seen.get(b"transfer-encoding")
    length = seen.get(b"content-length")
    if coding is not None:
        if length is not None:
            raise HeadError(Cause.BAD_REQUEST, "both Content-Length and Transfer-Encoding")
        if old:
            raise HeadError(Cause.BAD_REQUEST, "Transfer-Encoding in HTTP/1.0")
        if coding != b"chunked":
            raise HeadError(Cause.BAD_REQUEST, "a Transfer-Encoding other than chunked")
        return CHUNKED
    if length is None:
        return absent
    if not _is_length(length):
        raise HeadError(Cause.BAD_REQUEST, "Content-Length is not a number of at most 18 digits")
    return int(length)


def _named(connection: bytes) -> list[bytes]:
    """The options of a Connection field."""
    if connection.count(b",") >= _OPTIONS_MAX:
        raise HeadError(Cause.BAD_REQUEST, f"a Connection field with more than {_OPTIONS_MAX} options")
    options = [option for part in connection.split(b",") if (option := part.strip(b" \t"))]
    for option in options:
        if option in _NEVER_NAMED or not _is_token(option):
            raise HeadError(Cause.BAD_REQUEST, "a Connection field names what cannot end at this hop")
    return options


def incomplete_untrusted(data: bytes, known: int, head_bytes: int, target_bytes: int) -> bool:
    """Whether ``data`` is the beginning of a head and no more. Raises HeadError when it cannot become one.

    known: how many of its bytes an earlier call has seen. They are not searched again: a head that comes byte by byte must not cost
    quadratic time.
    """
    end = data.find(b"\r\n\r\n", max(known - 3, 0))
    if end > head_bytes or (end < 0 and len(data) > head_bytes):
        raise HeadError(Cause.HEAD_TOO_LARGE, f"the head has more than {head_bytes} bytes")
    line = data.find(b"\n", 0, target_bytes + 64)
    if line < 0 and len(data) > target_bytes + 64:
        raise HeadError(Cause.TARGET_TOO_LONG, "the first line does not end")
    if _breaks_lines(data, max(known - 1, 0), end if end >= 0 else len(data)):
        raise HeadError(Cause.BAD_REQUEST, "bare CR, bare LF or NUL in the head")
    return end < 0


def _refuse_untrusted(data: bytes, head_bytes: int, target_bytes: int) -> None:
    """Say why ``data`` is no head, by HeadError, or return because it may become one."""
    if not incomplete_untrusted(data, 0, head_bytes, target_bytes):
        raise HeadError(Cause.BAD_REQUEST, "not an HTTP/1.x head, or a malformed field")
