"""Messages that must not be forwarded: each rule of RFC 9113 sections 8.1 to 8.3, seen at the engine's edges."""

from __future__ import annotations

import h2.events
import pytest

from proxy.protocol.http2 import Http2Limits
from proxy.protocol.http2.hpack_codec import encode
from proxy.rescue import Cause
from tests.proxy.http2_fakes import CONTINUATION, DATA, GOAWAY, GRPC, HEADERS, REQUEST, RST_STREAM, Chain, frame, split

Fields = list[tuple[str, str]]
M, S, P, A = (":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test")

INVALID: list[tuple[str, Fields]] = [
    ("no fields", []),
    ("upper case", [M, S, P, A, ("X-A", "1")]),
    ("empty name", [M, S, P, A, ("", "1")]),
    ("space in a name", [M, S, P, A, ("x a", "1")]),
    ("colon in a name", [M, S, P, A, ("x:a", "1")]),
    ("control in a name", [M, S, P, A, ("x\x00", "1")]),
    ("nul in a value", [M, S, P, A, ("x", "a\x00b")]),
    ("cr in a value", [M, S, P, A, ("x", "a\rb")]),
    ("lf in a value", [M, S, P, A, ("x", "a\nb")]),
    ("lf alone as value", [M, S, P, A, ("x", "\n"), ("y", "")]),
    ("bell in a value", [M, S, P, A, ("x", "a\x07b")]),
    ("delete in a value", [M, S, P, A, ("x", "a\x7fb")]),
    ("leading space", [M, S, P, A, ("x", " a"), ("y", "b")]),
    ("trailing space", [M, S, P, A, ("x", "a "), ("y", "b")]),
    ("trailing space in the last", [M, S, P, A, ("x", "a ")]),
    ("leading tab", [M, S, P, A, ("x", "\ta"), ("y", "b")]),
    ("trailing tab", [M, S, P, A, ("x", "a\t"), ("y", "b")]),
    ("connection", [M, S, P, A, ("connection", "close")]),
    ("proxy-connection", [M, S, P, A, ("proxy-connection", "close")]),
    ("keep-alive", [M, S, P, A, ("keep-alive", "1")]),
    ("transfer-encoding", [M, S, P, A, ("transfer-encoding", "chunked")]),
    ("upgrade", [M, S, P, A, ("upgrade", "h2c")]),
    ("te", [M, S, P, A, ("te", "gzip")]),
    ("no method", [S, P, A]),
    ("no scheme", [M, P, A]),
    ("no path", [M, S, A]),
    ("no authority", [M, S, P]),
    ("two methods", [M, M, S, P, A]),
    ("two paths", [M, S, P, P, A]),
    ("two schemes", [M, S, S, P, A]),
    ("two authorities", [M, S, P, A, A]),
    ("pseudo-header after a field", [M, S, P, ("x", "1"), A]),
    ("unknown pseudo-header", [M, S, P, A, (":x", "1")]),
    ("status in a request", [M, S, P, A, (":status", "200")]),
    ("empty path", [M, S, (":path", ""), A]),
    ("relative path", [M, S, (":path", "a"), A]),
    ("absolute path", [M, S, (":path", "http://a.test/"), A]),
    ("asterisk without OPTIONS", [M, S, (":path", "*"), A]),
    ("space in the path", [M, S, (":path", "/a b"), A]),
    ("tab in the path", [M, S, (":path", "/a\tb"), A]),
    ("fragment in the path", [M, S, (":path", "/a#b"), A]),
    ("byte above 127 in the path", [M, S, (":path", "/\xe9"), A]),
    ("scheme", [M, (":scheme", "ftp"), P, A]),
    ("empty method", [(":method", ""), S, P, A]),
    ("space in the method", [(":method", "GET /"), S, P, A]),
    ("user in the authority", [M, S, P, (":authority", "user@a.test")]),
    ("path in the authority", [M, S, P, (":authority", "a.test/x")]),
    ("empty authority", [M, S, P, (":authority", "")]),
    ("host disagrees", [M, S, P, A, ("host", "b.test")]),
    ("host disagrees in its port", [M, (":scheme", "http"), P, A, ("host", "a.test:443")]),
    ("two hosts", [M, S, P, ("host", "a.test"), ("host", "a.test")]),
    ("two lengths", [M, S, P, A, ("content-length", "0"), ("content-length", "0")]),
    ("length is no number", [M, S, P, A, ("content-length", "+1")]),
    ("length without data", [M, S, P, A, ("content-length", "1")]),
    ("two content types", [M, S, P, A, ("content-type", "a/b"), ("content-type", "application/grpc")]),
    ("connect with a path", [(":method", "CONNECT"), P, A]),
    ("connect with a scheme", [(":method", "CONNECT"), S, A]),
    ("connect without authority", [(":method", "CONNECT"), ("host", "a.test:1")]),
    ("protocol without connect", [M, S, P, A, (":protocol", "websocket")]),
    ("extended connect without a path", [(":method", "CONNECT"), (":protocol", "websocket"), S, A]),
]


