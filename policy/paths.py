"""One reading of a request target, or none: what route rules compare, and which targets they must not compare at all.

A proxy that decides on a path and an app that serves it have to read it the same way, or a rule can be evaded: ``/public/%2e%2e/admin`` is
below ``/public`` for the one and ``/admin`` for the other. So a target that servers are known to read in more than one way is refused
here, and everything else is brought into the normal form of RFC 3986 section 6.2.2. The bytes that are forwarded stay as they came.

Some differences cannot be refused because honest clients make them: an escaped ``@`` is a different resource by RFC 3986 section 2.2 and
the same one to nearly every framework, and Java servers cut ``;name=value`` off a segment. `readings` lists those; policy.authorize
refuses a request only when they lead to different routes.

Double escapes (``%2561``) are one reading here: a literal percent sign. An app that decodes twice is beyond what a proxy can guess.

Called by policy.authorize (requests) and by the controller (`normal_path`, values of routes). Must not decide who may do what.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")  # RFC 3986 section 2.3

# Already normal and without anything to look at twice, which is what nearly every request sends.
_PLAIN = re.compile(rb"(?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9\-._~!$&'()*+,=:@]+)+/?|/")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_NEVER_RAW = re.compile(rb"[\x00-\x20\x7f]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_TO_ENCODE_IN_PATH = re.compile(rb"[^A-Za-z0-9\-._~!$&'()*+,;=:@/%]")
_TO_ENCODE_IN_QUERY = re.compile(rb"[^A-Za-z0-9\-._~!$&'()*+,;=:@/?%]")
_ESCAPED_PCHAR = re.compile(r"%(?:2[146-9A-C]|3[ABD]|40)")  # the reserved characters that may stand in a segment as they are
_PARAMETERS = re.compile(r";[^/]*")


class AmbiguousPath(ValueError):
    """The target has more than one reading; ``reason`` says what about it, in constant text that repeats nothing of the target."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NormalTarget(NamedTuple):
    """path: RFC 3986 normal form, ASCII, begins with ``/``; or ``*`` for a target that names no path (RFC 9112 section 3.2.4).

    query: what follows the first ``?``, escapes as they came; empty when there is none. See `query_values`.
    """

    path: str
    query: str


ASTERISK = NormalTarget("*", "")


def normal_target_untrusted(raw: bytes) -> NormalTarget:
    """Read an origin-form or asterisk-form target (RFC 9112 section 3.2); raises AmbiguousPath for everything with two readings.

    Refused: dot segments, also escaped and with parameters (``/..;/``); empty segments (a single trailing slash is none); escaped
    slash; backslash, also escaped; control characters and raw spaces; broken escapes; octets that are not UTF-8 (overlong forms);
    a fragment. Authority-form (CONNECT) has no path and is refused too: route rules do not see what runs in a tunnel.

    >>> normal_target_untrusted(b"/caf%c3%a9/%7euser?q=1")
    NormalTarget(path='/caf%C3%A9/~user', query='q=1')
    """
    path, mark, query = raw.partition(b"?")
    if not _PLAIN.fullmatch(path):
        if raw == b"*":
            return ASTERISK
        return NormalTarget(_normal_form(path), _query_text(query))
    return NormalTarget(path.decode("ascii"), _query_text(query) if mark else "")


def normal_path(value: str) -> str:
    """The normal form of an Exact or PathPrefix value of a route; raises AmbiguousPath, also for a value with a query.

    A value that is refused here could never match, because requests of that shape are refused.
    """
    if "?" in value:
        raise AmbiguousPath("a path value holds no query: '?' is not part of a path")
    try:
        raw = value.encode("utf-8")
    except UnicodeEncodeError:
        raise AmbiguousPath("octets that are not UTF-8") from None
    return _normal_form(raw)


def lenient_target_untrusted(raw: bytes) -> NormalTarget:
    """For ports that opted out of path checks: any bytes have exactly this reading, and the app may have another.

    The reading is RFC 3986 to the letter (sections 6.2.2 and 5.2.4): unreserved characters are decoded, then dot segments removed.
    An escaped slash is data of its segment; empty segments count; a backslash is data; a fragment is cut off; a percent sign that
    begins no escape and every octet that may not stand in a URI is escaped. What does not begin with ``/`` names no path: ``*``.
    """
    path, _, query = raw.partition(b"#")[0].partition(b"?")
    if not path.startswith(b"/"):
        return ASTERISK
    text = _encoded(_BROKEN_ESCAPE.sub(b"%25", path), _TO_ENCODE_IN_PATH)
    kept: list[str] = []
    segments = text.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return NormalTarget("/" + "/".join(kept), _encoded(query, _TO_ENCODE_IN_QUERY, decode=False))


def readings(path: str) -> tuple[str, ...]:
    """How servers are known to read a normal path without breaking any rule: escapes of ``! $ & ' ( ) * + , ; = : @`` decoded, and
    parameters (``;name=value``, RFC 3986 section 3.3) cut off before or after that. One element when all agree; never empty.
    """
    folded = fold(path)
    if ";" not in folded:
        return (folded,)
    return tuple(dict.fromkeys((folded, fold(_PARAMETERS.sub("", path)), _PARAMETERS.sub("", folded))))


