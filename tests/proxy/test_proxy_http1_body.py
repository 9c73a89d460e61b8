"""Readers of body framing: any split gives the same end, any bytes a position or the declared error, h11 and httptools agree."""

from __future__ import annotations

from itertools import pairwise

import h11
import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.protocol.http1 import body
from proxy.protocol.http1.body import BodyError, BodyReader, Chunked, Length, UntilClose

CHUNKED = b'5\r\nhello\r\n00a;x=y;z="q\\""\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\n'


def feed(body: BodyReader, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """What may be sent on, and what is left behind the body or not yet certain."""
    sent, held = b"", b""
    for piece in pieces:
        held += piece
        if body.done:
            continue
        end = body.take_untrusted(held, 0)
        assert 0 <= end <= len(held)
        sent, held = sent + held[:end], held[end:]
    return sent, held


def read(data: bytes) -> bytes | None:
    """The body's span when chunked framing is complete and right, else None."""
    body = Chunked()
    try:
        sent, _ = feed(body, [data])
    except BodyError:
        return None
    return sent if body.done else None


def test_chunked_ends_after_its_trailers_wherever_it_is_split() -> None:
    data = CHUNKED + b"GET / HTTP/1.1"
    want = (CHUNKED, b"GET / HTTP/1.1")
    assert feed(Chunked(), [data]) == want
    assert feed(Chunked(), [data[i : i + 1] for i in range(len(data))]) == want
    for at in range(1, len(data)):
        body = Chunked()
        assert feed(body, [data[:at], data[at:]]) == want
        assert body.done


def test_length_ends_after_its_bytes() -> None:
    body = Length(5)
    assert feed(body, [b"ab", b"cd", b"efg"]) == (b"abcde", b"fg")
    assert body.done and Length(0).done


def test_until_close_never_ends() -> None:
    body = UntilClose()
    assert feed(body, [b"ab", b"cd"]) == (b"abcd", b"") and not body.done


def test_offsets_into_a_read_are_respected() -> None:
    assert Chunked().take_untrusted(b"head" + CHUNKED + b"next", 4) == 4 + len(CHUNKED)
    assert Length(2).take_untrusted(b"headabnext", 4) == 6


@pytest.mark.parametrize(
    "data",
    [
        b"+5\r\nhello\r\n",
        b"-5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"5\t\r\nhello\r\n",
        b"5 ;a\r\nhello\r\n",
        b"5_0\r\nhello\r\n",
        b"\r\n5\r\n",
        b"g\r\n",
        b"5\nhello\r\n",
        b"5\rhello",
        b"5;\r\nhello\r\n",
        b"5;a\nhello\r\n",
        b"5;a=\x00\r\nhello\r\n",
        b'5;a="\r\nhello\r\n',
        b"5;a\r\r\nhello\r\n",
        b"00000000000000005\r\nhello\r\n",
        b"ffffffffffffffff\r\n",
        b"8000000000000000\r\n",
        b"5\r\nhelloX",
        b"5\r\nhello\n",
        b"5\r\nhello\rX",
        b"5\r\nhello0\r\n\r\n",
        b"0\r\nbad trailer\r\n\r\n",
        b"0\r\nX : a\r\n\r\n",
        b"0\r\nX: a\r\n fold\r\n\r\n",
        b"0\r\nX: a\nb\r\n\r\n",
        b"0\r\nContent-Length: 5\r\n\r\n",
        b"0\r\nTransfer_Encoding: chunked\r\n\r\n",
        b"0\r\nhost: b\r\n\r\n",
        b"5;" + b"a" * 5000,
        b"0\r\nX: " + b"a" * 20000,
        b"0\r\nX: " + b"a" * 20000 + b"\r\n\r\n",
    ],
)
def test_bad_chunks_are_refused_also_byte_by_byte(data: bytes) -> None:
    with pytest.raises(BodyError):
        feed(Chunked(), [data])
    if len(data) < 100:
        with pytest.raises(BodyError):
            feed(Chunked(), [data[i : i + 1] for i in range(len(data))])


def test_nothing_of_the_last_chunk_passes_before_the_trailers_are_checked() -> None:
    assert feed(Chunked(), [b"1\r\na\r\n0\r\nX: y\r\n"]) == (b"1\r\na\r\n", b"0\r\nX: y\r\n")


def test_forbidden_names_are_refused_before_or_after_the_trailer_was_read() -> None:
    data = b"0\r\nPillion_Client.Id: evil\r\n\r\n"
    early, late = Chunked(), Chunked()
    early.forbid((b"pillion-client-id",))
    with pytest.raises(BodyError):
        early.take_untrusted(data, 0)
    late.take_untrusted(data, 0)
    with pytest.raises(BodyError):
        late.forbid((b"pillion-client-id",))


PIECES = st.lists(st.binary(max_size=40), max_size=8)


@given(PIECES)
@example([b"5\r\n", b"hello", b"\r\n0\r\n\r\n"])
def test_any_bytes_give_a_position_or_the_declared_error(pieces: list[bytes]) -> None:
    try:
        feed(Chunked(), pieces)
    except BodyError as error:
        assert str(error)


CHUNKS = st.lists(st.binary(min_size=1, max_size=20), max_size=6)
NEAR = st.lists(
    st.sampled_from(
        [
            b"0",
            b"1",
            b"5",
            b"a",
            b"\r\n",
            b"\r\n\r\n",
            b";a=b",
            b'"',
            b"x",
            b"hello",
            b" ",
            b"\n",
            b"\r",
            b"-",
            b"X: y",
            b"0\r\n\r\n",
            b"5\r\nhello\r\n",
        ]
    ),
    max_size=12,
).map(b"".join)


def encode(chunks: list[bytes], upper: bool) -> bytes:
    parts = [(b"%X" if upper else b"%x") % len(chunk) + b"\r\n" + chunk + b"\r\n" for chunk in chunks]
    return b"".join(parts) + b"0\r\n\r\n"


@given(CHUNKS, st.booleans(), st.lists(st.integers(0, 200), max_size=6))
def test_random_chunkings_in_random_pieces(chunks: list[bytes], upper: bool, cuts: list[int]) -> None:
    data = encode(chunks, upper)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[a:b] for a, b in pairwise(places)]
    body = Chunked()
    assert feed(body, [*pieces, b"next"]) == (data, b"next") and body.done