def block(fields: Fields) -> bytes:
    return encode([(n.encode("latin-1"), v.encode("latin-1"), False) for n, v in fields])


@pytest.mark.parametrize(("name", "fields"), INVALID, ids=[name for name, _ in INVALID])
def test_a_malformed_request_is_a_stream_error_and_is_not_forwarded(name: str, fields: Fields) -> None:
    chain = Chain()
    chain.near.received(frame(HEADERS, 5, 1, block(fields)))
    assert split(chain.client_sink.take()) == [(RST_STREAM, 0, 1, b"\0\0\0\x01")]
    assert chain.server_sink.take() == b""
    assert not chain.gate.seen
    assert [entry[1] for entry in chain.gate.told("refused")] == [Cause.BAD_REQUEST]
    chain.near.received(frame(HEADERS, 5, 3, block([M, S, P, A])))  # the connection lives on
    assert [head.target for head in chain.gate.seen] == [b"/"]


VALID: list[tuple[str, Fields]] = [
    ("plain", [M, S, P, A]),
    ("host alone", [M, S, P, ("host", "a.test")]),
    ("host agrees", [M, S, P, A, ("host", "A.test")]),
    ("host agrees but for the port that is the scheme's", [M, (":scheme", "http"), P, A, ("host", "a.test:80")]),
    ("empty value", [M, S, P, A, ("x", ""), ("y", ""), ("z", "")]),
    ("inner white space", [M, S, P, A, ("x", "a \t b")]),
    ("bytes above 127", [M, S, P, A, ("x", "\xe9")]),
    ("split cookies", [M, S, P, A, ("cookie", "a=1"), ("cookie", "b=2")]),
    ("te trailers", [M, S, P, A, ("te", "trailers")]),
    ("options", [(":method", "OPTIONS"), S, (":path", "*"), A]),
    ("ipv6", [M, S, P, (":authority", "[::1]:80")]),
    ("length of nothing", [M, S, P, A, ("content-length", "0")]),
]


@pytest.mark.parametrize(("name", "fields"), VALID, ids=[name for name, _ in VALID])
def test_a_sound_request_arrives_as_it_was_sent(name: str, fields: Fields) -> None:
    chain = Chain()
    chain.run()
    chain.near.received(frame(HEADERS, 5, 1, block(fields)))
    [(kind, flags, stream, payload)] = split(chain.server_sink.take())
    assert (kind, flags, stream) == (HEADERS, 5, 1)
    assert payload == b"\x20" + block(fields)


RESPONSES: list[tuple[str, list[bytes]]] = [
    ("no status", [frame(HEADERS, 5, 1, block([("x", "1")]))]),
    ("two status", [frame(HEADERS, 5, 1, block([(":status", "200"), (":status", "200")]))]),
    ("path", [frame(HEADERS, 5, 1, block([(":status", "200"), (":path", "/")]))]),
    ("status text", [frame(HEADERS, 5, 1, block([(":status", "2OO")]))]),
    ("switching protocols", [frame(HEADERS, 4, 1, block([(":status", "101")]))]),
    ("1xx that ends", [frame(HEADERS, 5, 1, block([(":status", "103")]))]),
    ("connection", [frame(HEADERS, 5, 1, block([(":status", "200"), ("connection", "close")]))]),
    ("control in a value", [frame(HEADERS, 5, 1, block([(":status", "200"), ("x", "a\nb")]))]),
    ("length without data", [frame(HEADERS, 5, 1, block([(":status", "200"), ("content-length", "3")]))]),
    ("data before the head", [frame(DATA, 1, 1, b"x")]),
]


