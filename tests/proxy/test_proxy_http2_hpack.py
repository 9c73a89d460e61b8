"""Header blocks: two decoders that must agree, one encoder that both must understand, and bytes of any kind."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.http2 import hpack_codec
from proxy.protocol.http2.blocks import BlockReader
from proxy.protocol.http2.frames import ConnectionFault
from proxy.protocol.http2.hpack_codec import CompiledDecoder, HeaderListTooLarge, HpackFault, PythonDecoder, encode
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.http2.messages import Malformed
from proxy.protocol.requests import HeadEdit
from tests.proxy.http2_fakes import GRPC, Chain

NAMES = st.one_of(st.sampled_from([b":path", b"cookie", b"x-a", b"authorization"]), st.binary(min_size=1, max_size=20))
FIELDS = st.lists(st.tuples(NAMES, st.one_of(st.binary(max_size=40), st.just(b"v" * 300)), st.booleans()), max_size=8)
DECODERS = pytest.mark.parametrize("decoder", [CompiledDecoder, PythonDecoder])


@given(FIELDS)
def test_both_decoders_read_what_we_encode(fields: list[hpack_codec.Field]) -> None:
    block = encode(fields)
    for decoder in (CompiledDecoder, PythonDecoder):
        assert decoder(0, 1 << 20).decode_untrusted(block) == fields


@given(st.lists(FIELDS, max_size=4), st.booleans())
def test_the_decoders_agree_on_blocks_that_use_the_dynamic_table(messages: list[list[hpack_codec.Field]], huffman: bool) -> None:
    encoder = hpack.Encoder()
    compiled, python = CompiledDecoder(4096, 1 << 20), PythonDecoder(4096, 1 << 20)
    for fields in messages:
        headers = [hpack.NeverIndexedHeaderTuple(n, v) if secret else hpack.HeaderTuple(n, v) for n, v, secret in fields]
        block = encoder.encode(headers, huffman=huffman)
        decoded = compiled.decode_untrusted(block)
        assert decoded == python.decode_untrusted(block)
        # hpack sends a secret field that is in the table already as an index, so only names and values are certain
        assert [field[:2] for field in decoded] == [field[:2] for field in fields]


@DECODERS
def test_a_dynamic_table_of_size_zero_knows_no_dynamic_entry(decoder: type[CompiledDecoder] | type[PythonDecoder]) -> None:
    reader = decoder(0, 1 << 20)
    assert reader.decode_untrusted(b"\x20\x40\x01a\x01b") == [(b"a", b"b", False)]
    for block in (b"\xbe", b"\x21", b"\x3f\x01", b"\x80"):
        with pytest.raises(HpackFault):
            decoder(0, 1 << 20).decode_untrusted(block)


@DECODERS
def test_a_header_bomb_is_stopped_while_decoding(decoder: type[CompiledDecoder] | type[PythonDecoder]) -> None:
    bomb = b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 1000  # one entry of 4 kB, a thousand references of one byte
    with pytest.raises(HeaderListTooLarge):
        decoder(4096, 65536).decode_untrusted(bomb)


@given(st.binary(max_size=200))
def test_any_bytes_are_fields_or_the_declared_error(block: bytes) -> None:
    for decoder in (CompiledDecoder, PythonDecoder):
        try:
            fields = decoder(4096, 4096).decode_untrusted(block)
        except (HpackFault, HeaderListTooLarge):
            continue
        assert all(len(field) == 3 for field in fields)


@given(st.binary(max_size=200), st.booleans())
def test_a_block_reader_raises_only_what_it_declares(block: bytes, acknowledged: bool) -> None:
    reader = BlockReader(Http2Limits(header_list_bytes=2048))
    if acknowledged:
        reader.without_table()
    for read in (
        lambda: reader.request_untrusted(block, True),
        lambda: reader.response_untrusted(block),
        lambda: reader.trailers_untrusted(block, (b"a",)),
    ):
        try:
            read()
        except (Malformed, HeaderListTooLarge, ConnectionFault):
            pass


def test_a_truncated_block_is_an_error_and_not_a_crash() -> None:
    for cut in range(1, 12):
        with pytest.raises(HpackFault):
            CompiledDecoder(0, 1 << 20).decode_untrusted((b"\x00\x03abc\x07v" + b"w" * 6)[:cut])


def test_secret_fields_stay_secret_and_no_block_uses_a_table() -> None:
    fields = [(b":method", b"GET", False), (b"authorization", b"s3cret", True), (b"x", b"", True), (b"long", b"v" * 2000, False)]
    block = encode(fields)
    assert PythonDecoder(0, 1 << 20).decode_untrusted(block) == fields
    assert b"\x1f\x08\x06s3cret" in block  # never indexed, name from the static table


def head(reader: BlockReader, fields: list[tuple[bytes, bytes]]) -> object:
    return reader.request_untrusted(encode([(n, v, False) for n, v in fields]), True)


GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/memo"), (b":authority", b"memo.test")]


def test_a_repeated_block_is_remembered_only_once_the_peer_gave_up_its_table() -> None:
    early, late = BlockReader(Http2Limits()), BlockReader(Http2Limits())
    assert head(early, GET) is not head(early, GET)
    late.without_table()
    second = [head(late, GET) for _ in range(2)][1]
    assert head(late, GET) is second
    assert head(early, GET) is not second


def test_a_remembered_head_is_encoded_for_each_edit() -> None:
    reader = BlockReader(Http2Limits())
    reader.without_table()
    fields = [*GET, (b"secret-id", b"forged")]
    edits = [HeadEdit(), HeadEdit((b"secret-id",)), HeadEdit((b"secret-id",), ((b"secret-id", b"true"),)), HeadEdit((b"other",))]
    expected = [[b"forged"], [], [b"true"], [b"forged"]]
    for _ in range(3):
        for edit, wanted in zip(edits, expected, strict=True):
            block = reader.request_untrusted(encode([(n, v, False) for n, v in fields]), True).encoded(edit)
            got = PythonDecoder(0, 1 << 20).decode_untrusted(block)
            assert [v for n, v, _ in got if n == b"secret-id"] == wanted


def test_what_is_remembered_is_bounded() -> None:
    from proxy.protocol.http2 import blocks, messages

    reader = BlockReader(Http2Limits())
    reader.without_table()
    for i in range(1500):
        fields = [*GET, (b"x-%d" % i, b"1")]
        head(reader, fields)
        head(reader, fields)
    assert len(blocks._bodiless_requests.known) <= 512
    assert len(messages._requests._known) <= 512


def test_a_secret_field_stays_secret_among_messages_of_the_same_names() -> None:
    reader = BlockReader(Http2Limits())
    reader.without_table()
    for secret in (False, True, False, True):
        fields = [*((n, v, False) for n, v in GET), (b"x-token", b"t", secret)]
        for _ in range(3):
            block = reader.request_untrusted(encode(fields), True).encoded(HeadEdit())
            assert PythonDecoder(0, 1 << 20).decode_untrusted(block) == fields


def test_the_engine_runs_on_the_python_decoder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpack_codec, "_compiled", None)
    chain = Chain()
    stream = chain.ask(GRPC, b"ping")
    chain.answer(1, body=b"pong")
    assert (chain.server.body(1), chain.client.body(stream)) == (b"ping", b"pong")
    assert isinstance(hpack_codec.new_decoder(0, 1), PythonDecoder)


def test_names_of_the_static_table_are_where_the_rfc_has_them() -> None:
    table = [name for name, _ in hpack.hpack.HeaderTable.STATIC_TABLE]
    assert list(hpack_codec._STATIC) == table
    for name in set(table):
        block = hpack_codec.name_prefix(name, False) + hpack_codec.value_literal(b"v")
        assert PythonDecoder(0, 1 << 20).decode_untrusted(block) == [(name, b"v", False)]
