"""How exchanges and connections end: resets both ways, GOAWAY, loss, retries, answers of the proxy, draining, timeouts."""

from __future__ import annotations

import struct

import h2.events
import pytest

from proxy.protocol.http2 import Http2Limits
from proxy.protocol.http2.frames import PREFACE
from proxy.protocol.http2.hpack_codec import encode
from proxy.protocol.requests import Answer, Forward
from proxy.rescue import Cause
from tests.proxy.http2_fakes import CONTINUATION, DATA, GOAWAY, GRPC, HEADERS, OK, PING, RST_STREAM, SETTINGS, Chain, frame, split

GET = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test")]
CONNECT = [(":method", "CONNECT"), (":authority", "db.test:5432")]
EXTENDED = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", "/ws"), (":authority", "a.test")]


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


# ---- resets


def test_a_client_that_cancels_cancels_upstream_with_its_code() -> None:
    chain = Chain()
    stream = chain.ask(end=False)
    chain.client.h2.reset_stream(stream, 0x8)
    chain.run()
    assert [e.error_code for e in chain.server.of(h2.events.StreamReset)] == [8]
    assert chain.gate.log == [("finished", stream, 0, Cause.CLIENT_GONE)]
    assert chain.far.streams == 0


@pytest.mark.parametrize("answered", [True, False])
def test_an_upstream_that_resets_resets_the_client_with_its_code(answered: bool) -> None:
    chain = Chain()
    stream = chain.ask()
    if answered:
        chain.answer(stream, end=False)
    chain.server.h2.reset_stream(1, 0xB)
    chain.run()
    assert [e.error_code for e in chain.client.of(h2.events.StreamReset)] == [0xB]
    assert chain.gate.log == [("finished", stream, 200 if answered else 0, Cause.UPSTREAM_RESET)]


def test_a_reset_takes_what_was_held_with_it() -> None:
    chain = Chain()
    chain.client.manual = True
    stream = chain.ask()
    chain.answer(stream, end=False)
    chain.client_sink.blocked = True
    chain.far.received(frame(DATA, 0, 1, b"x" * 1000))
    assert chain.far.held_from == 1000
    chain.near.received(frame(RST_STREAM, 0, stream, u32(8)))
    assert chain.far.held_from == 0
    assert not chain.near.holding
    assert split(chain.server_sink.take())[-1] == (RST_STREAM, 0, 1, u32(8))
    chain.far.received(frame(DATA, 0, 1, b"late") + frame(HEADERS, 5, 1, b"\x88"))  # was on its way: ignored
    assert chain.server_sink.take() == b""


def test_a_whole_response_before_the_request_ended_reaches_the_client_and_stops_it() -> None:
    chain = Chain()
    stream = chain.ask(end=False)
    chain.answer(stream, body=b"no need")
    chain.server.h2.reset_stream(1, 0)
    chain.run()
    assert chain.client.body(stream) == b"no need"
    assert chain.client.of(h2.events.StreamEnded, stream)
    assert chain.gate.log == [("finished", stream, 200, None)]
    assert not chain.near.streams_by_id


def test_that_response_is_not_cut_when_it_is_still_held() -> None:
    chain = Chain()
    stream = chain.ask(end=False)
    chain.client_sink.blocked = True
    chain.answer(stream, body=b"no need")
    chain.server.h2.reset_stream(1, 0)
    chain.run()
    chain.client_sink.blocked = False
    chain.near.drained()
    found = split(chain.client_sink.take())
    assert [(kind, flags & 1) for kind, flags, *_ in found] == [(HEADERS, 0), (DATA, 1), (RST_STREAM, 0)]


# ---- upstreams that go away


