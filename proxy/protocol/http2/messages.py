"""What an HTTP/2 header list may look like, and what of it decisions read (RFC 9113 sections 8.1 to 8.3, 8.5; RFC 8441).

Theory of operation. Messages that differ in their values mostly have the same names. So everything that depends on names alone (are they
lower-case tokens, is a pseudo-header missing, doubled or misplaced, is there a connection-specific field, where is ``:path``) is computed
once per tuple of names and remembered as a `Shape`. What is left per message is one `bytes.translate` over the joined values, which
leaves nothing but separators when all characters are allowed, and the rules of the few values that have one.

Every function here raises `Malformed` for a message that must not be forwarded, and nothing else. Pure; called by blocks.py.
"""

from __future__ import annotations

import re
from typing import Final

from core.spelling import Spellings, canonical
from proxy.protocol.http2.hpack_codec import Section, encode, encode_values, indexed_values, name_prefix
from proxy.protocol.requests import same_authority
from proxy.rescue import PROXY_ERROR

_is_name = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
_is_method = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
# The request target is held to the same characters as under HTTP/1, so that a path means the same on either.
_is_path = re.compile(rb"(?:/[\x21\x22\x24-\x7e]*|\*)").fullmatch
_is_authority = re.compile(rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9\-._~!$&'()*+;=%]{1,255})(?::[0-9]{0,5})?").fullmatch
_is_length = re.compile(rb"[0-9]{1,18}").fullmatch
_is_grpc_status = re.compile(rb"[0-9]|1[0-6]").fullmatch  # the codes of gRPC, as it writes them
_is_status = re.compile(rb"[1-5][0-9][0-9]").fullmatch

_METHODS: Final = frozenset((b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"CONNECT"))
_REQUEST_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority", b":protocol"))
_RESPONSE_PSEUDO: Final = frozenset((b":status",))
_CONNECTION_SPECIFIC: Final = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))
# Fields of which a second one would give a message two readings.
_SINGLE: Final = frozenset((b"host", b"content-length", b"content-type"))
_OF_SIDECARS: Final = (PROXY_ERROR,)

# Deleting all that a field value may hold leaves the separators; HTAB and SP are allowed inside, not at the ends (section 8.2.1).
_ALLOWED: Final = bytes(c for c in range(256) if (c >= 0x20 and c != 0x7F) or c == 0x09)
_SHAPES: Final = 512  # remembered tuples of names per kind of message
_SHAPE_BYTES: Final = 2048  # a tuple of longer names is checked every time instead of being kept


class Malformed(Exception):
    """A message that is not forwarded; the text says which rule."""


class Shape:
    """What a tuple of names says about a message.

    first: index of the first field of each name. repeated: names of several fields. size: bytes of the names plus 32 each (RFC 9113
    section 6.5.2). The others are indexes into the values, -1 when there is no such field. What was computed last is kept, because it is
    nearly always asked for again: secrets, prefixes, indexed: the encoded names, and which of them may be whole fields of the static
    table; stripped_for, kept: which fields stay under a HeadEdit.strip, None for all; authority_before: a sound one.
    """

    __slots__ = (
        "_respelled", "_respelled_for",
        "authority", "authority_before", "content_length", "content_type", "first", "grpc_status", "host", "indexed", "kept", "method",
        "names", "path", "prefixes", "protocol", "proxy_error", "repeated", "scheme", "secrets", "separators", "size", "status",
        "stripped_for", "te",
    )  # fmt: skip

    def __init__(self, names: tuple[bytes, ...], first: dict[bytes, int], repeated: frozenset[bytes]) -> None:
        get = first.get
        self.names = names
        self.first = first
        self.repeated = repeated
        self.secrets: tuple[bool, ...] = ()
        self.prefixes: tuple[bytes, ...] = ()
        self.indexed: tuple[tuple[int, dict[bytes, bytes]], ...] = ()
        self.size = sum(map(len, names)) + 32 * len(names)
        self.separators = b"\n" * (len(names) - 1)
        self.method = get(b":method", -1)
        self.scheme = get(b":scheme", -1)
        self.path = get(b":path", -1)
        self.authority = get(b":authority", -1)
        self.authority_before: bytes | None = None
        self.protocol = get(b":protocol", -1)
        self.status = get(b":status", -1)
        self.host = get(b"host", -1)
        self.content_length = get(b"content-length", -1)
        self.content_type = get(b"content-type", -1)
        self.te = get(b"te", -1)
        self.grpc_status = get(b"grpc-status", -1)
        self.proxy_error = get(PROXY_ERROR, -1)
        self.stripped_for: tuple[bytes, ...] | None = None
        self.kept: tuple[int, ...] | None = None
        self._respelled_for: Spellings | None = None
        self._respelled = False

    def respelled(self, names: Spellings) -> bool:
        """See requests.RequestHead."""
        if names is not self._respelled_for:
            self._respelled = any(map(names.other, self.first))
            self._respelled_for = names
        return self._respelled

    def encode(self, values: tuple[bytes, ...], secrets: tuple[bool, ...], strip: tuple[bytes, ...], plain: bytes) -> bytes:
        """A message of this shape as a block without a dynamic table, without the fields named in `strip` (lower case), in any spelling.

        plain: the block that the message came as, if that may be sent on, else nothing.
        """
        if strip is not self.stripped_for:  # constant for a connection, so that identity is enough and costs nothing
            stripped = set(map(canonical, strip))
            gone = {name for name in self.first if canonical(name) in stripped}
            self.kept = tuple(at for at, name in enumerate(self.names) if name not in gone) if gone else None
            self.stripped_for = strip
        if self.kept is not None:
            return encode([(self.names[at], values[at], secrets[at]) for at in self.kept])
        if plain:
            return plain
        if secrets != self.secrets:
            self.prefixes = tuple(map(name_prefix, self.names, secrets))
            known = enumerate(map(indexed_values, self.names, secrets))
            self.indexed = tuple([(at, values_known) for at, values_known in known if values_known])
            self.secrets = secrets
        return encode_values(self.prefixes, values, self.indexed)