def fold(path: str) -> str:
    """The path with every escaped character decoded that may also stand in a segment as it is."""
    return _ESCAPED_PCHAR.sub(lambda escape: chr(int(escape[0][1:], 16)), path) if "%" in path else path


def query_values(query: str, *, strict: bool, watched: frozenset[str] = frozenset()) -> dict[str, str]:
    """The first value of every parameter of a query, decoded as a form (``+`` is a space); a name without ``=`` has the value ''.

    strict: raises AmbiguousPath for broken escapes and octets that are not UTF-8; otherwise these become U+FFFD or stay as they are.
    watched: names that rules look at. Strictly, each has one value or none, however a server reads the query: some take the last value,
    some take ``;`` for ``&``, as HTML once recommended, and some file a parameter under another name (`_filed_as`).
    """
    values = _form_values(query, strict, watched)
    if strict and watched and ";" in query:
        otherwise = _form_values(query.replace(";", "&"), strict, watched)
        if any(values.get(name) != otherwise.get(name) for name in watched):
            raise AmbiguousPath("a semicolon in the query, without which a parameter that rules look at has another value")
    return values


def _form_values(query: str, strict: bool, watched: frozenset[str]) -> dict[str, str]:
    raw = query.encode("ascii", "replace").replace(b"+", b" ")
    if strict and _BROKEN_ESCAPE.search(raw):
        raise AmbiguousPath("a broken percent-escape in the query")
    values: dict[str, str] = {}
    filed = {_filed_as(name) for name in watched if "[" not in name} if strict else set()
    for pair in raw.split(b"&"):
        name, _, value = pair.partition(b"=")
        if pair:
            key, text = _form_text(name, strict), _form_text(value, strict)
            if values.setdefault(key, text) != text and strict and key in watched:
                raise AmbiguousPath("two values of a query parameter that rules look at")
            if filed and key not in watched and _filed_as(key) in filed:
                raise AmbiguousPath("another spelling of a query parameter that rules look at")
    return values


def _filed_as(name: str) -> str:
    """The name under which a parameter may end up in an app, by the rules of all servers together.

    PHP drops leading blanks and everything from NUL on, and turns dots and blanks into ``_``; PHP, Ruby and Node take ``name[]`` for a
    list called ``name``; ASP.NET ignores case.
    """
    return re.split(r"[\[\0]", name.lstrip(" "), maxsplit=1)[0].replace(".", "_").replace(" ", "_").lower()


def _form_text(raw: bytes, strict: bool) -> str:
    try:
        return _decoded(raw).decode("utf-8", "strict" if strict else "replace")
    except UnicodeDecodeError:
        raise AmbiguousPath("octets in the query that are not UTF-8") from None


def _normal_form(raw: bytes) -> str:
    if not raw.startswith(b"/"):
        raise AmbiguousPath("the target is neither a path nor *")
    if b"#" in raw:
        raise AmbiguousPath("a fragment, which no request carries")
    if _NEVER_RAW.search(raw):
        raise AmbiguousPath("a control character or a space")
    if _BROKEN_ESCAPE.search(raw):
        raise AmbiguousPath("a broken percent-escape")
    if b"%2f" in raw.lower():
        raise AmbiguousPath("an escaped slash")
    try:
        decoded = _decoded(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise AmbiguousPath("octets that are not UTF-8") from None
    if "\\" in decoded:
        raise AmbiguousPath("a backslash")
    if _CONTROL.search(decoded):
        raise AmbiguousPath("an escaped control character")
    _check_segments(decoded.split("/")[1:])
    return _encoded(raw, _TO_ENCODE_IN_PATH)


def _check_segments(segments: list[str]) -> None:
    last = len(segments) - 1
    for position, segment in enumerate(segments):
        # Java servers cut parameters off before they look for dots and empty segments: "/..;/" climbs there.
        name = segment.partition(";")[0]
        if name in (".", ".."):
            raise AmbiguousPath("a dot segment")
        if not name and (segment or position != last):
            raise AmbiguousPath("an empty segment")


def _query_text(raw: bytes) -> str:
    if b"#" in raw:
        raise AmbiguousPath("a fragment, which no request carries")
    if _NEVER_RAW.search(raw):
        raise AmbiguousPath("a control character or a space in the query")
    return _encoded(raw, _TO_ENCODE_IN_QUERY, decode=False)


def _decoded(raw: bytes) -> bytes:
    return _ESCAPE.sub(lambda escape: bytes((int(escape[1], 16),)), raw)


def _encoded(raw: bytes, to_encode: re.Pattern[bytes], *, decode: bool = True) -> str:
    """Escape what may not stand there; with ``decode`` also bring present escapes into the normal form of RFC 3986 section 6.2.2."""
    if decode and b"%" in raw:
        raw = _ESCAPE.sub(_normal_escape, raw)
    return to_encode.sub(lambda octet: b"%%%02X" % octet[0][0], raw).decode("ascii")


def _normal_escape(escape: re.Match[bytes]) -> bytes:
    octet = int(escape[1], 16)
    return bytes((octet,)) if octet in _UNRESERVED else escape[0].upper()