class Seen:
    def __init__(self) -> None:
        self.body = b""
        self.done = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.done = True


@given(NEAR | CHUNKS.map(lambda chunks: encode(chunks, True)))
@example(CHUNKED)
def test_what_is_accepted_others_read_as_complete_and_the_same(data: bytes) -> None:
    span = read(data)
    if span is None:
        return
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    seen = Seen()
    httptools.HttpRequestParser(seen).feed_data(head + span)
    assert seen.done
    peer = h11.Connection(h11.SERVER)
    peer.receive_data(head + span + b"GET")
    body, event = b"", peer.next_event()
    while not isinstance(event, h11.EndOfMessage):
        assert event is not h11.NEED_DATA
        if isinstance(event, h11.Data):
            body += bytes(event.data)
        event = peer.next_event()
    assert body == seen.body
    assert peer.trailing_data[0] == b"GET"


@pytest.mark.parametrize(
    "data",
    [b"1" + b";a=b" * 1000 + b"\r\nx\r\n0\r\n\r\n", b"0\r\n" + b"t: x\r\n" * 2000 + b"\r\n", b"0" + b";a=b" * 1000 + b"\r\nt: x\r\n\r\n"],
    ids=["extensions", "trailers", "both"],
)
def test_single_bytes_do_not_have_all_before_them_looked_at_again(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    for name in ("_match_size", "_match_trailer"):
        match = getattr(body, name)
        monkeypatch.setattr(body, name, lambda *args, match=match: looks.append(args) or match(*args))
    reader = Chunked()
    sent, held = feed(reader, [data[at : at + 1] for at in range(len(data))])
    assert (sent, held, reader.done) == (data, b"", True)
    assert len(looks) < 20
