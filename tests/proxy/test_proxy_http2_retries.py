"""HTTP/2 requests that their rule wants sent again: after which answers and ends, with which bytes, and what must not be sent twice."""

from __future__ import annotations

import h2.errors
import h2.events
import h2.settings
import pytest

from proxy.protocol.http2 import Http2Limits
from proxy.protocol.requests import Forward, HeadEdit, ResponseRule
from proxy.rescue import Cause
from tests.proxy.http2_fakes import GRPC, Chain

GET = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test")]


def chain(times: int = 1) -> Chain:
    made = Chain(Http2Limits(replay_bytes=16))
    made.gate.edit = HeadEdit(response=ResponseRule(retry_on=frozenset((503,))))
    made.gate.rule_retries = times
    made.add_server()
    return made


def answer(made: Chain, status: str, body: bytes = b"", *, server: int = 0, end: bool = True) -> None:
    """The server answers the last request it got."""
    peer = made.servers[server][0]
    number = peer.of(h2.events.RequestReceived)[-1].stream_id
    peer.h2.send_headers(number, [(":status", status)], end_stream=end and not body)
    if body:
        peer.h2.send_data(number, body, end_stream=end)
    made.run()


def go_on(made: Chain, stream: int, *, server: int = 0) -> None:
    made.near.proceed(stream, Forward(made.gate.upstreams[server], made.gate.edit, stream))
    made.run()


@pytest.mark.parametrize("server", [0, 1])
@pytest.mark.parametrize("body", [b"", b"some"])
def test_an_unwanted_answer_is_never_seen_and_the_request_goes_whole(server: int, body: bytes) -> None:
    made = chain()
    stream = made.ask(GET if not body else GRPC, body)
    answer(made, "503")
    assert made.client.of(h2.events.ResponseReceived) == []
    assert made.server.of(h2.events.StreamReset) == [], "both had ended: there is nothing to reset"
    go_on(made, stream, server=server)
    peer = made.servers[server][0]
    number = peer.of(h2.events.RequestReceived)[-1].stream_id
    assert peer.body(number) == body and peer.of(h2.events.StreamEnded, number)
    answer(made, "200", b"ok", server=server)
    assert made.client.headers(stream, h2.events.ResponseReceived)[":status"] == "200"
    assert made.client.body(stream) == b"ok"
    assert made.gate.log == [("retry_by_rule", stream, Cause.RETRIABLE_STATUS), ("finished", stream, 200, None)]
    assert not made.near.streams_by_id and not made.far.streams_by_id


def test_an_unwanted_answer_that_goes_on_is_reset() -> None:
    made = chain()
    stream = made.ask(GET)
    answer(made, "503", b"a long story", end=False)
    assert made.server.of(h2.events.StreamReset)[0].error_code == h2.errors.ErrorCodes.CANCEL
    go_on(made, stream)
    answer(made, "200", b"ok")
    assert made.client.body(stream) == b"ok"


def test_the_last_answer_is_given_as_it_is() -> None:
    made = chain(times=2)
    stream = made.ask(GET)
    for _ in range(2):
        answer(made, "503")
        go_on(made, stream)
    answer(made, "503", b"busy")
    assert made.client.headers(stream, h2.events.ResponseReceived)[":status"] == "503"
    assert made.client.body(stream) == b"busy"
    assert made.gate.log[-1] == ("finished", stream, 503, None)


def test_a_body_goes_on_arriving_while_it_is_sent_again() -> None:
    made = chain()
    stream = made.ask(GRPC, b"1234", end=False)
    answer(made, "503", end=False)
    made.client.h2.send_data(stream, b"56")
    made.run()
    go_on(made, stream, server=1)
    made.client.h2.send_data(stream, b"78", end_stream=True)
    made.run()
    assert made.servers[1][0].body(1) == b"12345678"
    answer(made, "200", b"ok", server=1)
    assert made.client.body(stream) == b"ok"


def test_a_body_that_is_too_long_is_sent_once() -> None:
    made = chain()
    stream = made.ask(GRPC, b"x" * 17)
    answer(made, "503")
    assert made.client.headers(stream, h2.events.ResponseReceived)[":status"] == "503"
    assert made.gate.rule_retries == 1