class Request:
    """A request: the values that have a meaning here, and all of it. Never changes after `read_request_untrusted` filled it.

    size: bytes of its header list (RFC 9113 section 6.5.2). content_length: -1 when not given. connect: CONNECT, plain or extended.
    extended: CONNECT with :protocol (RFC 8441).
    """

    __slots__ = (
        "authority", "connect", "content_length", "extended", "fields", "grpc", "method", "plain", "secrets", "shape", "size", "target",
    )  # fmt: skip

    method: bytes
    target: bytes
    authority: bytes
    size: int
    shape: Shape
    fields: tuple[bytes, ...]
    """The values, in order."""
    secrets: tuple[bool, ...]
    plain: bytes
    """The block it came as, if that may be sent on."""

    def __init__(self) -> None:
        self.grpc = self.connect = self.extended = False
        self.content_length = -1


def _read_names_untrusted(names: tuple[bytes, ...], pseudo: frozenset[bytes]) -> Shape:
    first: dict[bytes, int] = {}
    repeated: set[bytes] = set()
    regular = False
    for at, name in enumerate(names):
        if name[:1] == b":":
            if name not in pseudo:
                raise Malformed(f"pseudo-header {name[:64]!r} does not belong here")
            if regular:
                raise Malformed(f"pseudo-header {name!r} after a regular field")
            if name in first:
                raise Malformed(f"two {name!r}")
        else:
            regular = True
            if not _is_name(name):
                raise Malformed(f"field name {name[:64]!r} is not a lower-case token")
            if name in _CONNECTION_SPECIFIC:
                raise Malformed(f"connection-specific field {name!r}")
            if name in first and name in _SINGLE:
                raise Malformed(f"two {name!r} fields")
        if first.setdefault(name, at) != at:
            repeated.add(name)
    return Shape(names, first, frozenset(repeated))


class _Shapes:
    """Bounded memo of one kind of message. Only sound shapes are kept, so that bad ones cost their sender's connection, not memory."""

    def __init__(self, pseudo: frozenset[bytes], required: tuple[bytes, ...]) -> None:
        self._known: dict[tuple[bytes, ...], Shape] = {}
        self._pseudo = pseudo
        self._required = required
        self.get = self._known.get

    def learn_untrusted(self, names: tuple[bytes, ...]) -> Shape:
        shape = _read_names_untrusted(names, self._pseudo)
        for name in self._required:
            if name not in shape.first:
                raise Malformed(f"no {name!r}")
        if shape.size <= _SHAPE_BYTES:
            if len(self._known) >= _SHAPES:
                self._known.clear()
            self._known[names] = shape
        return shape


_requests = _Shapes(_REQUEST_PSEUDO, (b":method",))
_responses = _Shapes(_RESPONSE_PSEUDO, (b":status",))
_trailers = _Shapes(frozenset(), ())


def _check_values_untrusted(values: tuple[bytes, ...], shape: Shape) -> int:
    """Characters and te; returns the size of the list. Raises Malformed."""
    joined = b"\n".join(values)
    if joined.translate(None, _ALLOWED) != shape.separators:
        raise Malformed("control character in a field value")
    find = joined.find  # `in` makes an exception and drops it before it looks, because its left side might be a number
    if find(b" \n") >= 0 or find(b"\n ") >= 0 or len(joined.strip(b" \t")) != len(joined):
        raise Malformed("field value begins or ends with white space")
    if find(b"\t") >= 0 and (find(b"\t\n") >= 0 or find(b"\n\t") >= 0):
        raise Malformed("field value begins or ends with a tab")
    if shape.te >= 0 and values[shape.te].lower() != b"trailers":
        raise Malformed("te is not trailers")
    return len(joined) - len(shape.separators) + shape.size


def _content_length_untrusted(values: tuple[bytes, ...], shape: Shape) -> int:
    value = values[shape.content_length]
    if not _is_length(value):
        raise Malformed("content-length is not a number")
    return int(value)


