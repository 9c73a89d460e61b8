"""Requests that reached no app, in both engines: sent again with their whole body, once, and only on the word of a verified sidecar."""

from __future__ import annotations

import struct

import h2.events
import pytest

from proxy import rescue
from proxy.protocol.http1 import Http1Limits, Http1Upstream
from proxy.protocol.http2 import Http2Limits
from proxy.protocol.http2.hpack_codec import encode
from proxy.protocol.requests import Answer, Forward
from proxy.rescue import Cause
from tests.proxy.http1_fakes import HEAD, OK, FakeSink, Pair
from tests.proxy.http2_fakes import DATA, GRPC, HEADERS, RST_STREAM, Chain, frame

REFUSED = rescue.http1_answer(Cause.CONNECT_REFUSED, close=False, explain=True)
FROM_AN_APP = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\n\r\nbody"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-End: 1\r\n\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
KEEPING = Http1Limits(replay_bytes=64)


class Elsewhere(Pair):
    """The first upstream is a sidecar without its app; a second one is there when the gate is asked again."""

    def __init__(self, *, meshed: bool = True, limits: Http1Limits = KEEPING) -> None:
        super().__init__(limits)
        self.first = self.connect(meshed=meshed)
        self.first_sink = self.up

    def arrive(self, *pieces: bytes) -> None:
        """The client's bytes; then there is a second upstream."""
        for piece in pieces:
            self.client.received(piece)
        self.connect()


# ---- HTTP/1.1


@pytest.mark.parametrize(
    "pieces",
    [(HEAD,), (POST,), (CHUNKED,), (UPGRADE,), (POST[:-4], POST[-4:]), (CHUNKED[:-12], CHUNKED[-12:]), tuple(bytes([c]) for c in CHUNKED)],
    ids=["get", "post", "chunked", "upgrade", "body apart", "chunks apart", "byte by byte"],
)
def test_a_request_that_reached_no_app_is_sent_again_whole(pieces: tuple[bytes, ...]) -> None:
    pair = Elsewhere()
    pair.arrive(*pieces)
    pair.first.received(REFUSED)
    assert pair.first_sink.out == pair.up.out == b"".join(pieces)
    assert (pair.gate.log, pair.gate.retried_for) == ([("retry_unprocessed", 1)], Cause.CONNECT_REFUSED)
    pair.upstream.received(OK)
    assert pair.down.out == OK and pair.client._replay is None, "an idle connection holds no body"
    assert pair.first.reusable and pair.idle[0] is pair.first, "the sidecar is well, only its app is not"


def test_a_body_still_on_its_way_goes_on_at_the_second_upstream() -> None:
    pair = Elsewhere()
    pair.arrive(CHUNKED[:-20])
    pair.first.received(REFUSED)
    assert pair.first_sink.fate == "abort", "half a request was sent there"
    pair.client.received(CHUNKED[-20:])
    pair.upstream.received(OK)
    assert (pair.up.out, pair.down.out) == (CHUNKED, OK)


def test_requests_behind_it_are_still_served_in_their_order() -> None:
    pair = Elsewhere()
    pair.arrive(POST + HEAD)
    pair.first.received(REFUSED)
    assert pair.up.take() == POST
    pair.upstream.received(OK)
    assert pair.up.take() == HEAD
    pair.upstream.received(OK)
    assert pair.down.out == OK + OK


def test_it_is_sent_again_once_only() -> None:
    pair = Elsewhere()
    pair.arrive(HEAD)
    second = Http1Upstream(sink := FakeSink(), pair.idle.append, pair.gone.append, meshed=True)
    pair.gate.upstreams.append(second)
    pair.first.received(REFUSED)
    assert sink.out == HEAD
    second.received(REFUSED)
    assert [entry[0] for entry in pair.gate.log] == ["retry_unprocessed", "finished"]
    assert pair.down.out == rescue.http1_answer(Cause.CONNECT_REFUSED, close=False, explain=False)
    assert pair.gate.log[-1] == ("finished", 2, 502, Cause.CONNECT_REFUSED)


