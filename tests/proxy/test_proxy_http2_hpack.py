"""Header blocks: two decoders that must agree, one encoder that both must understand, and bytes of any kind."""

from __future__ import annotations

from collections.abc import Callable

import h2.events
import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.http2 import Http2Upstream, blocks, hpack_codec
from proxy.protocol.http2.blocks import BlockReader, RequestHead, edited_response
from proxy.protocol.http2.frames import COMPRESSION_ERROR, PREFACE, ConnectionFault
from proxy.protocol.http2.hpack_codec import CompiledDecoder, HeaderListTooLarge, HpackFault, PythonDecoder, encode, is_whole_untrusted
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.http2.messages import Malformed
from proxy.protocol.requests import HeadEdit, ResponseRule
from tests.proxy.http2_fakes import GRPC, HEADERS, SETTINGS, Chain, FakeSink, frame

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
        give_up_table(reader)
    for read in (
        lambda: reader.request_untrusted(block, True),
        lambda: reader.response_untrusted(block),
        lambda: reader.trailers_untrusted(block, (b"a",)),
    ):
        try:
            read()
        except (Malformed, HeaderListTooLarge, ConnectionFault):
            pass


def test_a_truncated_block_is_an_error_and_rust_has_nothing_to_say_about_it(capfd: pytest.CaptureFixture[str]) -> None:
    for cut in range(1, 12):
        with pytest.raises(HpackFault):
            CompiledDecoder(0, 1 << 20).decode_untrusted((b"\x00\x03abc\x07v" + b"w" * 6)[:cut])
    for whole in (b"\x7f\x80\x01\x01a", b"\xff\x80\x01", b"\x3f\xe1\x1f\x82", b"\x00\x7f\x01" + b"n" * 128 + b"\x7f\x81\x01" + b"v" * 256):
        for cut in range(1, len(whole)):
            try:
                CompiledDecoder(4096, 1 << 20).decode_untrusted(whole[:cut])
            except HpackFault:
                pass
    assert capfd.readouterr().err == ""


@given(FIELDS, st.booleans(), st.data())
def test_a_block_is_whole_where_a_field_ends_and_nowhere_else(fields: list[hpack_codec.Field], huffman: bool, data: st.DataObject) -> None:
    encoder = hpack.Encoder()
    ends, block = {0}, b""
    for name, value, secret in fields:
        block += encoder.encode([hpack.NeverIndexedHeaderTuple(name, value) if secret else hpack.HeaderTuple(name, value)], huffman=huffman)
        ends.add(len(block))
    cut = data.draw(st.integers(0, len(block)))
    assert is_whole_untrusted(block[:cut]) == (cut in ends)


@given(st.binary(max_size=200))
def test_the_compiled_decoder_panics_on_no_block(block: bytes) -> None:
    try:
        CompiledDecoder(4096, 4096).decode_untrusted(block)
    except HeaderListTooLarge:
        pass
    except HpackFault as fault:
        assert "panicked" not in str(fault)


def test_secret_fields_stay_secret_and_no_block_uses_a_table() -> None:
    fields = [(b":method", b"GET", False), (b"authorization", b"s3cret", True), (b"x", b"", True), (b"long", b"v" * 2000, False)]
    block = encode(fields)
    assert PythonDecoder(0, 1 << 20).decode_untrusted(block) == fields
    assert b"\x1f\x08\x06s3cret" in block  # never indexed, name from the static table


def give_up_table(reader: BlockReader) -> None:
    """What a peer does on our SETTINGS: acknowledge, and begin the next block with a table size of 0."""
    reader.without_table()
    reader.discard_untrusted(hpack_codec.NO_TABLE)


def head(reader: BlockReader, fields: list[tuple[bytes, bytes]]) -> object:
    return reader.request_untrusted(encode([(n, v, False) for n, v in fields]), True)


GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/memo"), (b":authority", b"memo.test")]


def test_a_repeated_block_is_remembered_only_once_the_peer_gave_up_its_table() -> None:
    early, late = BlockReader(Http2Limits()), BlockReader(Http2Limits())
    assert head(early, GET) is not head(early, GET)
    give_up_table(late)
    second = [head(late, GET) for _ in range(2)][1]
    assert head(late, GET) is second
    assert head(early, GET) is not second


def indexing(path: str = "/memo") -> list[tuple[str, str]]:
    return [(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "memo.test"), ("x-tenant", "t1")]


def early_client(fields: list[tuple[str, str]], count: int) -> list[bytes]:
    """Blocks that use the default table, as a client sends them that has not read our SETTINGS yet."""
    encoder = hpack.Encoder()
    return [encoder.encode(fields) for _ in range(count)]