def read_request_untrusted(section: Section, into: Request) -> None:
    """Check a request's header list and fill `into`. Raises Malformed (RFC 9113 section 8.3.1, 8.5; RFC 8441 section 4)."""
    names, values, into.secrets, into.plain = section
    if not names:
        raise Malformed("no fields")
    shape = into.shape = _requests.get(names) or _requests.learn_untrusted(names)
    into.fields = values
    into.size = _check_values_untrusted(values, shape)
    into.method = method = values[shape.method]
    if method not in _METHODS and not _is_method(method):
        raise Malformed(":method is not a token")
    authority = values[shape.authority] if shape.authority >= 0 else b""
    if shape.host >= 0:
        host = values[shape.host]
        if shape.authority < 0:
            authority = host
        elif host != authority and not same_authority(host, authority, values[shape.scheme] if shape.scheme >= 0 else b""):
            raise Malformed("host and :authority disagree")
    if authority != shape.authority_before:
        if not _is_authority(authority):
            raise Malformed("no valid :authority or host")
        shape.authority_before = authority
    into.authority = authority
    if method == b"CONNECT":
        _read_connect_untrusted(values, shape, into)
    else:
        if shape.scheme < 0 or shape.path < 0 or shape.protocol >= 0:
            raise Malformed("request without :scheme or :path, or with :protocol though it is no CONNECT")
        _check_target_untrusted(method, values, shape)
        into.target = values[shape.path]
    if shape.content_type >= 0:
        into.grpc = values[shape.content_type].startswith(b"application/grpc")
    if shape.content_length >= 0:
        into.content_length = _content_length_untrusted(values, shape)
        if into.connect and not into.extended:
            raise Malformed("content-length in a CONNECT")


def _check_target_untrusted(method: bytes, values: tuple[bytes, ...], shape: Shape) -> None:
    path = values[shape.path]
    if not _is_path(path) or (path == b"*" and method != b"OPTIONS"):
        raise Malformed(":path is neither an origin-form nor OPTIONS *")
    if values[shape.scheme] not in (b"http", b"https"):
        raise Malformed(":scheme is neither http nor https")


def _read_connect_untrusted(values: tuple[bytes, ...], shape: Shape, into: Request) -> None:
    into.connect = True
    if shape.authority < 0:
        raise Malformed("CONNECT without :authority")
    if shape.protocol < 0:
        if shape.scheme >= 0 or shape.path >= 0:
            raise Malformed("CONNECT with :scheme or :path")
        into.target = into.authority
        return
    if shape.scheme < 0 or shape.path < 0:
        raise Malformed("extended CONNECT without :scheme or :path")
    if not _is_method(values[shape.protocol]):
        raise Malformed(":protocol is not a token")
    _check_target_untrusted(b"CONNECT", values, shape)
    into.target = values[shape.path]
    into.extended = True


def _grpc_status_untrusted(value: bytes) -> int:
    """The code; what is none is UNKNOWN, as clients of gRPC take it."""
    return int(value) if _is_grpc_status(value) else 2


def read_response_untrusted(section: Section, meshed: bool) -> tuple[int, int, int, int, bytes, bytes]:
    """(status, content length or -1, gRPC status or -1, size, encoded block, why a sidecar says that it answered itself or b"") of a
    response. Raises Malformed (RFC 9113 section 8.3.2). meshed: from a sidecar; what anybody else says in its place is removed."""
    names, values, secrets, plain = section
    if not names:
        raise Malformed("no fields")
    shape = _responses.get(names) or _responses.learn_untrusted(names)
    size = _check_values_untrusted(values, shape)
    status = values[shape.status]
    if not _is_status(status) or status == b"101":
        raise Malformed(":status is not a status of HTTP/2")
    length = _content_length_untrusted(values, shape) if shape.content_length >= 0 else -1
    grpc = _grpc_status_untrusted(values[shape.grpc_status]) if shape.grpc_status >= 0 else -1
    if shape.proxy_error < 0:
        return int(status), length, grpc, size, shape.encode(values, secrets, (), plain), b""
    if not meshed:
        return int(status), length, grpc, size, shape.encode(values, secrets, _OF_SIDECARS, plain), b""
    return int(status), length, grpc, size, shape.encode(values, secrets, (), plain), values[shape.proxy_error]


def read_trailers_untrusted(section: Section, strip: tuple[bytes, ...]) -> tuple[int, int, bytes]:
    """(gRPC status or -1, size, encoded block without `strip`) of a trailer section; the block is empty when nothing is left. Raises
    Malformed (8.1)."""
    names, values, secrets, plain = section
    if not names:
        return -1, 0, b""
    shape = _trailers.get(names) or _trailers.learn_untrusted(names)
    grpc = _grpc_status_untrusted(values[shape.grpc_status]) if shape.grpc_status >= 0 else -1
    return grpc, _check_values_untrusted(values, shape), shape.encode(values, secrets, strip, plain)
