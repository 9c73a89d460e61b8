"""Peers that spend without progress are told to calm down; stream ids and frames out of place are errors; no bytes make it raise."""

from __future__ import annotations

import struct

import h2.events
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.protocol.http2 import Http2Limits
from proxy.protocol.http2.frames import PREFACE
from proxy.protocol.http2.hpack_codec import encode
from proxy.rescue import Cause
from tests.proxy.http2_fakes import (
    CONTINUATION,
    DATA,
    GOAWAY,
    HEADERS,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Chain,
    frame,
    split,
)  # fmt: skip

GET = encode([(b":method", b"GET", False), (b":scheme", b"http", False), (b":path", b"/", False), (b":authority", b"a", False)])
BAD = encode([(b":method", b"GET", False)])
CALM = 0xB


def goaway_code(chain: Chain) -> int | None:
    """The code the client was sent away with."""
    found = [payload for kind, _, _, payload in split(chain.client_sink.take()) if kind == GOAWAY]
    return struct.unpack(">I", found[-1][4:8])[0] if found else None


FLOODS = {
    "ping": frame(PING, 0, 0, b"12345678"),
    "settings": frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1000)),
    "settings acks": frame(SETTINGS, 1, 0),
    "priority": frame(PRIORITY, 0, 1, b"\0\0\0\0\0"),
    "window update": frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
    "stream window update": frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)),
    "empty data": frame(DATA, 0, 1, b""),
    "padding only": frame(DATA, 8, 1, b"\x00"),
    "unknown": frame(0xEE, 0xFF, 1, b"x"),
    "late resets": frame(RST_STREAM, 0, 3, b"\0\0\0\x08"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_frames_without_progress_are_bounded(name: str) -> None:
    chain = Chain(Http2Limits(control_budget=500))
    chain.near.received(frame(HEADERS, 4, 1, GET) + frame(HEADERS, 5, 3, GET) + frame(RST_STREAM, 0, 3, b"\0\0\0\x08"))
    chain.client_sink.take()
    for _ in range(520):
        chain.near.received(FLOODS[name])
    assert chain.client_sink.fate == "close"
    assert goaway_code(chain) == CALM


def test_a_patient_peer_may_send_as_many() -> None:
    chain = Chain(Http2Limits(control_budget=500, controls_per_s=100, tick_s=5))
    chain.near.expired()
    chain.ask(end=False)
    for _ in range(10):
        for _ in range(400):
            chain.near.received(FLOODS["ping"])
        chain.near.expired()
    assert chain.client_sink.fate == ""


def test_a_busy_stream_earns_its_window_updates() -> None:
    chain = Chain(Http2Limits(control_budget=50))
    stream = chain.ask()
    chain.answer(stream, end=False)
    for _ in range(2000):
        chain.far.received(frame(DATA, 0, 1, b"tick"))
        chain.near.received(frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\x04") + frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\x04") + FLOODS["ping"])
    assert chain.client_sink.fate == ""


def test_rapid_reset_is_bounded() -> None:
    chain = Chain(Http2Limits(reset_budget=50))
    for stream in range(1, 301, 2):
        chain.near.received(frame(HEADERS, 5, stream, GET) + frame(RST_STREAM, 0, stream, b"\0\0\0\x08"))
    assert goaway_code(chain) == CALM
    assert len(chain.gate.seen) == 51
    assert chain.far.streams == 0


def test_resets_the_peer_provokes_count_too() -> None:
    chain = Chain(Http2Limits(reset_budget=50))
    for stream in range(1, 301, 2):
        chain.near.received(frame(HEADERS, 4, stream, GET) + frame(WINDOW_UPDATE, 0, stream, b"\0\0\0\0"))
    assert goaway_code(chain) == CALM
    chain = Chain(Http2Limits(reset_budget=50))
    for stream in range(1, 301, 2):
        chain.near.received(frame(HEADERS, 5, stream, BAD))
    assert goaway_code(chain) == CALM


def test_cancelling_some_of_much_work_is_no_attack() -> None:
    chain = Chain(Http2Limits(reset_budget=20))
    for _ in range(100):
        done, cancelled = chain.ask(), chain.ask()
        chain.answer(done)
        chain.client.h2.reset_stream(cancelled)
        chain.run()
    assert chain.client_sink.fate == ""


def test_cancelling_what_was_answered_is_no_attack() -> None:
    chain = Chain(Http2Limits(reset_budget=5))
    for _ in range(50):
        stream = chain.ask()
        chain.answer(stream, end=False)
        chain.client.h2.reset_stream(stream)
        chain.run()
    assert chain.client_sink.fate == ""


def test_more_streams_than_allowed_are_refused() -> None:
    chain = Chain(Http2Limits(max_streams=3))
    chain.near.received(b"".join(frame(HEADERS, 5, 1 + 2 * n, GET) for n in range(4)))
    assert (RST_STREAM, 0, 7, b"\0\0\0\x07") in split(chain.client_sink.take())
    assert len(chain.near.streams_by_id) == 3


@pytest.mark.parametrize(("piece", "most"), [(b"", 33), (b"v" * 8192, 16)])
def test_a_continuation_flood_is_bounded(piece: bytes, most: int) -> None:
    chain = Chain()
    chain.near.received(frame(HEADERS, 0, 1, GET))
    for _ in range(most):
        chain.near.received(frame(CONTINUATION, 0, 1, piece))
    assert goaway_code(chain) == CALM


