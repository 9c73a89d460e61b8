"""Flow control: unread streams hold a window's worth and nobody else up, credit comes back, windows of both peers are kept."""

from __future__ import annotations

import struct

import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.protocol.http2 import Http2Limits
from proxy.protocol.requests import Answer, Forward
from proxy.rescue import Cause
from tests.proxy.http2_fakes import DATA, GOAWAY, GRPC, HEADERS, RST_STREAM, SETTINGS, WINDOW_UPDATE, Chain, frame, split


def pour(chain: Chain, stream: int, size: int) -> int:
    """The server sends as much of `size` bytes on a stream as it may; returns how much that was."""
    sent = 0
    while sent < size:
        step = min(size - sent, chain.server.h2.local_flow_control_window(stream), 16384)
        if step <= 0:
            break
        chain.server.h2.send_data(stream, b"d" * step)
        sent += step
        chain.run()
    return sent


def test_an_unread_stream_holds_one_window_and_does_not_freeze_the_others() -> None:
    chain = Chain(Http2Limits(stream_window=65535, connection_window=200_000))
    chain.client.manual = True
    unread = [chain.ask() for _ in range(5)]
    for stream in unread:
        chain.answer(stream, end=False)
        # the client lets us send 65535 bytes, then we hold another window, then the server is stopped
        chain.client.h2.increment_flow_control_window(1 << 20)
        chain.run()
        assert pour(chain, stream, 1 << 20) == 2 * 65535
    assert chain.far.held_from == 5 * 65535
    chain.client.h2.increment_flow_control_window(1 << 20)
    other = chain.ask()
    chain.answer(other, body=b"x" * 16000)
    assert len(chain.client.body(other)) == 16000
    for stream in unread:
        chain.client.h2.increment_flow_control_window(1 << 20, stream)
    chain.client.h2.increment_flow_control_window(1 << 20)
    chain.run()
    assert [len(chain.client.body(stream)) for stream in unread] == [2 * 65535] * 5
    assert chain.far.held_from == 0
    assert not chain.near.holding


def test_more_than_is_held_for_one_connection_slows_it_instead_of_growing() -> None:
    chain = Chain(Http2Limits(connection_window=65535, held_bytes=100_000))
    chain.client.manual = True
    for _ in range(4):
        stream = chain.ask()
        chain.answer(stream, end=False)
        pour(chain, stream, 1 << 20)
    assert 100_000 <= chain.far.held_from <= 100_000 + 2 * 65535
    chain.client_sink.blocked = False
    for stream in (1, 3, 5, 7):
        chain.client.h2.increment_flow_control_window(1 << 20, stream)
    chain.client.h2.increment_flow_control_window(1 << 20)
    chain.run()
    assert chain.far.held_from == 0
    assert pour(chain, 7, 100_000) == 100_000  # credit came back with the bytes


def test_a_blocked_connection_gets_no_data_and_goes_on_when_drained() -> None:
    chain = Chain()
    stream = chain.ask()
    chain.answer(stream, end=False)
    chain.client_sink.blocked = True
    chain.far.received(frame(DATA, 1, 1, b"abc"))
    assert chain.client_sink.take() == b""
    chain.client_sink.blocked = False
    chain.near.drained()
    chain.run()
    assert chain.client.body(stream) == b"abc"
    assert chain.client.of(h2.events.StreamEnded, stream)
    assert chain.gate.log == [("finished", stream, 200, None)]


def test_data_that_comes_before_the_verdict_is_held_and_then_sent() -> None:
    chain = Chain()
    chain.gate.decide = lambda _head, _token: None
    stream = chain.ask(GRPC, b"early")
    assert not chain.server.of(h2.events.RequestReceived)
    chain.near.proceed(stream, Forward(chain.far, chain.gate.edit, "x"))
    chain.run()
    assert chain.server.body(1) == b"early"
    assert chain.server.of(h2.events.StreamEnded, 1)
    chain.near.proceed(stream, Forward(chain.far, chain.gate.edit, "x"))  # said twice: ignored
    assert chain.far.streams == 1


