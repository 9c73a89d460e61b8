"""HPACK behind one door: the compiled codec of jh2 where it is installed, the pure `hpack` package elsewhere (RFC 7541).

Decoding keeps the state of one connection. Encoding keeps none: nothing enters a dynamic table and nothing refers to one, so a block
is a function of its fields, may be remembered, and fits any connection whose first block began with `NO_TABLE`. Blocks of a peer are
not passed on as they came: our decoder may forgive what the next one does not (an oddly padded Huffman string, a table size in the middle
of a block), and that would end a connection that other clients' streams share. The exception is what `read_plain_untrusted` accepts: a
form so narrow that every decoder reads it the same way.

jh2's decoder is a private module, and panics on a block that ends inside a field: Rust writes that to standard error by itself, and pyo3
raises it as a BaseException. So `is_whole_untrusted` checks first that the last field ends where the block does.
"""

from __future__ import annotations

from typing import Any, Final

_LONG: Final = 4


def _strings_behind(first: int) -> int:
    """How many strings follow the first byte of a field, plus `_LONG` when its number goes on first (RFC 7541 section 6)."""
    if first >= 0x80:
        strings, limit = 0, 0x7F
    elif first >= 0x40:
        strings, limit = 1, 0x3F
    elif first >= 0x20:
        strings, limit = 0, 0x1F
    else:
        strings, limit = 1, 0x0F
    number = first & limit
    return strings + (strings and number == 0) + (_LONG if number == limit else 0)


_STRINGS: Final = bytes(map(_strings_behind, range(256)))

_compiled: Any = None
try:
    from jh2 import _hazmat
except ImportError:  # no wheel for this platform: slower, same answers (the tests run both)
    pass
else:
    _compiled = _hazmat

Field = tuple[bytes, bytes, bool]
"""Name, value, and whether it must never enter a compression table (RFC 7541 section 7.1.3)."""

Section = tuple[tuple[bytes, ...], tuple[bytes, ...], tuple[bool, ...], bytes]
"""A header block read: names, values, which are secret, and the block itself if it may be sent on as it came, else nothing."""

NOTHING: Final[Section] = ((), (), (), b"")

NO_TABLE: Final = b"\x20"
"""Dynamic table size update to 0: the first bytes of the first block on a connection."""


class HpackFault(Exception):
    """The block cannot be decoded; the tables of both ends disagree from here on."""


class HeaderListTooLarge(Exception):
    """Decoding stopped because the list is larger than allowed; the state of the table is lost unless it has size 0."""


class CompiledDecoder:
    """jh2's Rust decoder: 2-5 us a block."""

    def __init__(self, table_size: int, max_list: int) -> None:
        self._decoder = _compiled.Decoder()
        self._decoder.max_allowed_table_size = table_size
        self._decoder.header_table_size = table_size
        self._decoder.max_header_list_size = max_list
        self._decode = self._decoder.decode

    def decode_untrusted(self, block: bytes) -> list[Field]:
        """Fields in order. Raises HpackFault, HeaderListTooLarge."""
        if not is_whole_untrusted(block):
            raise HpackFault("truncated header block")
        try:
            fields: list[Field] = self._decode(block, True)
        except _compiled.OversizedHeaderListError as error:
            raise HeaderListTooLarge from error
        except Exception as error:
            raise HpackFault(str(error)) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise HpackFault("the decoder panicked") from None
        return fields

    @property
    def table_size(self) -> int:
        """Bytes that the peer said its table may take."""
        return int(self._decoder.header_table_size)


class PythonDecoder:
    """The `hpack` package: 25-45 us a block. Imported only where it is used, because its Huffman tables take memory."""

    def __init__(self, table_size: int, max_list: int) -> None:
        import hpack

        self._too_large = hpack.OversizedHeaderListError
        self._decoder = hpack.Decoder(max_header_list_size=max_list)
        self._decoder.max_allowed_table_size = table_size
        self._decoder.header_table_size = table_size

    def decode_untrusted(self, block: bytes) -> list[Field]:
        """Fields in order. Raises HpackFault, HeaderListTooLarge."""
        try:
            fields = self._decoder.decode(block, raw=True)
        except self._too_large as error:
            raise HeaderListTooLarge from error
        except Exception as error:
            raise HpackFault(str(error)) from error
        return [(bytes(f[0]), bytes(f[1]), not getattr(f, "indexable", True)) for f in fields]

    @property
    def table_size(self) -> int:
        """Bytes that the peer said its table may take."""
        return int(self._decoder.header_table_size)