def test_until_our_settings_are_acknowledged_the_default_table_may_be_used() -> None:
    chain = Chain(start=False)
    blocks = early_client(indexing(), 4)
    assert len(blocks[-1]) < len(blocks[0]), "the table is used"
    frames_out = [frame(HEADERS, 5, 2 * n + 1, block) for n, block in enumerate(blocks)]
    chain.near.received(PREFACE + frame(SETTINGS, 0, 0) + b"".join(frames_out))
    assert [dict(zip(seen.shape.names, seen.fields, strict=True))[b"x-tenant"] for seen in chain.gate.seen] == [b"t1"] * 4
    assert not chain.client_sink.fate


@pytest.mark.parametrize("late", [0, 1, 3])
def test_a_client_that_reduces_its_table_late_is_served_until_it_does(late: int) -> None:
    chain = Chain(start=False)
    encoder = hpack.Encoder()
    chain.near.received(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 1, encoder.encode(indexing())))
    chain.near.received(frame(SETTINGS, 1, 0))
    for n in range(late):
        chain.near.received(frame(HEADERS, 5, 2 * n + 3, encoder.encode(indexing())))
    encoder.header_table_size = 0
    chain.near.received(frame(HEADERS, 5, 2 * late + 3, encoder.encode(indexing())))
    chain.near.received(frame(HEADERS, 5, 2 * late + 5, encoder.encode(indexing("/other"))))
    assert [seen.target for seen in chain.gate.seen] == [b"/memo"] * (late + 2) + [b"/other"]
    assert not chain.client_sink.fate


def test_an_upstream_may_use_the_default_table_as_well() -> None:
    chain = Chain()
    encoder = hpack.Encoder()
    upstream = Http2Upstream(sink := FakeSink(), Http2Limits())
    chain.gate.upstreams = [upstream]
    upstream.received(frame(SETTINGS, 0, 0))
    fields = [(":status", "200"), ("server", "early"), ("x-a", "b")]
    for n in range(3):
        stream = chain.ask()
        upstream.received(frame(HEADERS, 5, 2 * n + 1, encoder.encode(fields)))
        chain.run()
        assert chain.client.headers(stream, h2.events.ResponseReceived) == dict(fields)
    assert not sink.fate


def test_a_block_that_needs_the_table_is_never_answered_from_memory() -> None:
    known, early = BlockReader(Http2Limits()), BlockReader(Http2Limits())
    give_up_table(known)
    inserting, using = early_client(indexing(), 2)
    for _ in range(3):
        known.request_untrusted(inserting, True)  # with a table of size 0, this is a block like any other
    assert early.request_untrusted(inserting, True).fields[-1] == b"t1"
    assert early.request_untrusted(using, True).fields[-1] == b"t1"
    early.without_table()  # acknowledged, not announced: the table is still followed
    early.request_untrusted(inserting, True)
    assert early.request_untrusted(using, True).fields[-1] == b"t1"


@pytest.mark.parametrize("size", [b"\x21", b"\x3f\xe1\x1f", b"\x20\x3f\xe1\x1f"])
@pytest.mark.parametrize("give_up", [BlockReader.without_table, give_up_table])
def test_the_table_stays_given_up(size: bytes, give_up: Callable[[BlockReader], None]) -> None:
    reader = BlockReader(Http2Limits())
    block = size + encode([(n, v, False) for n, v in GET])
    assert reader.request_untrusted(block, True).target == b"/memo"
    give_up(reader)
    with pytest.raises(ConnectionFault) as caught:
        reader.request_untrusted(block, True)
    assert caught.value.code == COMPRESSION_ERROR


def test_a_peer_that_announced_no_table_before_the_acknowledgement_need_not_repeat_it() -> None:
    reader = BlockReader(Http2Limits())
    reader.discard_untrusted(hpack_codec.NO_TABLE)
    reader.without_table()
    assert [head(reader, GET) for _ in range(3)][-1] is head(reader, GET)


@given(st.binary(max_size=12), st.integers(0, 1 << 40))
def test_announced_sizes_are_read_as_the_decoder_reads_them(noise: bytes, size: int) -> None:
    hpack_codec.announced_sizes_untrusted(noise)
    if size < 1 << 35:
        assert hpack_codec.announced_sizes_untrusted(hpack_codec._integer(size, 5, 0x20) + b"\x82" + noise) == [size]


def test_a_remembered_head_is_encoded_for_each_edit() -> None:
    reader = BlockReader(Http2Limits())
    give_up_table(reader)
    fields = [*GET, (b"secret-id", b"forged")]
    edits = [HeadEdit(), HeadEdit((b"secret-id",)), HeadEdit((b"secret-id",), ((b"secret-id", b"true"),)), HeadEdit((b"other",))]
    expected = [[b"forged"], [], [b"true"], [b"forged"]]
    for _ in range(3):
        for edit, wanted in zip(edits, expected, strict=True):
            block = reader.request_untrusted(encode([(n, v, False) for n, v in fields]), True).encoded(edit)
            got = PythonDecoder(0, 1 << 20).decode_untrusted(block)
            assert [v for n, v, _ in got if n == b"secret-id"] == wanted