def test_a_client_that_is_not_decided_about_yet_sends_one_window_at_most() -> None:
    chain = Chain(Http2Limits(stream_window=65535))
    chain.gate.decide = lambda _head, _token: None
    stream = chain.ask(GRPC, end=False)
    for _ in range(4):
        chain.near.received(frame(DATA, 0, stream, b"x" * 16383))
    chain.near.received(frame(DATA, 0, stream, b"xxx"))
    assert chain.near.held_from == 65535
    chain.client_sink.take()
    chain.near.received(frame(DATA, 0, stream, b"x"))
    assert (RST_STREAM, 0, stream, b"\0\0\0\x03") in split(chain.client_sink.take())
    assert chain.near.held_from == 0
    assert ("cancelled", stream) in chain.gate.log


def test_single_bytes_are_held_as_few_objects() -> None:
    chain = Chain(Http2Limits(control_budget=100_000))
    chain.gate.decide = lambda _head, _token: None
    stream = chain.ask(GRPC, end=False)
    for _ in range(20000):
        chain.near.received(frame(DATA, 0, stream, b"x"))
    held = chain.near.streams_by_id[stream].other.held
    assert held is not None
    assert len(held) < 20


def test_a_changed_initial_window_moves_open_streams_below_zero_too() -> None:
    chain = Chain()
    chain.client.manual = True
    stream = chain.ask()
    chain.answer(stream, end=False)
    assert pour(chain, stream, 40000) == 40000
    chain.client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 30000})
    chain.run()
    assert chain.near.streams_by_id[stream].window == 30000 - 40000
    assert pour(chain, stream, 5) == 5
    assert len(chain.client.body(stream)) == 40000
    chain.client.h2.increment_flow_control_window(10003, stream)
    chain.run()
    assert len(chain.client.body(stream)) == 40003
    chain.client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 40000})
    chain.run()
    assert len(chain.client.body(stream)) == 40005


def test_data_is_split_to_what_the_receiver_allows() -> None:
    chain = Chain(Http2Limits(max_frame=65536, stream_window=1 << 20))
    stream = chain.ask()
    chain.far.received(frame(HEADERS, 4, 1, b"\x88"))
    chain.run()
    chain.far.received(frame(DATA, 1, 1, b"z" * 50000))
    sizes = [len(payload) for kind, _, _, payload in split(b"".join(chain.client_sink.parts)) if kind == DATA]
    assert sizes == [16384, 16384, 16384, 848]
    chain.run()
    assert chain.client.body(stream) == b"z" * 50000


def test_held_streams_take_turns() -> None:
    chain = Chain()
    streams = [chain.ask() for _ in range(3)]
    for stream in streams:
        chain.answer(stream, end=False)
    chain.client_sink.blocked = True
    for stream in streams:
        for _ in range(3):
            chain.far.received(frame(DATA, 0, stream, b"t" * 16000))
    chain.client_sink.blocked = False
    chain.near.window = 5 * 16000
    chain.near.drained()
    order = [stream for kind, _, stream, _ in split(chain.client_sink.take()) if kind == DATA]
    assert order == [1, 3, 5, 1, 3]


def test_padding_is_dropped_and_its_credit_returned() -> None:
    chain = Chain()
    stream = chain.ask()
    chain.answer(stream, end=False)
    for _ in range(400):
        chain.far.received(frame(DATA, 0x8, 1, b"\xff" + b"p" * 10 + b"\0" * 255))
    end = chain.far.streams_by_id[1]
    assert end.credit + end.owed == chain.limits.stream_window
    assert chain.far.credit + chain.far.owed == chain.limits.connection_window
    chain.run()
    assert chain.client.body(stream) == b"p" * 4000


def test_padding_longer_than_the_frame_is_a_connection_error() -> None:
    chain = Chain()
    stream = chain.ask(end=False)
    chain.near.received(frame(DATA, 0x8, stream, b"\x05abc"))
    assert chain.client_sink.fate == "close"


@pytest.mark.parametrize(
    ("update", "code", "whole"),
    [
        (frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 0)), 1, True),
        (frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 0x7FFFFFFF)), 3, True),
        (frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 0)), 1, False),
        (frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 0x7FFFFFFF)), 3, False),
        (frame(WINDOW_UPDATE, 0, 0, b"\0\0\1"), 6, True),
        (frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0x80000000)), 3, True),
    ],
)
def test_impossible_windows_are_errors(update: bytes, code: int, whole: bool) -> None:
    chain = Chain()
    chain.ask(end=False)
    chain.near.received(update)
    kind, _, _, payload = split(chain.client_sink.take())[-1]
    assert (kind, struct.unpack(">I", payload[4:8] if whole else payload)[0]) == (GOAWAY if whole else RST_STREAM, code)