@pytest.mark.parametrize("code", [h2.errors.ErrorCodes.INTERNAL_ERROR, h2.errors.ErrorCodes.CANCEL])
def test_a_reset_is_no_answer(code: h2.errors.ErrorCodes) -> None:
    made = chain()
    stream = made.ask(GRPC, b"some")
    made.server.h2.reset_stream(1, code)
    made.run()
    assert made.gate.log == [("retry_by_rule", stream, Cause.UPSTREAM_RESET)]
    go_on(made, stream, server=1)
    assert made.servers[1][0].body(1) == b"some"
    answer(made, "200", server=1)
    assert made.client.headers(stream, h2.events.ResponseReceived)[":status"] == "200"


def test_a_connection_that_dies_is_no_answer() -> None:
    made = chain()
    stream = made.ask(GRPC, b"some")
    made.far.lost(True)
    made.run()
    assert made.gate.log == [("retry_by_rule", stream, Cause.UPSTREAM_RESET)]
    go_on(made, stream, server=1)
    assert made.servers[1][0].body(1) == b"some"


def test_what_comes_too_late_is_no_answer_and_the_whole_time_is_the_gates() -> None:
    made = chain()
    stream = made.ask(GET)
    made.near.expire(stream, Cause.ROUTE_TIMEOUT)
    made.run()
    assert made.server.of(h2.events.StreamReset)[0].error_code == h2.errors.ErrorCodes.CANCEL
    assert made.client.of(h2.events.ResponseReceived) == []
    go_on(made, stream)
    made.near.expire(stream, Cause.ROUTE_TIMEOUT)
    made.run()
    assert made.client.headers(stream, h2.events.ResponseReceived)[":status"] == "504"
    assert made.gate.log[-1] == ("finished", stream, 504, Cause.ROUTE_TIMEOUT)


def test_an_answer_that_has_begun_is_the_answer() -> None:
    made = chain()
    stream = made.ask(GET)
    answer(made, "200", b"o", end=False)
    made.near.expire(stream, Cause.ROUTE_TIMEOUT)
    made.run()
    assert made.client.of(h2.events.StreamReset)[0].error_code == h2.errors.ErrorCodes.INTERNAL_ERROR
    assert made.gate.log == [("finished", stream, 200, Cause.ROUTE_TIMEOUT)]


def test_time_that_is_over_after_the_whole_answer_changes_nothing() -> None:
    made = chain()
    stream = made.ask(GET)
    answer(made, "200", b"ok")
    made.near.expire(stream, Cause.ROUTE_TIMEOUT)
    made.near.expire(99, Cause.ROUTE_TIMEOUT)
    made.run()
    assert made.client.body(stream) == b"ok" and made.client.of(h2.events.StreamReset) == []


def test_a_client_that_leaves_while_its_request_waits_cancels_it() -> None:
    made = chain()
    stream = made.ask(GET)
    answer(made, "503")
    made.client.h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
    made.run()
    assert made.gate.log[-1] == ("cancelled", stream)
    go_on(made, stream)
    assert len(made.server.of(h2.events.RequestReceived)) == 1


def test_a_request_that_waits_for_a_free_stream_can_be_late_too() -> None:
    made = Chain(Http2Limits())
    made.server.h2.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    made.run()
    first, second = made.ask(GET), made.ask(GET)
    made.near.expire(second, Cause.ROUTE_TIMEOUT)
    made.run()
    assert made.client.headers(second, h2.events.ResponseReceived)[":status"] == "504"
    answer(made, "200", b"ok")
    assert made.client.body(first) == b"ok"
    assert len(made.server.of(h2.events.RequestReceived)) == 1


def test_without_a_rule_nothing_is_asked() -> None:
    made = Chain(Http2Limits(replay_bytes=16))
    made.gate.rule_retries = 9
    stream = made.ask(GET)
    answer(made, "503")
    assert made.client.headers(stream, h2.events.ResponseReceived)[":status"] == "503" and made.gate.rule_retries == 9