def test_a_rewritten_head_differs_in_path_and_host_only() -> None:
    reader = BlockReader(Http2Limits())
    give_up_table(reader)
    fields = [*((n, v, False) for n, v in GET), (b"host", dict(GET)[b":authority"], False), (b"x-token", b"t", True)]
    edit = HeadEdit((), ((b"x-new", b"1"),), b"inner", lambda target: b"/new" + target)
    for _ in range(3):
        sent = PythonDecoder(0, 1 << 20).decode_untrusted(reader.request_untrusted(encode(fields), True).encoded(edit))
        changed = {b":path": b"/new" + dict(GET)[b":path"], b":authority": b"inner", b"host": b"inner"}
        assert sent == [*((n, changed.get(n, v), secret) for n, v, secret in fields), (b"x-new", b"1", False)]
        assert PythonDecoder(0, 1 << 20).decode_untrusted(reader.request_untrusted(encode(fields), True).encoded(HeadEdit())) == fields


def test_a_tunnel_keeps_its_target_and_an_asterisk_is_no_path() -> None:
    edit = HeadEdit(host=b"inner", retarget=lambda target: b"/new" + target)

    def sent(*fields: tuple[bytes, bytes]) -> dict[bytes, bytes]:
        names, values = zip(*fields, strict=True)
        block = RequestHead((names, values, (False,) * len(names), b""), False).encoded(edit)
        return {n: v for n, v, _ in PythonDecoder(0, 1 << 20).decode_untrusted(block)}

    common = ((b":scheme", b"http"), (b":authority", b"a:1"))
    assert sent((b":method", b"CONNECT"), (b":authority", b"a:1"))[b":authority"] == b"a:1"
    extended = sent((b":method", b"CONNECT"), (b":protocol", b"websocket"), *common, (b":path", b"/ws"))
    assert (extended[b":path"], extended[b":authority"]) == (b"/new/ws", b"inner")
    asterisk = sent((b":method", b"OPTIONS"), *common, (b":path", b"*"))
    assert (asterisk[b":path"], asterisk[b":authority"]) == (b"*", b"inner")


def test_an_edited_answer_differs_in_these_fields_only() -> None:
    fields = [(b":status", b"200", False), (b"server", b"x", False), (b"x-set", b"1", False), (b"set-cookie", b"c", True)]
    edit = ResponseRule((b"server", b"x-set"), ((b"x-set", b"new"), (b"x-set", b"too")))
    for _ in range(2):
        got = PythonDecoder(0, 1 << 20).decode_untrusted(edited_response(encode(fields), edit))
        assert got == [fields[0], fields[3], (b"x-set", b"new", False), (b"x-set", b"too", False)]
    assert edited_response(encode(fields), ResponseRule((), ((b"a", b"b"),))) == encode([*fields, (b"a", b"b", False)])


def test_what_is_remembered_of_edited_answers_is_bounded() -> None:
    edit = ResponseRule((b"server",))
    for number in range(1500):
        edited_response(encode([(b":status", b"200", False), (b"x-%d" % number, b"1", False)]), edit)
    edited_response(encode([(b":status", b"200", False), (b"x-long", b"a" * 4000, False)]), edit)
    assert len(blocks._edited) <= 512
    assert all(len(block) <= 768 for block, _ in blocks._edited)


def test_what_is_remembered_is_bounded() -> None:
    from proxy.protocol.http2 import messages

    reader = BlockReader(Http2Limits())
    give_up_table(reader)
    for i in range(1500):
        fields = [*GET, (b"x-%d" % i, b"1")]
        head(reader, fields)
        head(reader, fields)
    assert len(blocks._bodiless_requests.known) <= 512
    assert len(messages._requests._known) <= 512