@pytest.mark.parametrize("how", ["lost", "ended", "fault"])
def test_a_replayable_request_is_sent_again_when_its_upstream_dies(how: str) -> None:
    chain = Chain()
    stream = chain.ask(GET)
    server, _, second = chain.add_server()
    chain.run()
    if how == "lost":
        chain.far.lost(True)
    elif how == "ended":
        chain.far.ended()
    else:
        chain.far.received(frame(PING, 0, 1, b"\0" * 8))
    chain.run()
    assert chain.gone == [chain.far]
    assert (chain.far.usable, chain.far.capacity) == (False, 0)
    assert chain.gate.told("retry_unprocessed") == [("retry_unprocessed", stream)]
    assert server.headers(1, h2.events.RequestReceived) == dict(GET)
    server.h2.send_headers(1, OK, end_stream=True)
    chain.run()
    assert chain.client.of(h2.events.StreamEnded, stream)
    assert chain.gate.log[-1] == ("finished", stream, 200, None)
    assert second.streams == 0


def test_a_request_that_kills_its_upstreams_kills_two_and_no_more() -> None:
    chain = Chain()
    stream = chain.ask(GET)
    for _ in range(2):
        chain.add_server()
    chain.run()
    turn = iter(chain.gate.upstreams[1:])
    chain.gate.again = lambda _head, token: Forward(next(turn), chain.gate.edit, token)
    for _, _, upstream in chain.servers[:2]:
        upstream.lost(True)
    chain.run()
    assert chain.gate.told("retry_unprocessed") == [("retry_unprocessed", stream)]
    assert not chain.servers[2][0].of(h2.events.RequestReceived)
    assert chain.client.headers(stream, h2.events.ResponseReceived)[":status"] == "502"


@pytest.mark.parametrize(("headers", "body", "end"), [(GRPC, b"x", True), (GRPC, b"", True), (GET, b"x", True), (GET, b"", False)])
def test_a_request_that_may_have_been_acted_on_is_not_sent_again(headers: list[tuple[str, str]], body: bytes, end: bool) -> None:
    chain = Chain()
    stream = chain.ask(headers, body, end=end)
    chain.far.lost(False)
    chain.run()
    assert not chain.gate.told("retry_unprocessed")
    got = chain.client.headers(stream, h2.events.ResponseReceived)
    if headers is GRPC:
        assert (got[":status"], got["grpc-status"], got["pillion-proxy-error"]) == ("200", "14", "upstream-reset")
    else:
        assert (got[":status"], got["pillion-proxy-error"]) == ("502", "upstream-reset")
    assert chain.client.of(h2.events.StreamEnded, stream)
    assert chain.gate.log[-1] == ("finished", stream, int(got[":status"]), Cause.UPSTREAM_RESET)


def test_a_response_cut_short_is_a_reset_and_never_an_end() -> None:
    chain = Chain()
    stream = chain.ask(GET)
    chain.answer(stream, body=b"half", end=False)
    chain.far.lost(False)
    chain.run()
    assert chain.client.body(stream) == b"half"
    assert [e.error_code for e in chain.client.of(h2.events.StreamReset)] == [2]
    assert not chain.client.of(h2.events.StreamEnded, stream)
    assert chain.gate.log == [("finished", stream, 200, Cause.UPSTREAM_RESET)]


def test_goaway_hands_back_what_was_not_processed_and_lets_the_rest_finish() -> None:
    chain = Chain()
    first, second = chain.ask(GRPC), chain.ask(GRPC)
    server, _, _ = chain.add_server()
    chain.run()
    chain.far.received(frame(GOAWAY, 0, 0, u32(1) + u32(0)))
    chain.run()
    assert chain.gate.told("retry_unprocessed") == [("retry_unprocessed", second)]
    assert server.headers(1, h2.events.RequestReceived) == dict(GRPC)
    assert chain.gone == [chain.far]
    assert chain.server_sink.fate == ""
    chain.answer(1)
    assert chain.client.of(h2.events.StreamEnded, first)
    assert chain.server_sink.fate == "close"


def test_a_refused_stream_is_sent_again_only_before_its_body() -> None:
    chain = Chain()
    chain.ask(GRPC)
    with_body = chain.ask(GRPC, b"x")
    server, _, _ = chain.add_server()
    chain.run()
    for stream in (1, 3):
        chain.server.h2.reset_stream(stream, 7)
    chain.run()
    assert chain.gate.told("retry_unprocessed") == [("retry_unprocessed", 1)]
    assert server.of(h2.events.RequestReceived, 1)
    assert [e.error_code for e in chain.client.of(h2.events.StreamReset, with_body)] == [7]