Decoder = CompiledDecoder | PythonDecoder


def new_decoder(table_size: int, max_list: int) -> Decoder:
    """The decoder of one connection. table_size: what we allow the peer; max_list: bytes as RFC 9113 section 6.5.2 counts them."""
    return PythonDecoder(table_size, max_list) if _compiled is None else CompiledDecoder(table_size, max_list)


def _integer(value: int, prefix_bits: int, pattern: int) -> bytes:
    """RFC 7541 section 5.1."""
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes((pattern | value,))
    out = bytearray((pattern | limit,))
    value -= limit
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def announced_sizes_untrusted(block: bytes) -> list[int]:
    """The dynamic table size updates a block begins with, in order (RFC 7541 sections 4.2, 6.3). Two are all that an encoder needs; what
    does not end is left for the decoder to refuse."""
    sizes: list[int] = []
    at = 0
    while len(sizes) < 8 and at < len(block) and block[at] & 0xE0 == 0x20:
        size = block[at] & 0x1F
        at += 1
        if size == 0x1F:
            for shift in range(0, 35, 7):
                if at >= len(block):
                    return sizes
                octet = block[at]
                at += 1
                size += (octet & 0x7F) << shift
                if octet < 128:
                    break
        sizes.append(size)
    return sizes


def is_whole_untrusted(block: bytes) -> bool:
    """Whether the last field of a block ends where the block does; says nothing about what the fields are."""
    size = len(block)
    at = 0
    try:
        while at < size:
            strings = _STRINGS[block[at]]
            at += 1
            if strings >= _LONG:
                strings -= _LONG
                while block[at] >= 128:
                    at += 1
                at += 1
            for _ in range(strings):
                length = block[at] & 0x7F
                at += 1
                if length == 0x7F:
                    shift = 0
                    while block[at] >= 128 and shift < 28:
                        length += (block[at] & 0x7F) << shift
                        shift += 7
                        at += 1
                    length += block[at] << shift
                    at += 1
                at += length
    except IndexError:
        return False
    return at == size


_LENGTHS: Final = tuple(_integer(length, 7, 0) for length in range(1024))
# RFC 7541 appendix A, the names in order; where one occurs again the first index is used.
_STATIC: Final = (
    b":authority", b":method", b":method", b":path", b":path", b":scheme", b":scheme", b":status", b":status", b":status",
    b":status", b":status", b":status", b":status", b"accept-charset", b"accept-encoding", b"accept-language", b"accept-ranges",
    b"accept", b"access-control-allow-origin", b"age", b"allow", b"authorization", b"cache-control", b"content-disposition",
    b"content-encoding", b"content-language", b"content-length", b"content-location", b"content-range", b"content-type", b"cookie",
    b"date", b"etag", b"expect", b"expires", b"from", b"host", b"if-match", b"if-modified-since", b"if-none-match", b"if-range",
    b"if-unmodified-since", b"last-modified", b"link", b"location", b"max-forwards", b"proxy-authenticate", b"proxy-authorization",
    b"range", b"referer", b"refresh", b"retry-after", b"server", b"set-cookie", b"strict-transport-security", b"transfer-encoding",
    b"user-agent", b"vary", b"via", b"www-authenticate",
)  # fmt: skip
# The fields of which the table has the value too, at consecutive indexes.
_STATIC_FIELDS: Final = (
    (b":method", 2, (b"GET", b"POST")),
    (b":path", 4, (b"/", b"/index.html")),
    (b":scheme", 6, (b"http", b"https")),
    (b":status", 8, (b"200", b"204", b"206", b"304", b"400", b"404", b"500")),
    (b"accept-encoding", 16, (b"gzip, deflate",)),
)
_STATIC_VALUES: Final = {
    name: {value: bytes((0x80 | at,)) for at, value in enumerate(values, start)} for name, start, values in _STATIC_FIELDS
}
_STATIC_NAMES: Final = {name: at for at, name in reversed(list(enumerate(_STATIC, 1)))}


_STATIC_WHOLE: Final = tuple(
    {at + start: value for _, start, values in _STATIC_FIELDS for at, value in enumerate(values)}.get(index, b"") for index in range(62)
)
_PLAIN_BYTES: Final = 4096  # of a block: what a byte can cost is bounded by the decoder, not here
_NO_SECRETS: Final = tuple((False,) * count for count in range(64))