def test_a_gate_that_knows_nowhere_else_answers_and_the_next_request_goes_on() -> None:
    pair = Elsewhere()
    pair.arrive(POST)
    pair.gate.verdict = Answer(Cause.CONNECT_REFUSED, True, "nowhere")
    pair.first.received(REFUSED)
    assert pair.down.take() == REFUSED
    pair.gate.verdict = "forward"
    pair.client.received(HEAD)
    pair.upstream.received(OK)
    assert pair.down.out == OK


def test_a_body_longer_than_what_is_kept_goes_nowhere_else() -> None:
    long = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 65\r\n\r\n" + b"x" * 65
    for pieces in ((long,), (long[:-1], long[-1:])):
        pair = Elsewhere()
        pair.arrive(*pieces)
        pair.first.received(REFUSED)
        assert pair.gate.log == [("finished", 1, 502, Cause.CONNECT_REFUSED)]
        assert pair.down.out.startswith(b"HTTP/1.1 502 ")


def test_what_an_app_says_about_itself_moves_no_request_and_is_not_passed_on() -> None:
    pair = Elsewhere(meshed=False)
    pair.arrive(HEAD)
    pair.first.received(REFUSED)
    assert pair.down.out == FROM_AN_APP and pair.gate.log == [("finished", 1, 502, None)]


@pytest.mark.parametrize("cause", [Cause.DENIED, Cause.UPSTREAM_RESET, Cause.NO_POLICY])
def test_other_answers_of_a_sidecar_are_passed_on(cause: Cause) -> None:
    answer = rescue.http1_answer(cause, close=False, explain=True)
    pair = Elsewhere()
    pair.arrive(HEAD)
    pair.first.received(answer)
    assert b"pillion-proxy-error: " + cause.value.encode() in pair.down.out
    assert not [entry for entry in pair.gate.log if entry[0] == "retry_unprocessed"]


# ---- HTTP/2


GONE = encode([(name, value, False) for name, value in rescue.http2_answer(Cause.CONNECT_REFUSED, grpc=True, explain=True)])
KEEPING2 = Http2Limits(replay_bytes=64)
UPLOAD = [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "a.test")]


def two(*, meshed: bool = True) -> Chain:
    """The first server is a sidecar without its app, the second one answers."""
    chain = Chain(KEEPING2)
    chain.servers.clear()
    chain.gate.upstreams.clear()
    chain.add_server(meshed=meshed)
    chain.add_server()
    chain.run()
    return chain


def refuse(chain: Chain, number: int = 1) -> None:
    chain.far.received(frame(HEADERS, 5, number, GONE))
    chain.run()


@pytest.mark.parametrize("body", [b"", b"\0\0\0\0\1x"])
def test_a_call_that_reached_no_app_is_sent_again_whole(body: bytes) -> None:
    chain = two()
    stream = chain.ask(GRPC, body)
    refuse(chain)
    second = chain.servers[1][0]
    assert (chain.gate.told("retry_unprocessed"), chain.gate.retried_for) == ([("retry_unprocessed", stream)], Cause.CONNECT_REFUSED)
    assert (second.headers(1, h2.events.RequestReceived), second.body(1)) == (dict(GRPC), body)
    assert second.of(h2.events.StreamEnded, 1)
    second.h2.send_headers(1, [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "0")], end_stream=True)
    chain.run()
    assert chain.client.of(h2.events.StreamEnded, stream) and not chain.client.of(h2.events.StreamReset)
    assert chain.gate.log[-1] == ("finished", stream, 200, None)
    assert chain.far.streams == 0 and chain.far.usable


def test_a_stream_still_open_goes_on_at_the_second_server_and_its_credit_is_right() -> None:
    chain = two()
    stream = chain.ask(GRPC, b"one", end=False)
    refuse(chain)
    assert [event.error_code for event in chain.server.of(h2.events.StreamReset)] == [8]
    chain.client.h2.send_data(stream, b"two", end_stream=True)
    chain.run()
    assert chain.servers[1][0].body(1) == b"onetwo"
    end = chain.near.streams_by_id[stream]
    assert (end.owed, chain.near.held_from) == (3, 0)  # the last frame of a stream returns no credit


