"""What a connection speaks by its first bytes, however they are split, and what must not pass as opaque bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.detect import HTTP2_PREFACE, LINE_MAX, Detected, FirstLine, detect_untrusted
from proxy.protocol.opaque import Splice
from tests.proxy.http1_fakes import FakeSink

HTTP1, HTTP2, TLS, OPAQUE = Detected.HTTP1, Detected.HTTP2, Detected.TLS, Detected.OPAQUE
LINES = st.lists(
    st.one_of(
        st.sampled_from([b"GET", b"get", b"x" * 30, b" ", b"\t", b"/", b"HTTP/1.1", b"http/2.0", b"\r", b"\n", b"\r\n", b"\x00", b":"]),
        st.binary(max_size=4),
    ),
    max_size=10,
).map(b"".join)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.1\r\n", HTTP1),
        (b"OPTIONS * HTTP/1.0\n", HTTP1),
        (b"CONNECT db:5432 HTTP/1.1\r\n", HTTP1),
        (b"GET http://a.test/ HTTP/1.1\r\n", HTTP1),
        (b"GET / HTTP/1.2\r\n", HTTP1),  # refused by the engine: a server might take it
        (b"GET / HTTP/2\r\n", HTTP1),
        (b"GET / HTTP/1.1 \t\r\n", HTTP1),
        (b"get / HTTP/1.1\r\n", HTTP1),
        (b"\r\n\r\nGET / HTTP/1.1\r\n", HTTP1),
        (b"\nGET / http/1.1\n", HTTP1),
        (b"GET\t/\tHTTP/1.1\r\n", HTTP1),
        (b"x~1 /\x80 HTTP/1.1\r\n", HTTP1),
        (b"GET /" + b"a" * LINE_MAX, HTTP1),
        (HTTP2_PREFACE, HTTP2),
        (HTTP2_PREFACE[:23], None),
        (b"PRI", None),
        (b"GET / HTTP/1.1", None),
        (b"GET ", None),
        (b"GE", None),
        (b"\r\nGE", None),
        (b"\x16\x03", TLS),
        (b"EHLO a.test\r\n", OPAQUE),
        (b"DESCRIBE rtsp://a.test/ RTSP/1.0\r\n", OPAQUE),
        (b"INVITE sip:a@a.test SIP/2.0\r\n", OPAQUE),
        (b"GET /\r\n", HTTP1),  # HTTP/0.9
        (b"GET key\r\n", OPAQUE),
        (b" \t GET / HTTP/1.1\r\n", HTTP1),
        (b"GET\xa0/\x85HTTP/1.1\x1c\r\n", HTTP1),
        (b"\xff\x00/ HTTP/1.1\r\n", HTTP1),
        (b"SSH-2.0-x\r\n", OPAQUE),
        (b"hello", OPAQUE),  # at once: FirstLine watches what becomes of it
        (b"\r\n", OPAQUE),
        (b"get / HT", OPAQUE),
        (b"\x00\x00\x00\x08", OPAQUE),
        (b"*1\r\n$4\r\nPING\r\n", OPAQUE),
        (b"A" * 30, OPAQUE),
    ],
)
def test_detects(data: bytes, expected: Detected | None) -> None:
    assert detect_untrusted(data) is expected


@pytest.mark.parametrize("data", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n", b"EHLO x\r\n", b"\x16\x03\x01"])
def test_more_bytes_never_change_what_was_detected(data: bytes) -> None:
    answers = [detect_untrusted(data[:size]) for size in range(1, len(data) + 1)]
    first = next(at for at, answer in enumerate(answers) if answer is not None)
    assert set(answers[:first]) <= {None} and len(set(answers[first:])) == 1
    assert detect_untrusted(data + b"anything\r\n") is answers[-1]


@given(LINES.filter(bool), st.booleans())
def test_any_first_bytes_are_something_or_open(data: bytes, ended: bool) -> None:
    found = detect_untrusted(data, ended)
    assert found is not None or not ended


def watched(pieces: list[bytes]) -> bool | None:
    line = FirstLine()
    for piece in pieces:
        if piece and (answer := line.is_http_untrusted(piece)) is not None:
            return answer
    return None


@given(LINES, st.lists(st.integers(0, 60), max_size=6))
def test_a_first_line_means_the_same_however_it_is_split(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(data)]
    whole = watched([data])
    assert watched([data[begin:end] for begin, end in itertools.pairwise(edges)]) is whole
    assert watched([data[at : at + 1] for at in range(len(data))]) is whole


@given(LINES.filter(bool))
def test_what_is_detected_as_http_is_seen_as_http_later(data: bytes) -> None:
    if detect_untrusted(data) in (HTTP1, HTTP2) and b"\n" in data.lstrip(b"\r\n"):
        assert watched([data]) is True


@pytest.mark.parametrize("data", [b"x" * 100_000 + b" / HTTP/1.1\r\n", b"\r\n" * 9000 + b"get / HTTP/1.1" + b" " * 9000 + b"\r\n"])
def test_a_first_line_is_seen_however_long_it_is_and_little_of_it_is_kept(data: bytes) -> None:
    line = FirstLine()
    answers = {line.is_http_untrusted(data[at : at + 7]) for at in range(0, len(data) - 7, 7)}
    assert answers == {None}
    assert len(line._line) <= 130
    assert line.is_http_untrusted(b"\n") is True


def splice() -> tuple[Splice, FakeSink, FakeSink, list[str]]:
    client, upstream, ends = FakeSink(), FakeSink(), list[str]()
    return Splice(client, upstream, ends.append, screened=True), client, upstream, ends


def test_opaque_bytes_that_become_a_request_are_cut_before_its_first_field() -> None:
    made, client, upstream, ends = splice()
    for piece in (b"\r\n", b"ge", b"t / HT"):
        made.client.received(piece)
    made.client.received(b"TP/1.1\r\npillion-client-id: forged\r\n\r\n")
    assert upstream.take() == b"\r\nget / HT"
    assert (client.fate, upstream.fate, ends) == ("abort", "abort", ["http"])


PROXY1 = b"PROXY TCP4 10.0.0.1 10.10.10.10 1024 10\r\n"
PROXY2 = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes((10, 0, 0, 1, 10, 10, 10, 10, 4, 0, 0, 10))


@pytest.mark.parametrize("header", [PROXY1, PROXY2, PROXY2[:14] + b"\x01\x00" + bytes(256)], ids=["1", "2", "2 with more"])
@pytest.mark.parametrize(("line", "expected"), [(b"GET / HTTP/1.1\r\n", True), (b"\r\nget / HTTP/1.1\n", True), (b"EHLO x\r\n", False)])
def test_a_request_behind_a_proxy_header_is_one_however_it_is_split(header: bytes, line: bytes, expected: bool) -> None:
    data = header + line
    assert watched([data]) is expected
    for at in range(1, len(data)):
        assert watched([data[:at], data[at:]]) is expected
    assert watched([data[at : at + 1] for at in range(len(data))]) is expected


@pytest.mark.parametrize("data", [b"PROXY " + b"x" * 200 + b"\n", b"PROXYING\r\n", b"\r\n\r\n\x00\r\nEXIT\n"])
def test_what_only_begins_like_a_proxy_header_is_a_line_as_any_other(data: bytes) -> None:
    assert watched([data]) is watched([data[at : at + 1] for at in range(len(data))]) is False


def test_what_is_no_request_passes_and_is_watched_no_longer() -> None:
    made, _, upstream, ends = splice()
    made.client.received(b"QUIT\r\n")
    made.client.received(b"GET / HTTP/1.1\r\n")
    assert upstream.take() == b"QUIT\r\nGET / HTTP/1.1\r\n"
    assert ends == []


def test_who_was_spoken_to_first_may_say_what_looks_like_a_request() -> None:
    made, client, upstream, ends = splice()
    made.upstream.received(b"220 hello\r\n")
    made.client.received(b"GET / HTTP/1.1\r\n")
    assert (client.take(), upstream.take(), ends) == (b"220 hello\r\n", b"GET / HTTP/1.1\r\n", [])


SETTINGS = b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64"


@pytest.mark.parametrize("words", [SETTINGS, b"HTTP/1.1 408 Request Timeout\r\n\r\n"], ids=["http2", "http1"])
@pytest.mark.parametrize("piece", [1, 4, 100])
def test_who_was_spoken_to_first_by_a_server_of_http_may_not_make_requests(words: bytes, piece: int) -> None:
    made, client, upstream, ends = splice()
    for at in range(0, len(words), piece):
        made.upstream.received(words[at : at + piece])
    assert client.take() == words
    made.client.received(HTTP2_PREFACE)
    assert (client.fate, upstream.fate, ends, upstream.take()) == ("abort", "abort", ["http"], b"")


@given(st.binary(max_size=12))
def test_what_a_server_says_means_the_same_however_it_is_split(words: bytes) -> None:
    def passes(pieces: list[bytes]) -> bool:
        made, _, upstream, _ = splice()
        for piece in pieces:
            made.upstream.received(piece)
        made.client.received(b"GET / HTTP/1.1\r\n")
        return upstream.take() != b""

    assert passes([words[at : at + 1] for at in range(len(words))]) is passes([words] if words else [])