def test_a_secret_field_stays_secret_among_messages_of_the_same_names() -> None:
    reader = BlockReader(Http2Limits())
    give_up_table(reader)
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


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("acknowledged", [True, False])
def test_a_table_size_behind_the_first_field_is_an_error(compiled: bool, acknowledged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(hpack_codec, "_compiled", None)
    reader = BlockReader(Http2Limits())
    if acknowledged:
        reader.without_table()
    block = encode([(name, value, False) for name, value in GET])
    reader.request_untrusted(block, True)
    with pytest.raises(ConnectionFault) as caught:
        reader.request_untrusted(block + b"\x21", True)  # RFC 7541 section 4.2
    assert caught.value.code == COMPRESSION_ERROR


STATIC = [(name, value) for name, value in hpack.hpack.HeaderTable.STATIC_TABLE if value]


@pytest.mark.parametrize("at", range(len(STATIC)))
def test_a_field_of_the_static_table_is_one_byte(at: int) -> None:
    name, value = STATIC[at]
    block = encode([(name, value, False)])
    assert len(block) == 1
    assert PythonDecoder(0, 1 << 20).decode_untrusted(block) == [(name, value, False)]
    assert len(encode([(name, value, True)])) > 1, "what must never be indexed stays a literal"
    assert len(encode([(name, value + b"x", False)])) > 1


def test_what_is_sent_on_indexes_the_static_table() -> None:
    reader = BlockReader(Http2Limits())
    literal = b"\x40\x07:status\x03200" + encode([(b"server", b"s", False)])
    assert reader.response_untrusted(literal).block == b"\x88" + encode([(b"server", b"s", False)])
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"a"), (b"accept-encoding", b"gzip, deflate")]
    for extra in ([], [(b"x-long", b"v" * 2000)]):
        everything = [(n, v, False) for n, v in [*fields, *extra]]
        block = reader.request_untrusted(
            b"".join(b"\x40" + bytes([len(n)]) + n + hpack_codec.value_literal(v) for n, v, _ in everything), True
        )
        for edit in (HeadEdit(), HeadEdit((b"x-long",))):
            sent = block.encoded(edit)
            assert sent.startswith(b"\x83\x86\x84\x01\x01a\x90")
            got = PythonDecoder(0, 1 << 20).decode_untrusted(sent)
            assert got == [field for field in everything if field[0] not in edit.strip]


PLAIN_NAMES = st.one_of(st.sampled_from([n for n, _ in STATIC] + [b"cookie", b"x-a"]), st.binary(max_size=130))
PLAIN = st.lists(
    st.tuples(
        PLAIN_NAMES,
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([v for _, v in STATIC]),
            st.sampled_from([b"v" * n for n in (126, 127, 254, 255, 256, 2000)]),
        ),
        st.booleans(),
    ),
    min_size=1,
    max_size=9,
)


@given(PLAIN)
def test_what_we_send_is_read_without_a_decoder_and_sent_on_as_it_is(fields: list[hpack_codec.Field]) -> None:
    block = encode(fields)
    names, values, secrets, plain = hpack_codec.read_plain_untrusted(block)
    if any(len(name) > 126 for name, _, _ in fields) or len(block) > 4096:
        assert not names
    else:
        assert list(zip(names, values, secrets, strict=True)) == fields
        assert plain is block


@given(st.one_of(st.binary(max_size=60), PLAIN.map(encode)), st.integers(0, 60), st.binary(max_size=3))
def test_a_block_read_without_a_decoder_is_what_both_decoders_read(block: bytes, at: int, noise: bytes) -> None:
    block = block[:at] + noise + block[at + len(noise) :]
    names, values, secrets, plain = hpack_codec.read_plain_untrusted(block)
    if names:
        for decoder in (CompiledDecoder, PythonDecoder):
            assert decoder(0, 1 << 20).decode_untrusted(block) == list(zip(names, values, secrets, strict=True))
        assert decoder(4096, 1 << 20).decode_untrusted(plain) == list(zip(names, values, secrets, strict=True))


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"\x20\x82",  # a table size
        b"\x40\x01a\x01b",  # enters the table
        b"\x80",
        b"\xbe",  # of the dynamic table
        b"\x00\x01a\x81\x1f",  # Huffman
        b"\x00\x81\x1f\x01b",
        b"\x0f\x2f\x01b",  # a name of the dynamic table
        b"\x0f\x80\x00\x01b",  # an integer longer than it need be
        b"\x00\x01a\x7f\x80\x00" + b"b" * 127,
        b"\x00\x01a\x02b",  # cut off
        b"\x00\x02a",
        b"\x00\x01a",
        b"\x00",
        b"\x0f",
        b"\x00\x01a\x7f",
        b"\x00\x01a\x7f\x80",
        b"\x82" * 4097,
    ],
)
def test_any_other_block_is_left_to_the_decoder(block: bytes) -> None:
    assert hpack_codec.read_plain_untrusted(block) == hpack_codec.NOTHING


def test_a_header_bomb_of_single_bytes_is_too_large() -> None:
    reader = BlockReader(Http2Limits(header_list_bytes=4096))
    give_up_table(reader)
    for count in (200, 5000):
        with pytest.raises(HeaderListTooLarge):
            reader.response_untrusted(b"\x88" + encode([(b"accept-encoding", b"", False)]) * count)


def test_whole_fields_of_the_static_table_are_read_without_a_decoder() -> None:
    for index, field in enumerate(hpack.hpack.HeaderTable.STATIC_TABLE, 1):
        names, values, secrets, _ = hpack_codec.read_plain_untrusted(bytes([0x80 | index]))
        assert ((names[0], values[0]), secrets) == (field, (False,))
