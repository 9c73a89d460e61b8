"""Tunnels in both engines: asked about when they begin and at every review, cut when they may not be any more; requests are let finish."""

from __future__ import annotations

import struct

import h2.events
import pytest

from proxy.protocol.http2.hpack_codec import encode
from proxy.rescue import Cause
from tests.proxy.http1_fakes import HEAD, OK, Pair
from tests.proxy.http2_fakes import DATA, GRPC, HEADERS, RST_STREAM, SETTINGS, Chain, frame, split

UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
CONNECT = b"CONNECT db.test:5432 HTTP/1.1\r\nHost: db.test:5432\r\n\r\n"
CONNECTED = b"HTTP/1.1 200 OK\r\n\r\n"
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

CANCEL, CONNECT_ERROR = 0x8, 0xA
CONNECT2 = [(":method", "CONNECT"), (":authority", "db.test:5432")]
EXTENDED = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", "/ws"), (":authority", "a.test")]

both = pytest.mark.parametrize(
    ("request_", "response", "target"), [(UPGRADE, SWITCH, b"/ws"), (CONNECT, CONNECTED, b"db.test:5432")], ids=["upgrade", "connect"]
)


# ---- HTTP/1.1


@both
def test_a_tunnel_lives_as_long_as_the_gate_lets_it_and_is_cut_both_ways(request_: bytes, response: bytes, target: bytes) -> None:
    pair = Pair()
    pair.client.received(request_)
    pair.upstream.received(response)
    pair.client.review()
    assert pair.gate.tunnels == [(1, target)] * 2
    assert (pair.down.fate, pair.up.fate) == ("", "")
    pair.gate.no_tunnel = Cause.TERMINATED
    pair.client.review()
    assert (pair.down.fate, pair.up.fate) == ("abort", "abort")
    assert pair.gone == [pair.upstream]
    assert pair.gate.log == [("finished", 1, 101 if response is SWITCH else 200, Cause.TERMINATED)]
    pair.client.review()
    assert len(pair.gate.tunnels) == 3, "nobody is asked about what is over"


@both
def test_a_tunnel_whose_permit_went_while_the_app_thought_about_it_is_refused(request_: bytes, response: bytes, target: bytes) -> None:
    pair = Pair()
    pair.client.received(request_)
    pair.gate.no_tunnel = Cause.TERMINATED
    pair.upstream.received(response + b"secret")
    assert pair.down.out == FORBIDDEN
    assert pair.up.fate == "abort"
    assert pair.gate.log == [("finished", 1, 403, Cause.TERMINATED)]


def test_a_half_closed_tunnel_is_cut_too() -> None:
    pair = Pair()
    pair.client.received(UPGRADE)
    pair.upstream.received(SWITCH)
    pair.client.ended()
    pair.gate.no_tunnel = Cause.TERMINATED
    pair.client.review()
    assert (pair.down.fate, pair.up.fate) == ("abort", "abort")


@pytest.mark.parametrize("answered", [b"", OK[:-1]])
def test_a_request_under_way_is_let_finish(answered: bytes) -> None:
    pair = Pair()
    pair.gate.no_tunnel = Cause.TERMINATED
    pair.client.received(HEAD)
    if answered:
        pair.upstream.received(answered)
    pair.client.review()
    pair.upstream.received(OK[len(answered) :])
    assert pair.down.out == OK and pair.gate.tunnels == []


# ---- HTTP/2


def connected(headers: list[tuple[str, str]]) -> tuple[Chain, int]:
    """A tunnel of the client's; its streams are written by hand where the h2 package knows no extended CONNECT."""
    chain = Chain()
    chain.far.received(frame(SETTINGS, 0, 0, struct.pack(">HI", 8, 1)))
    stream: int = chain.client.h2.get_next_available_stream_id()
    chain.near.received(frame(HEADERS, 4, stream, encode([(name.encode(), value.encode(), False) for name, value in headers])))
    chain.server_sink.take()
    return chain, stream


def answered(chain: Chain) -> None:
    chain.far.received(frame(HEADERS, 4, 1, encode([(b":status", b"200", False)])))


@pytest.mark.parametrize(
    ("headers", "target", "code"),
    [(CONNECT2, b"db.test:5432", CONNECT_ERROR), (EXTENDED, b"/ws", CANCEL)],
    ids=["connect", "extended"],
)
def test_a_stream_that_is_a_tunnel_is_reset_both_ways(headers: list[tuple[str, str]], target: bytes, code: int) -> None:
    chain, stream = connected(headers)
    answered(chain)
    chain.near.review()
    assert chain.gate.tunnels == [(stream, target)] * 2
    chain.client_sink.take()
    chain.gate.no_tunnel = Cause.TERMINATED
    chain.near.review()
    assert split(chain.client_sink.take()) == [(RST_STREAM, 0, stream, struct.pack(">I", code))]
    assert split(chain.server_sink.take()) == [(RST_STREAM, 0, 1, struct.pack(">I", code))]
    assert chain.gate.log == [("finished", stream, 200, Cause.TERMINATED)]
    assert (chain.far.streams, len(chain.near.streams_by_id)) == (0, 0)
    chain.far.received(frame(DATA, 0, 1, b"late"))
    assert split(chain.client_sink.take()) == []


def test_a_stream_whose_permit_went_before_its_answer_is_refused() -> None:
    chain, stream = connected(EXTENDED)
    chain.client_sink.take()
    chain.gate.no_tunnel = Cause.TERMINATED
    answered(chain)
    (kind, flags, number, _), reset = split(chain.client_sink.take())
    assert (kind, flags & 1, number) == (HEADERS, 1, stream)
    assert reset == (RST_STREAM, 0, stream, struct.pack(">I", 0))
    assert split(chain.server_sink.take()) == [(RST_STREAM, 0, 1, struct.pack(">I", CANCEL))]
    assert chain.gate.log == [("finished", stream, 403, Cause.TERMINATED)]
    assert chain.far.streams == 0


def test_streams_that_are_no_tunnels_are_let_finish_beside_one_that_is_cut() -> None:
    chain = Chain()
    stream = chain.ask(GRPC, b"long", end=False)
    chain.answer(1, end=False)
    tunnel = chain.ask(CONNECT2, b"x", end=False)
    chain.answer(3, [(":status", "200")], end=False)
    chain.gate.no_tunnel = Cause.TERMINATED
    chain.near.review()
    chain.run()
    assert [event.stream_id for event in chain.client.of(h2.events.StreamReset)] == [tunnel]
    chain.client.h2.send_data(stream, b"more", end_stream=True)
    chain.run()
    chain.server.h2.send_data(1, b"done", end_stream=True)
    chain.run()
    assert (chain.server.body(1), chain.client.body(stream)) == (b"longmore", b"done")
    assert chain.gate.log[-1] == ("finished", stream, 200, None)


def test_a_connect_that_was_turned_down_is_no_tunnel() -> None:
    chain = Chain()
    stream = chain.ask(CONNECT2, end=False)
    chain.answer(1, [(":status", "403")], b"no")
    chain.near.review()
    assert chain.gate.tunnels == [] and chain.client.body(stream) == b"no"
