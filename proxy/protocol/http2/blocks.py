"""Header blocks: decoded, checked, and kept ready to be sent on to a connection with tables of its own.

Theory of operation. We tell every peer SETTINGS_HEADER_TABLE_SIZE 0. Once it acknowledged that and announced the size 0 itself (RFC 7541
section 4.2), what a block means no longer depends on the blocks before it: decoding, checking and encoding it again are one function of
its bytes, and may be remembered across connections. A block is kept when it comes a second time, so that blocks that never repeat cost a
lookup and a small integer, no memory. Until both have come, a connection decodes with a table of 4096 bytes (RFC 9113 section 6.5.2) and
remembers nothing. RFC 9113 section 4.3.1 lets us end a connection that goes on without the announcement. We do not: some stacks announce it
late, or never, because their table is empty anyway. They cost no more than the 4 kB that any connection may cost before our SETTINGS.

Pure. `BlockReader` belongs to one connection; the memo is shared by the process and bounded.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

from core.spelling import Spellings, canonical
from proxy.protocol.http2 import frames
from proxy.protocol.http2.frames import ConnectionFault
from proxy.protocol.http2.hpack_codec import (
    NOTHING,
    Decoder,
    Field,
    HeaderListTooLarge,
    HpackFault,
    Section,
    announced_sizes_untrusted,
    encode,
    new_decoder,
    read_plain_untrusted,
)
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.http2.messages import Request, read_request_untrusted, read_response_untrusted, read_trailers_untrusted
from proxy.protocol.requests import HeadEdit, ResponseRule
from proxy.rescue import Cause, unreached

_MEMO_ENTRIES: Final = 512
_MEMO_BLOCK_BYTES: Final = 768
_SEEN_ENTRIES: Final = 4096

T = TypeVar("T")


class RequestHead(Request):
    """A checked request, as decisions see it (requests.RequestHead), ready to be encoded. Never changes, so that it can be remembered."""

    __slots__ = ("_block", "_edit", "bodiless")

    def __init__(self, section: Section, bodiless: bool) -> None:
        Request.__init__(self)
        read_request_untrusted(section, self)
        self.bodiless = bodiless
        self._edit: HeadEdit | None = None
        self._block = b""

    def values(self, names: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        """See requests.RequestHead."""
        shape = self.shape
        first = shape.first
        values = self.fields
        if (shape.repeated and not shape.repeated.isdisjoint(names)) or (shape.host < 0 and b"host" in names):
            return tuple(map(self._joined, names))
        return tuple([values[first[name]] if name in first else None for name in names])

    def respelled(self, names: Spellings) -> bool:
        """See requests.RequestHead."""
        return self.shape.respelled(names)

    def _joined(self, name: bytes) -> bytes | None:
        if name not in self.shape.first:
            return self.authority if name == b"host" else None  # what :authority becomes for apps that look at Host
        separator = b"; " if name == b"cookie" else b"\n"  # RFC 9113 section 8.2.3
        return separator.join([value for other, value in zip(self.shape.names, self.fields, strict=True) if other == name])

    def encoded(self, edit: HeadEdit) -> bytes:
        """The block to send, without a dynamic table: stripped names removed, added fields at the end."""
        if self._edit is not edit:
            rewritten = (edit.host or edit.retarget is not None) and self.shape.path >= 0
            fields, plain = (self._rewritten(edit), b"") if rewritten else (self.fields, self.plain)
            self._block = self.shape.encode(fields, self.secrets, edit.strip, plain) + encode_added(edit.add)
            self._edit = edit
        return self._block

    def _rewritten(self, edit: HeadEdit) -> tuple[bytes, ...]:
        """The values with another target and host in them."""
        values = list(self.fields)
        if edit.retarget is not None and self.target != b"*":
            values[self.shape.path] = edit.retarget(self.target)
        if edit.host:
            for at in (self.shape.authority, self.shape.host):
                if at >= 0:
                    values[at] = edit.host
        return tuple(values)


class ResponseHead:
    """A checked response head or 1xx. content_length, grpc_status: -1 when not given. block: encoded to be sent on. unreached: a sidecar
    answered, because it could not connect to its app for this cause."""

    __slots__ = ("block", "content_length", "grpc_status", "size", "status", "unreached")

    def __init__(self, section: Section, meshed: bool) -> None:
        self.status, self.content_length, self.grpc_status, self.size, self.block, error = read_response_untrusted(section, meshed)
        self.unreached: Cause | None = unreached(error) if error else None


class Trailers:
    """A checked trailer section. block: encoded to be sent on, empty when no field is left. grpc_status: -1 when not given."""

    __slots__ = ("block", "grpc_status", "size")

    def __init__(self, section: Section, strip: tuple[bytes, ...]) -> None:
        self.grpc_status, self.size, self.block = read_trailers_untrusted(section, strip)


class _Memo(Generic[T]):
    """What blocks mean, once they came twice."""

    def __init__(self) -> None:
        self.known: dict[bytes, T] = {}
        self._seen: set[int] = set()

    def remember(self, block: bytes, value: T) -> None:
        mark = hash(block)
        if mark not in self._seen:
            if len(self._seen) >= _SEEN_ENTRIES:
                self._seen.clear()
            self._seen.add(mark)
        elif len(block) <= _MEMO_BLOCK_BYTES:
            if len(self.known) >= _MEMO_ENTRIES:
                self.known.clear()
            self.known[block] = value


_open_requests: Final = _Memo[RequestHead]()
_bodiless_requests: Final = _Memo[RequestHead]()
_responses: Final = _Memo[ResponseHead]()
_responses_of_sidecars: Final = _Memo[ResponseHead]()
_trailers: Final = _Memo[Trailers]()

_added: dict[tuple[tuple[bytes, bytes], ...], bytes] = {}


def encode_added(fields: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """The fields an edit appends, encoded; remembered because an edit is constant for a connection."""
    if not fields:
        return b""
    block = _added.get(fields)
    if block is None:
        if len(_added) >= 256:
            _added.clear()
        block = _added[fields] = encode([(name, value, False) for name, value in fields])
    return block


_edited: dict[tuple[bytes, ResponseRule], bytes] = {}
_own_blocks: Final = new_decoder(0, 1 << 20)  # whatever the limits of connections: what it reads was checked against them


def edited_response(block: bytes, edit: ResponseRule) -> bytes:
    """A response head as `ResponseHead.block`, changed; remembered, because responses repeat."""
    known = _edited.get((block, edit))
    if known is not None:
        return known
    kept = block
    if edit.strip:
        kept = encode([field for field in _own_blocks.decode_untrusted(block) if field[0] not in edit.strip])
    made = kept + encode_added(edit.add)
    if len(block) <= _MEMO_BLOCK_BYTES:
        if len(_edited) >= _MEMO_ENTRIES:
            _edited.clear()
        _edited[block, edit] = made
    return made


def without_names(block: bytes, strip: tuple[bytes, ...]) -> bytes:
    """A trailer section as `Trailers.block`, without these names in any spelling; empty when no field is left."""
    names = set(map(canonical, strip))
    return encode([field for field in _own_blocks.decode_untrusted(block) if canonical(field[0]) not in names])


class BlockReader:
    """Decodes and checks the header blocks of one connection.

    The methods raise Malformed (a stream error), HeaderListTooLarge (431; the connection can go on) or ConnectionFault.
    """

    def __init__(self, limits: Http2Limits) -> None:
        self._limit = limits.header_list_bytes
        self._most = limits.header_count
        self._stateless = False
        self._acknowledged = False  # our table size of 0: from here on, no other may be announced
        self._empty = False  # the size announced last is 0
        self._table_bytes = 4096  # announced last
        self._meshed = False
        self._responses = _responses
        self._use(new_decoder(4096, limits.header_list_bytes))

    def _use(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._decode = decoder.decode_untrusted

    def believe(self) -> None:
        """The other end is a verified sidecar: its `PROXY_ERROR` field is believed."""
        self._meshed = True
        self._responses = _responses_of_sidecars

    def without_table(self) -> None:
        """The peer acknowledged the table size of 0."""
        self._acknowledged = True
        if self._empty:
            self._forget_table()

    def _forget_table(self) -> None:
        self._stateless = True
        self._use(new_decoder(0, self._limit))

    def _follow_table(self, block: bytes) -> None:
        """Note the table sizes that a block announces at its beginning. Raises ConnectionFault."""
        for size in announced_sizes_untrusted(block):
            self._table_bytes = size
            self._empty = size == 0
            if size and self._acknowledged:
                raise ConnectionFault(frames.COMPRESSION_ERROR, f"header table of {size} bytes after the acknowledgement of 0")
        if self._empty and self._acknowledged:
            self._forget_table()

    def request_untrusted(self, block: bytes, bodiless: bool) -> RequestHead:
        """A request's head; bodiless: the frame carried END_STREAM."""
        memo = _bodiless_requests if bodiless else _open_requests
        head = memo.known.get(block) if self._stateless else None
        if head is None:
            head = RequestHead(self._read(block), bodiless)
            if head.size > self._limit or len(head.fields) > self._most:
                raise HeaderListTooLarge
            if self._stateless:
                memo.remember(block, head)
        return head

    def response_untrusted(self, block: bytes) -> ResponseHead:
        """A response's head, final or 1xx."""
        head = self._responses.known.get(block) if self._stateless else None
        if head is None:
            head = ResponseHead(self._read(block), self._meshed)
            if head.size > self._limit:
                raise HeaderListTooLarge
            if self._stateless:
                self._responses.remember(block, head)
        return head

    def trailers_untrusted(self, block: bytes, strip: tuple[bytes, ...]) -> Trailers:
        """The trailer section of either end. strip: names to remove, as from the head: some receivers merge trailers into it."""
        if strip or not self._stateless:
            return self._trailers(block, strip)
        trailers = _trailers.known.get(block)
        if trailers is None:
            trailers = self._trailers(block, strip)
            _trailers.remember(block, trailers)
        return trailers

    def _trailers(self, block: bytes, strip: tuple[bytes, ...]) -> Trailers:
        trailers = Trailers(self._read(block), strip)
        if trailers.size > self._limit:
            raise HeaderListTooLarge
        return trailers

    def discard_untrusted(self, block: bytes) -> None:
        """A block nobody wants any more; decoded only where the table must follow."""
        if not self._stateless:
            self._fields(block)

    def _read(self, block: bytes) -> Section:
        if self._stateless:
            section = read_plain_untrusted(block)
            if section[0]:
                return section
        fields = self._fields(block)
        if not fields:
            return NOTHING
        names, values, secrets = zip(*fields, strict=True)
        return names, values, secrets, b""

    def _fields(self, block: bytes) -> list[Field]:
        followed = not self._stateless
        if followed:
            self._follow_table(block)
        try:
            fields = self._decode(block)
        except HpackFault as fault:
            raise ConnectionFault(frames.COMPRESSION_ERROR, f"header block: {fault}") from None
        except HeaderListTooLarge:
            if self._stateless:
                raise
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "header list larger than allowed") from None
        if followed and self._decoder.table_size != self._table_bytes:  # the compiled decoder takes it anywhere
            raise ConnectionFault(frames.COMPRESSION_ERROR, "a table size behind the beginning of a header block")
        return fields