@pytest.mark.parametrize(("name", "bad"), RESPONSES, ids=[name for name, _ in RESPONSES])
def test_a_malformed_response_becomes_an_error_of_the_proxy(name: str, bad: list[bytes]) -> None:
    chain = Chain()
    stream = chain.ask([M, S, P, A])
    chain.server_sink.take()
    for piece in bad:
        chain.far.received(piece)
    assert split(chain.server_sink.take()) == [(RST_STREAM, 0, 1, b"\0\0\0\x01")]
    chain.run()
    got = chain.client.headers(stream, h2.events.ResponseReceived)
    assert got == {":status": "502", "content-length": "0", "pillion-proxy-error": "upstream-protocol"}
    assert chain.gate.log[-1] == ("finished", 1, 502, Cause.UPSTREAM_PROTOCOL)


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("too much", [frame(DATA, 0, 1, b"abcd")]),
        ("too little", [frame(DATA, 0, 1, b"ab"), frame(DATA, 1, 1, b"")]),
        ("trailers too early", [frame(DATA, 0, 1, b"ab"), frame(HEADERS, 5, 1, block([("x", "1")]))]),
        ("trailers with pseudo-headers", [frame(DATA, 0, 1, b"abc"), frame(HEADERS, 5, 1, block([(":status", "200")]))]),
        ("trailers that do not end", [frame(DATA, 0, 1, b"abc"), frame(HEADERS, 4, 1, block([("x", "1")]))]),
    ],
)
def test_a_body_that_is_not_what_was_promised_never_looks_complete(name: str, tail: list[bytes]) -> None:
    head = [(":status", "200"), ("content-length", "3")]
    chain = Chain()
    stream = chain.ask([M, S, P, A])
    chain.far.received(frame(HEADERS, 4, 1, block(head)))
    for piece in tail:
        chain.far.received(piece)
    chain.run()
    assert not chain.client.of(h2.events.StreamEnded, stream)
    assert chain.client.of(h2.events.StreamReset, stream)
    assert chain.gate.log[-1] == ("finished", 1, 200, Cause.UPSTREAM_PROTOCOL)

    chain = Chain()  # the same towards the upstream
    chain.near.received(frame(HEADERS, 4, 1, block([("content-length", "3") if n == "x" else (n, v) for n, v in [M, S, P, A, ("x", "")]])))
    for piece in tail:
        chain.near.received(piece)
    chain.server.receive(chain.server_sink.take())  # the h2 client knows nothing of this request
    assert not chain.server.of(h2.events.StreamEnded, 1)
    assert chain.server.of(h2.events.StreamReset, 1)
    assert chain.gate.log[-1] == ("finished", 1, 0, Cause.BAD_REQUEST)


def test_a_head_response_may_name_a_length_but_have_no_data() -> None:
    chain = Chain()
    stream = chain.ask([(":method", "HEAD"), S, P, A])
    chain.answer(1, [(":status", "200"), ("content-length", "5")])
    assert chain.client.of(h2.events.StreamEnded, stream)


def test_too_long_a_head_or_target_is_answered() -> None:
    chain = Chain()
    stream = chain.ask([M, S, (":path", "/" + "a" * 9000), A])
    assert chain.client.headers(stream, h2.events.ResponseReceived)[":status"] == "414"
    stream = chain.ask([M, S, P, A, *[(f"x-{i}", "v" * 4000) for i in range(20)]])
    assert chain.client.headers(stream, h2.events.ResponseReceived)[":status"] == "431"
    assert not chain.gate.seen


@pytest.mark.parametrize("acknowledged", [True, False])
def test_a_header_bomb_costs_the_stream_or_the_connection(acknowledged: bool) -> None:
    chain = Chain(Http2Limits(header_list_bytes=16384), start=False)
    chain.client.h2.initiate_connection()
    if acknowledged:
        chain.run()
    else:
        chain.near.received(chain.client.h2.data_to_send())
    chain.client_sink.take()
    bomb = block([M, S, P, A]) + (b"\x00\x01a\x00" * 600 if acknowledged else b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 1000)
    chain.near.received(frame(HEADERS, 5, 1, bomb))
    kinds = [kind for kind, *_ in split(chain.client_sink.take())]
    assert kinds == ([HEADERS] if acknowledged else [GOAWAY])
    assert chain.client_sink.fate == ("" if acknowledged else "close")


def test_a_block_in_continuations_is_one_block() -> None:
    chain = Chain()
    whole = block([M, S, P, A, ("x", "v" * 40000)])
    chain.near.received(frame(HEADERS, 1, 1, whole[:16000]) + frame(CONTINUATION, 0, 1, whole[16000:32000]))
    assert not chain.gate.seen
    chain.near.received(frame(CONTINUATION, 4, 1, whole[32000:]))
    chain.run()
    assert chain.server.headers(1, h2.events.RequestReceived)["x"] == "v" * 40000


def test_a_request_with_too_many_fields_is_answered_with_431() -> None:
    chain = Chain(Http2Limits(header_count=20))
    few, many = ([(f"x-{number}", "1") for number in range(count)] for count in (20 - len(GRPC), 21 - len(GRPC)))
    chain.ask([*GRPC, *few])
    assert chain.server.headers(1, h2.events.RequestReceived)["x-0"] == "1"
    stream = chain.ask([*REQUEST, ("te", "trailers"), ("accept", "a"), *many])
    assert chain.client.headers(stream, h2.events.ResponseReceived)[":status"] == "431"
    assert len(chain.gate.seen) == 1
