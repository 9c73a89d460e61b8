"""HPACK behind one door: the compiled codec of jh2 where it is installed, the pure `hpack` package elsewhere (RFC 7541).

Decoding keeps the state of one connection. Encoding keeps none: nothing enters a dynamic table and nothing refers to one, so a block
is a function of its fields, may be remembered, and fits any connection whose first block began with `NO_TABLE`. Blocks of a peer are
never passed on as they came: what one decoder forgives (an oddly padded Huffman string, a table size in the middle of a block) would
kill the connection that another client's streams share.

jh2's decoder is a private module and panics on a truncated block, which pyo3 raises as a BaseException; that is an `HpackFault` like
any other, and the decoder is not used again because the connection ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import hpack

_compiled: Any = None
try:
    from jh2 import _hazmat
except ImportError:  # no wheel for this platform: slower, same answers (the tests run both)
    pass
else:
    _compiled = _hazmat

Field = tuple[bytes, bytes, bool]
"""Name, value, and whether it must never enter a compression table (RFC 7541 section 7.1.3)."""

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
        try:
            fields: list[Field] = self._decode(block, True)
        except _compiled.OversizedHeaderListError as error:
            raise HeaderListTooLarge from error
        except Exception as error:
            raise HpackFault(str(error)) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise HpackFault("truncated header block") from None
        return fields


class PythonDecoder:
    """The `hpack` package: 25-45 us a block."""

    def __init__(self, table_size: int, max_list: int) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=max_list)
        self._decoder.max_allowed_table_size = table_size
        self._decoder.header_table_size = table_size

    def decode_untrusted(self, block: bytes) -> list[Field]:
        """Fields in order. Raises HpackFault, HeaderListTooLarge."""
        try:
            fields = self._decoder.decode(block, raw=True)
        except hpack.OversizedHeaderListError as error:
            raise HeaderListTooLarge from error
        except Exception as error:
            raise HpackFault(str(error)) from error
        return [(bytes(f[0]), bytes(f[1]), not getattr(f, "indexable", True)) for f in fields]


Decoder = CompiledDecoder | PythonDecoder


def new_decoder(table_size: int, max_list: int) -> Decoder:
    """The decoder of one connection. table_size: what we allow the peer; max_list: bytes as RFC 9113 section 6.5.2 counts them."""
    return PythonDecoder(table_size, max_list) if _compiled is None else CompiledDecoder(table_size, max_list)


def compiled_encode() -> Callable[[list[Field]], bytes]:
    """jh2's encoder without a table and without Huffman coding: both ends save more CPU than 70 bytes cost on a pod network."""
    encoder = _compiled.Encoder()
    encoder.header_table_size = 0
    encoder.encode([])  # it announces the new size once; we announce it ourselves, per connection
    encode = encoder.encode

    def run(fields: list[Field]) -> bytes:
        block: bytes = encode(fields, False)
        return block

    return run


def python_encode() -> Callable[[list[Field]], bytes]:
    """The same with the `hpack` package."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    encoder.encode([])

    def run(fields: list[Field]) -> bytes:
        headers = [hpack.NeverIndexedHeaderTuple(n, v) if secret else hpack.HeaderTuple(n, v) for n, v, secret in fields]
        block: bytes = encoder.encode(headers, huffman=False)
        return block

    return run


encode: Callable[[list[Field]], bytes] = python_encode() if _compiled is None else compiled_encode()
"""Fields -> block that refers to the static table only."""