def test_more_data_than_the_connection_window_is_an_error() -> None:
    chain = Chain(Http2Limits(connection_window=65535, held_bytes=0))
    chain.gate.decide = lambda _head, _token: None
    one, two = chain.ask(end=False), chain.ask(end=False)
    for stream in (one, two):
        for _ in range(3):
            chain.near.received(frame(DATA, 0, stream, b"x" * 16384))
    assert chain.client_sink.fate == "close"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ups"), st.integers(0, 3), st.integers(1, 60000)), min_size=1, max_size=25),
    st.sampled_from([0, 1, 5, 977]),
    st.integers(0, 70000),
)
def test_any_interleaving_of_streams_arrives_in_order_and_complete(
    steps: list[tuple[str, int, int]], chunk: int, first_window: int
) -> None:
    """Four streams both ways through random sizes, stalls and windows; then everything is released and must be there."""
    chain = Chain(chunk=chunk if sum(n for _, _, n in steps) < 100_000 else 0)
    chain.client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: first_window})
    chain.run()
    streams = [chain.ask(end=False) for _ in range(4)]
    sent = {("up", s): b"" for s in streams} | {("down", s): b"" for s in streams}
    for stream in streams:
        chain.answer(stream, end=False)
    for number, (what, which, size) in enumerate(steps):
        stream = streams[which]
        peer = chain.client if what == "u" else chain.server
        sink = chain.server_sink if what == "u" else chain.client_sink
        if what == "s":
            chain.client_sink.blocked = not chain.client_sink.blocked
            if not chain.client_sink.blocked:
                chain.near.drained()
            chain.run()
            continue
        size = min(size, peer.h2.local_flow_control_window(stream), 16384)
        if size > 0 and not sink.fate:
            payload = bytes([number % 251]) * size
            peer.h2.send_data(stream, payload)
            sent["up" if what == "u" else "down", stream] += payload
            chain.run()
    chain.client_sink.blocked = False
    chain.near.drained()
    chain.client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
    for stream in streams:
        chain.client.h2.end_stream(stream)
    chain.run()
    for stream in streams:
        chain.server.h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
    chain.run()
    for stream in streams:
        assert chain.server.body(stream) == sent["up", stream]
        assert chain.client.body(stream) == sent["down", stream]
        assert chain.client.of(h2.events.StreamEnded, stream)
    assert len(chain.gate.told("finished")) == 4
    assert chain.far.held_from == chain.near.held_from == 0


def test_credit_of_padding_is_returned_even_when_the_data_is_held() -> None:
    chain = Chain()
    chain.gate.decide = lambda _head, _token: None
    stream = chain.ask(GRPC, end=False)
    chain.near.received(frame(DATA, 0x8, stream, b"\xff" + b"p" * 10 + b"\0" * 255))
    end = chain.near.streams_by_id[stream]
    assert end.credit + end.owed == chain.limits.stream_window - 10


def test_no_credit_is_returned_to_a_stream_that_has_ended() -> None:
    chain = Chain()
    chain.gate.decide = lambda _head, _token: None
    stream = chain.ask(GRPC, end=False)
    for n in range(3):
        chain.near.received(frame(DATA, n == 2, stream, b"x" * 16384))
    chain.near.proceed(stream, Forward(chain.far, chain.gate.edit, "x"))
    chain.run()
    assert len(chain.server.body(1)) == 3 * 16384
    assert not chain.client.of(h2.events.WindowUpdated, stream)


def test_what_was_held_is_dropped_when_the_verdict_is_an_answer() -> None:
    chain = Chain()
    chain.gate.decide = lambda _head, _token: None
    stream = chain.ask(GRPC, b"early", end=False)
    assert chain.near.held_from == 5
    chain.near.proceed(stream, Answer(Cause.DENIED, True, "x"))
    assert chain.near.held_from == 0