def test_a_call_is_sent_again_once_only() -> None:
    chain = Chain(KEEPING2)
    chain.servers.clear()
    chain.gate.upstreams.clear()
    for _ in range(3):
        chain.add_server(meshed=True)
    chain.run()
    turn = iter(chain.gate.upstreams[1:])
    chain.gate.again = lambda _head, token: Forward(next(turn), chain.gate.edit, token)
    stream = chain.ask(GRPC, b"x")
    refuse(chain)
    chain.servers[1][2].received(frame(HEADERS, 5, 1, GONE))
    chain.run()
    assert chain.gate.told("retry_unprocessed") == [("retry_unprocessed", stream)]
    got = chain.client.headers(stream, h2.events.ResponseReceived)
    assert (got[":status"], got["grpc-status"], got["pillion-proxy-error"]) == ("200", "14", "connect-refused")
    assert chain.gate.log[-1] == ("finished", stream, 200, Cause.CONNECT_REFUSED)


def test_a_body_longer_than_what_is_kept_is_answered() -> None:
    chain = two()
    stream = chain.ask(UPLOAD, b"x" * 65)
    refuse(chain)
    assert not chain.gate.told("retry_unprocessed")
    got = chain.client.headers(stream, h2.events.ResponseReceived)
    assert (got[":status"], got["pillion-proxy-error"]) == ("502", "connect-refused")


def test_a_call_with_trailers_that_left_is_answered() -> None:
    chain = two()
    stream = chain.ask(UPLOAD, b"x", end=False)
    chain.client.h2.send_headers(stream, [("x-sum", "1")], end_stream=True)
    chain.run()
    refuse(chain)
    assert not chain.gate.told("retry_unprocessed")
    assert chain.client.headers(stream, h2.events.ResponseReceived)[":status"] == "502"


def test_what_an_app_says_moves_no_call_and_is_not_passed_on() -> None:
    chain = two(meshed=False)
    stream = chain.ask(GRPC, b"x")
    refuse(chain)
    assert not chain.gate.told("retry_unprocessed")
    got = chain.client.headers(stream, h2.events.ResponseReceived)
    assert got["grpc-status"] == "14" and "pillion-proxy-error" not in got
    assert chain.gate.log == [("finished", stream, 200, None)]


def test_the_same_words_mean_different_things_from_an_app_and_from_a_sidecar() -> None:
    """What a block means is remembered across connections."""
    for _ in range(3):
        app, sidecar = two(meshed=False), two(meshed=True)
        for chain in (app, sidecar):
            chain.ask(GRPC)
            refuse(chain)
        assert (len(app.gate.told("retry_unprocessed")), len(sidecar.gate.told("retry_unprocessed"))) == (0, 1)


def test_a_refused_stream_with_its_body_is_sent_again_whole_too() -> None:
    chain = two()
    stream = chain.ask(GRPC, b"body")
    chain.far.received(frame(RST_STREAM, 0, 1, struct.pack(">I", 7)))
    chain.run()
    assert (chain.gate.told("retry_unprocessed"), chain.gate.retried_for) == ([("retry_unprocessed", stream)], Cause.UPSTREAM_RESET)
    assert chain.servers[1][0].body(1) == b"body"


def test_nothing_is_kept_once_an_answer_has_begun() -> None:
    chain = two()
    stream = chain.ask(GRPC, b"one", end=False)
    chain.far.received(frame(HEADERS, 4, 1, encode([(b":status", b"200", False)])))
    chain.far.received(frame(DATA, 0, 1, b"hello"))
    end = chain.near.streams_by_id[stream].other
    assert end.kept is None
    chain.far.received(frame(RST_STREAM, 0, 1, struct.pack(">I", 7)))
    chain.run()
    assert not chain.gate.told("retry_unprocessed") and [event.error_code for event in chain.client.of(h2.events.StreamReset)] == [7]