def test_answers_that_pile_up_stop_the_reading() -> None:
    chain = Chain(Http2Limits(control_budget=100_000, backlog_bytes=10_000))
    chain.client_sink.blocked = True
    for _ in range(1000):
        if chain.client_sink.paused:
            break
        chain.near.received(FLOODS["ping"])
    assert chain.client_sink.paused
    assert sum(map(len, chain.client_sink.parts)) < 11_000
    chain.client_sink.blocked = False
    chain.near.drained()
    assert not chain.client_sink.paused


MISPLACED = {
    "even stream": (frame(HEADERS, 5, 2, GET), 1),
    "stream 0 headers": (frame(HEADERS, 5, 0, GET), 1),
    "stream 0 data": (frame(DATA, 0, 0, b"x"), 1),
    "data on an idle stream": (frame(DATA, 0, 9, b"x"), 1),
    "reset of an idle stream": (frame(RST_STREAM, 0, 9, b"\0\0\0\x08"), 1),
    "window of an idle stream": (frame(WINDOW_UPDATE, 0, 9, b"\0\0\0\x08"), 1),
    "stream reused": (frame(HEADERS, 5, 1, GET), 5),
    "stream id going back": (frame(HEADERS, 5, 5, GET) + frame(HEADERS, 5, 3, GET), 5),
    "push promise": (frame(PUSH_PROMISE, 4, 1, b"\0\0\0\x02" + GET), 1),
    "continuation alone": (frame(CONTINUATION, 4, 1, b""), 1),
    "block interrupted": (frame(HEADERS, 0, 5, GET) + frame(PING, 0, 0, b"12345678"), 1),
    "block of two streams": (frame(HEADERS, 0, 5, GET) + frame(CONTINUATION, 4, 7, b""), 1),
    "ping size": (frame(PING, 0, 0, b"1"), 6),
    "ping on a stream": (frame(PING, 0, 1, b"12345678"), 1),
    "settings size": (frame(SETTINGS, 0, 0, b"12345"), 6),
    "settings on a stream": (frame(SETTINGS, 0, 1), 1),
    "settings ack with payload": (frame(SETTINGS, 1, 0, b"123456"), 6),
    "settings enable push 2": (frame(SETTINGS, 0, 0, struct.pack(">HI", 2, 2)), 1),
    "settings max frame": (frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 100)), 1),
    "goaway size": (frame(GOAWAY, 0, 0, b"1234"), 6),
    "reset size": (frame(RST_STREAM, 0, 1, b"1"), 6),
    "frame too large": (frame(DATA, 0, 1, b"x" * 16385), 6),
    "frame too large, announced": (b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", 6),
    "broken block": (frame(HEADERS, 5, 5, b"\x80"), 9),
    "priority past the end": (frame(HEADERS, 0x25, 5, b"\0\0"), 1),
    "priority on stream 0": (frame(PRIORITY, 0, 0, b"\0\0\0\0\0"), 1),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_what_is_out_of_place_ends_the_connection_with_the_right_code(name: str) -> None:
    data, code = MISPLACED[name]
    chain = Chain()
    stream = chain.ask()
    chain.answer(stream)
    chain.client_sink.take()
    chain.near.received(data)
    assert chain.client_sink.fate == "close"
    assert goaway_code(chain) == code
    assert chain.gate.told("refused")[-1][1] is Cause.BAD_REQUEST
    chain.near.received(data)  # dead: nothing more happens
    assert chain.client_sink.parts == []


def test_data_after_the_end_is_a_stream_error() -> None:
    chain = Chain()
    stream = chain.ask()
    chain.near.received(frame(DATA, 1, stream, b"x"))
    chain.run()
    assert [e.error_code for e in chain.client.of(h2.events.StreamReset, stream)] == [5]
    assert chain.server.of(h2.events.StreamReset, 1)


def test_the_preface_is_demanded() -> None:
    for start in (b"GET / HTTP/1.1\r\n", PREFACE[:-1] + b"x", PREFACE + frame(PING, 0, 0, b"12345678")):
        chain = Chain(start=False)
        chain.near.received(start)
        assert chain.client_sink.fate == "close"


FRAMES = st.one_of(
    st.builds(
        frame,
        st.integers(0, 10),
        st.integers(0, 255),
        st.sampled_from([0, 1, 2, 3, 5, 7, 9, 0x7FFFFFFF, 0xFFFFFFFF]),
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from(
                [GET, BAD, b"\x88", b"\0\0\0\x08", b"12345678", struct.pack(">HI", 4, 0), struct.pack(">HI", 3, 0), b"x" * 9000]
            ),
        ),
    ),
    st.binary(max_size=12),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), FRAMES), max_size=40), st.integers(0, 40))
def test_no_bytes_from_either_side_raise_and_nothing_is_left_behind(script: list[tuple[int, bytes]], cut: int) -> None:
    chain = Chain()
    decide = chain.gate.decide
    chain.gate.decide = lambda head, token: decide(head, token) if token % 3 else None
    for who, data in script:
        if who < 4 and not chain.client_sink.fate and data:
            chain.near.received(data)
        elif who < 7 and not chain.server_sink.fate and data:
            chain.far.received(data[:cut] or data if cut < 10 else data)
        elif who == 7:
            chain.client_sink.blocked = not chain.client_sink.blocked
            chain.near.drained() if not chain.client_sink.blocked else None
        elif who == 8:
            chain.near.proceed(3, chain.gate.decide(chain.gate.seen[0], 1)) if chain.gate.seen else None
        else:
            chain.near.expired()
            chain.far.expired()
    chain.near.lost(False)
    chain.far.lost(False)
    assert not chain.near.streams_by_id or all(end.over for end in chain.near.streams_by_id.values())
    assert chain.far.streams == 0
    assert chain.near.held_from == chain.far.held_from == 0
    assert len(chain.gate.told("finished")) + len(chain.gate.told("cancelled")) == len(chain.gate.seen)