def test_a_gate_that_sends_to_dead_upstreams_for_ever_is_stopped() -> None:
    chain = Chain()
    chain.far.lost(True)
    stream = chain.ask(GET)
    assert len(chain.gate.told("retry_unprocessed")) == 2
    assert chain.client.headers(stream, h2.events.ResponseReceived)[":status"] == "502"
    assert len(chain.gate.told("finished")) == 1


def test_a_retry_may_be_decided_later() -> None:
    chain = Chain()
    chain.gate.again = lambda _head, _token: None
    stream = chain.ask(GET)
    chain.far.lost(True)
    server, _, upstream = chain.add_server()
    chain.near.proceed(stream, Forward(upstream, chain.gate.edit, "second"))
    chain.run()
    assert server.headers(1, h2.events.RequestReceived) == dict(GET)


# ---- answers of the proxy


def test_an_answer_ends_the_stream_and_asks_for_no_more_of_the_request() -> None:
    chain = Chain()
    chain.gate.decide = lambda _head, _token: Answer(Cause.DENIED, True, "note")
    stream = chain.ask(GRPC, b"long", end=False)
    got = chain.client.headers(stream, h2.events.ResponseReceived)
    assert got == {
        ":status": "200", "content-type": "application/grpc", "grpc-status": "7", "grpc-message": "denied", "pillion-proxy-error": "denied",
    }  # fmt: skip
    assert chain.client.of(h2.events.StreamEnded, stream)
    assert chain.gate.log == [("finished", "note", 200, Cause.DENIED)]
    chain.near.received(frame(DATA, 0, stream, b"still coming"))  # before it read the reset
    assert chain.client_sink.fate == ""
    assert not chain.near.streams_by_id


def test_a_stranger_is_not_told_the_reason() -> None:
    chain = Chain()
    chain.gate.decide = lambda _head, _token: Answer(Cause.DENIED, False)
    stream = chain.ask(GET)
    assert chain.client.headers(stream, h2.events.ResponseReceived) == {":status": "403", "content-length": "0"}


def test_a_client_that_leaves_before_the_verdict_is_reported_and_the_verdict_ignored() -> None:
    chain = Chain()
    chain.gate.decide = lambda _head, _token: None
    stream = chain.ask(GRPC, end=False)
    chain.near.lost(True)
    assert chain.gate.log == [("cancelled", stream)]
    chain.near.proceed(stream, Forward(chain.far, chain.gate.edit, "x"))
    assert chain.far.streams == 0


@pytest.mark.parametrize("how", ["lost", "ended"])
def test_a_client_connection_that_ends_cancels_its_streams_only(how: str) -> None:
    chain = Chain()
    stream = chain.ask(end=False)
    chain.near.lost(False) if how == "lost" else chain.near.ended()
    chain.run()
    assert [e.error_code for e in chain.server.of(h2.events.StreamReset)] == [8]
    assert chain.gate.log == [("finished", stream, 0, Cause.CLIENT_GONE)]
    assert chain.far.usable


# ---- informational responses, CONNECT


def test_informational_responses_pass_and_are_bounded() -> None:
    chain = Chain()
    stream = chain.ask(GET)
    early = frame(HEADERS, 4, 1, encode([(b":status", b"103", False), (b"link", b"</a>", False)]))
    chain.far.received(early)
    chain.run()
    assert chain.client.headers(stream, h2.events.InformationalResponseReceived)[":status"] == "103"
    chain.far.received(early * 16)
    chain.run()
    assert chain.client.headers(stream, h2.events.ResponseReceived)[":status"] == "502"


def test_connect_is_a_tunnel() -> None:
    chain = Chain()
    stream = chain.ask(CONNECT, b"hello", end=False)
    assert chain.gate.seen[0].target == b"db.test:5432"
    chain.answer(1, [(":status", "200")], b"world", end=False)
    assert (chain.server.body(1), chain.client.body(stream)) == (b"hello", b"world")
    chain.client.h2.end_stream(stream)
    chain.run()
    assert chain.server.of(h2.events.StreamEnded, 1)
    assert not chain.client.of(h2.events.StreamEnded, stream)