def read_plain_untrusted(block: bytes) -> Section:
    """A block in the form that we send ourselves: names of the static table or in full, values in full, whole fields of the static
    table; no Huffman coding, no dynamic table, integers as short as they can be. Any decoder reads it in the same way.

    `NOTHING` for any other block, which is for the decoder, also to say what is wrong with it.
    """
    size = len(block)
    if size > _PLAIN_BYTES:
        return NOTHING
    names: list[bytes] = []
    values: list[bytes] = []
    secrets: list[int] = []
    at = 0
    try:
        while at < size:
            first = block[at]
            at += 1
            if first >= 0x20:  # a whole field; or something that touches a table
                if not 0x81 <= first <= 0xBD:
                    return NOTHING
                names.append(_STATIC[first - 0x81])
                values.append(_STATIC_WHOLE[first - 0x80])
                continue
            if first & 0x10:
                secrets.append(len(names))
            index = first & 0x0F
            if index:
                if index == 0x0F:
                    index += block[at]
                    at += 1
                names.append(_STATIC[index - 1])
            else:
                stop = at + 1 + block[at]
                if stop > at + 127:
                    return NOTHING
                names.append(block[at + 1 : stop])
                at = stop
            length = block[at]
            at += 1
            if length >= 127:
                length, at = _long_length_untrusted(block, at, length)
            values.append(block[at : at + length])
            at += length
    except IndexError:
        return NOTHING
    return _section(names, values, secrets, block) if at == size else NOTHING


def _long_length_untrusted(block: bytes, at: int, first: int) -> tuple[int, int]:
    """A length of two or three bytes, of which the first was read, and where it ends. Raises IndexError for what is not plain."""
    more = block[at]
    if first > 127:
        raise IndexError  # Huffman coding
    if more < 128:
        return 127 + more, at + 1
    last = block[at + 1]
    if not 0 < last < 128:
        raise IndexError  # longer than it could be, or than a plain block
    return more - 1 + (last << 7), at + 2


def _section(names: list[bytes], values: list[bytes], secrets: list[int], block: bytes) -> Section:
    count = len(names)
    if not secrets and count < 64:
        return tuple(names), tuple(values), _NO_SECRETS[count], block
    return tuple(names), tuple(values), tuple([number in secrets for number in range(count)]), block


def name_prefix(name: bytes, secret: bool) -> bytes:
    """A literal field up to its value: not indexed, or never indexed (RFC 7541 sections 6.2.2, 6.2.3); the name from the static table."""
    pattern = 0x10 if secret else 0x00
    index = _STATIC_NAMES.get(name)
    if index is not None:
        return _integer(index, 4, pattern)
    return bytes((pattern,)) + _integer(len(name), 7, 0) + name


def value_literal(value: bytes) -> bytes:
    """The value of a literal field, without Huffman coding."""
    size = len(value)
    return (_LENGTHS[size] if size < 1024 else _integer(size, 7, 0)) + value


def indexed_values(name: bytes, secret: bool) -> dict[bytes, bytes]:
    """Value -> the whole field as one byte, for the values that the static table has with this name (RFC 7541 section 6.1)."""
    return {} if secret else _STATIC_VALUES.get(name, {})


def encode_values(prefixes: tuple[bytes, ...], values: tuple[bytes, ...], indexed: tuple[tuple[int, dict[bytes, bytes]], ...]) -> bytes:
    """A block from its names' prefixes and its values; indexed: which of them may be fields of the static table. The fastest way
    measured: half of what the compiled encoder takes, because the names of a message are known before it comes."""
    parts = [b""] * (3 * len(values))
    parts[::3] = prefixes
    try:
        parts[1::3] = [_LENGTHS[size] for size in map(len, values)]
    except IndexError:
        parts[1::3] = [_integer(len(value), 7, 0) for value in values]
    parts[2::3] = values
    for at, known in indexed:
        whole = known.get(values[at])
        if whole is not None:
            parts[3 * at : 3 * at + 3] = (whole, b"", b"")
    return b"".join(parts)


def encode(fields: list[Field]) -> bytes:
    """Fields -> block that refers to the static table only."""
    parts = []
    for name, value, secret in fields:
        whole = indexed_values(name, secret).get(value)
        parts.append(name_prefix(name, secret) + value_literal(value) if whole is None else whole)
    return b"".join(parts)