@pytest.mark.parametrize("supported", [True, False])
def test_extended_connect_goes_to_an_upstream_that_supports_it(supported: bool) -> None:
    chain = Chain(start=False)
    chain.client.h2.initiate_connection()
    chain.near.received(chain.client.h2.data_to_send())
    chain.client.receive(chain.client_sink.take())
    block = encode([(n.encode(), v.encode(), False) for n, v in EXTENDED])
    chain.near.received(frame(HEADERS, 4, 1, block))
    assert not [f for f in split(chain.server_sink.take()) if f[0] == HEADERS]  # its SETTINGS are awaited
    chain.far.received(frame(SETTINGS, 0, 0, struct.pack(">HI", 8, int(supported))))
    sent = [f for f in split(chain.server_sink.take()) if f[0] == HEADERS]
    if supported:
        assert sent == [(HEADERS, 4, 1, b"\x20" + block)]
        assert chain.gate.seen[0].target == b"/ws"
    else:
        assert not sent
        assert chain.gate.log[-1] == ("finished", 1, 502, Cause.UPSTREAM_PROTOCOL)


# ---- streams that have to wait


def test_requests_wait_for_a_free_stream_of_the_upstream() -> None:
    chain = Chain()
    chain.far.received(frame(SETTINGS, 0, 0, struct.pack(">HI", 3, 1)))
    first, second, third = chain.ask(GET), chain.ask(GRPC, b"held"), chain.ask(GET)
    assert (chain.far.streams, chain.far.capacity) == (3, 0)
    assert len(chain.server.of(h2.events.RequestReceived)) == 1
    chain.client.h2.reset_stream(third)
    chain.run()
    assert chain.far.streams == 2
    chain.answer(1)
    assert chain.client.of(h2.events.StreamEnded, first)
    assert chain.server.body(3) == b"held"
    chain.answer(3)
    assert chain.client.of(h2.events.StreamEnded, second)
    assert (chain.far.streams, chain.far.capacity, len(chain.idle)) == (0, 1, 1)


def test_waiting_requests_are_handed_back_when_the_upstream_leaves() -> None:
    chain = Chain()
    chain.far.received(frame(SETTINGS, 0, 0, struct.pack(">HI", 3, 1)))
    chain.ask(GET)
    waiting = chain.ask(GRPC, b"held")
    server, _, _ = chain.add_server()
    chain.run()
    chain.far.received(frame(GOAWAY, 0, 0, u32(1) + u32(0)))
    chain.run()
    assert chain.gate.told("retry_unprocessed") == [("retry_unprocessed", waiting)]
    assert server.body(1) == b"held"  # nothing of it had left, so all of it was still there


def test_requests_wait_while_the_upstream_reads_nothing() -> None:
    chain = Chain()
    chain.run()
    chain.server_sink.blocked = True
    chain.ask(GET)
    assert chain.server_sink.take() == b""
    chain.server_sink.blocked = False
    chain.far.drained()
    chain.run()
    assert chain.server.of(h2.events.RequestReceived, 1)


# ---- draining and timeouts


def test_drain_serves_what_was_on_its_way_then_refuses_then_closes() -> None:
    chain = Chain()
    stream = chain.ask(GET)
    chain.near.drain()
    first = split(chain.client_sink.take())
    assert [(kind, payload[:8]) for kind, _, _, payload in first] == [(GOAWAY, u32(0x7FFFFFFF) + u32(0)), (PING, b"pildrain")]
    block = encode([(n.encode(), v.encode(), False) for n, v in GET])
    chain.near.received(frame(HEADERS, 5, 3, block))
    assert len(chain.gate.seen) == 2
    chain.near.received(frame(PING, 1, 0, b"pildrain"))
    assert split(chain.client_sink.take()) == [(GOAWAY, 0, 0, u32(3) + u32(0))]
    chain.near.received(frame(HEADERS, 5, 5, block))
    assert len(chain.gate.seen) == 2
    for number in (1, 3):
        chain.far.received(frame(HEADERS, 5, number, b"\x88"))
    assert chain.client_sink.fate == "close"
    assert chain.gate.told("finished") == [("finished", stream, 200, None), ("finished", 3, 200, None)]


def test_drain_of_an_idle_connection_closes_it_after_the_ping() -> None:
    chain = Chain()
    chain.near.drain()
    chain.near.received(frame(PING, 1, 0, b"pildrain"))
    assert chain.client_sink.fate == "close"


def test_an_upstream_drains_when_its_streams_are_done() -> None:
    chain = Chain()
    chain.ask(GET)
    chain.far.drain()
    assert (chain.far.usable, chain.gone, chain.server_sink.fate) == (False, [chain.far], "")
    chain.answer(1)
    assert chain.server_sink.fate == "close"
    assert chain.gone == [chain.far]


def test_a_client_that_says_nothing_is_closed() -> None:
    chain = Chain(start=False)
    assert chain.client_sink.timer == chain.limits.head_timeout_s
    chain.near.received(PREFACE[:5])
    chain.near.expired()
    assert chain.client_sink.fate == "close"
    assert chain.gate.log == [("refused", Cause.HEAD_TIMEOUT, "no SETTINGS in time")]


def test_a_connection_without_streams_is_closed_after_its_idle_time() -> None:
    chain = Chain(Http2Limits(idle_timeout_s=100, tick_s=5))
    chain.near.expired()
    spent = 0.0
    while chain.client_sink.fate == "":
        assert chain.client_sink.timer is not None
        spent += chain.client_sink.timer
        chain.near.expired()
        assert spent < 200
    assert spent >= 100
    assert split(chain.client_sink.take())[-1] == (GOAWAY, 0, 0, u32(0) + u32(0))


def test_a_used_connection_is_not_idle() -> None:
    chain = Chain(Http2Limits(idle_timeout_s=100))
    for _ in range(20):
        chain.ask(GET)
        chain.answer(chain.client.h2.highest_outbound_stream_id)
        chain.near.expired()
        chain.far.expired()
    assert (chain.client_sink.fate, chain.server_sink.fate) == ("", "")


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_receiver_that_takes_nothing_loses_the_stream(side: str) -> None:
    chain = Chain(Http2Limits(stall_timeout_s=20, tick_s=5))
    stream = chain.ask(end=False)
    chain.near.expired()
    chain.far.expired()
    if side == "client":
        chain.answer(1, end=False)
        chain.client_sink.blocked = True
        chain.far.received(frame(DATA, 0, 1, b"x"))
    else:
        chain.server_sink.blocked = True
        chain.near.received(frame(DATA, 0, stream, b"x"))
    stalled = chain.near if side == "client" else chain.far
    for _ in range(3):
        stalled.expired()
        assert not chain.gate.log
    for _ in range(2):
        stalled.expired()
    assert chain.gate.told("finished")
    assert not chain.near.streams_by_id
    assert not chain.far.streams


@pytest.mark.parametrize("idle_before", [False, True])
def test_a_header_block_that_does_not_end_is_timed_out(idle_before: bool) -> None:
    chain = Chain(Http2Limits(head_timeout_s=10, tick_s=5))
    if idle_before:
        chain.near.expired()
    chain.near.received(frame(HEADERS, 0, 1, b"\x82"))
    passed = 0.0
    while not chain.client_sink.fate:
        assert chain.client_sink.timer is not None
        passed += chain.client_sink.timer
        chain.near.expired()
    assert (passed, chain.client_sink.fate) == (10, "close")


def test_header_blocks_in_pieces_do_not_put_off_the_tick_of_a_connection() -> None:
    chain = Chain(Http2Limits(head_timeout_s=10, tick_s=5, idle_timeout_s=300))
    chain.near.expired()
    chain.ask(GET)
    armed: list[float | None] = []
    chain.client_sink.expire_after = armed.append  # type: ignore[method-assign]
    for stream in range(3, 21, 2):
        whole = encode([(name.encode(), value.encode(), False) for name, value in GET])
        chain.near.received(frame(HEADERS, 1, stream, whole[:1]) + frame(CONTINUATION, 4, stream, whole[1:]))
    assert len(chain.near.streams_by_id) == 10
    assert armed == [10, 5]  # sooner than the idle connection's, and from then on left alone


def test_a_request_that_waits_too_long_is_handed_back() -> None:
    chain = Chain(Http2Limits(stall_timeout_s=20, tick_s=5))
    chain.far.received(frame(SETTINGS, 0, 0, struct.pack(">HI", 3, 0)))
    stream = chain.ask(GET)
    chain.gate.again = lambda _head, _token: Answer(Cause.UPSTREAM_TIMEOUT, True, "gave up")
    for _ in range(4):
        chain.far.expired()
    chain.run()
    assert chain.far.streams == 0
    assert chain.client.headers(stream, h2.events.ResponseReceived)[":status"] == "504"
    assert chain.gate.log == [("retry_unprocessed", stream), ("finished", "gave up", 504, Cause.UPSTREAM_TIMEOUT)]


def test_a_client_that_reads_nothing_at_all_is_aborted() -> None:
    chain = Chain(Http2Limits(stall_timeout_s=20, tick_s=5))
    chain.ask(GET)
    chain.client_sink.blocked = True
    for _ in range(5):
        chain.near.expired()
    assert chain.client_sink.fate == "abort"
    assert chain.gate.told("finished") == [("finished", 1, 0, Cause.CLIENT_GONE)]


def test_a_client_that_said_goodbye_is_served_to_the_end() -> None:
    chain = Chain()
    first = chain.ask(GET)
    chain.near.received(frame(GOAWAY, 0, 0, u32(0) + u32(0)))
    second = chain.ask(GET)
    assert len(chain.gate.seen) == 2
    for number, stream in ((1, first), (3, second)):
        chain.answer(number)
        assert chain.client.of(h2.events.StreamEnded, stream)
    assert chain.client_sink.fate == "close"


def test_interim_heads_do_not_pile_up_for_a_client_that_reads_nothing() -> None:
    chain = Chain(Http2Limits(backlog_bytes=5000))
    streams = [chain.ask(GET) for _ in range(50)]
    chain.client_sink.blocked = True
    early = encode([(b":status", b"103", False), (b"link", b"v" * 1000, False)])
    for stream in streams:
        chain.far.received(frame(HEADERS, 4, stream, early) * 16)
    assert sum(map(len, chain.client_sink.parts)) < 7000


def test_what_a_finished_exchange_left_waiting_upstream_is_not_counted_for_ever() -> None:
    chain = Chain()
    stream = chain.ask(GRPC, end=False)
    chain.server_sink.blocked = True
    chain.near.received(frame(DATA, 1, stream, b"unread"))
    chain.far.received(frame(HEADERS, 5, 1, b"\x88"))  # the whole answer, before it read the request
    chain.client.receive(chain.client_sink.take())
    assert chain.gate.log == [("finished", stream, 200, None)]
    assert (chain.near.held_from, chain.far.streams) == (6, 1)
    chain.far.lost(True)
    assert (chain.near.held_from, chain.far.streams) == (0, 0)


def test_a_client_that_leaves_while_a_retry_is_decided_is_reported_once() -> None:
    chain = Chain()
    chain.gate.again = lambda _head, _token: None
    stream = chain.ask(GET)
    chain.far.lost(True)
    chain.near.lost(True)
    assert chain.gate.log == [("retry_unprocessed", stream), ("cancelled", stream)]


def test_an_answer_without_a_note_is_not_reported() -> None:
    chain = Chain()
    chain.gate.again = lambda _head, _token: Answer(Cause.NO_ENDPOINTS, True)
    stream = chain.ask(GET)
    chain.far.lost(True)
    assert chain.gate.log == [("retry_unprocessed", stream)]
    chain.gate.decide = lambda _head, _token: Answer(Cause.DENIED, True)
    chain.ask(GET)
    assert chain.gate.log == [("retry_unprocessed", stream)]


def test_a_reset_by_the_upstream_gives_back_what_its_stream_held() -> None:
    chain = Chain()
    stream = chain.ask()
    chain.answer(stream, end=False)
    chain.client_sink.blocked = True
    chain.far.received(frame(DATA, 0, 1, b"x" * 1000) + frame(RST_STREAM, 0, 1, u32(8)))
    assert chain.far.held_from == 0
    assert not chain.near.holding
    assert chain.far.usable
