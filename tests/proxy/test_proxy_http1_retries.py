"""HTTP/1.1 requests that their rule wants sent again: after which answers and ends, with which bytes, and what must not be sent twice."""

from __future__ import annotations

import random

import pytest

from proxy.protocol.http1 import Http1Limits
from proxy.protocol.requests import Forward, HeadEdit, ResponseRule
from proxy.rescue import Cause
from tests.proxy.http1_fakes import HEAD, OK, Pair

BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"
POST = b"POST /a HTTP/1.1\r\nHost: a.test\r\nContent-Length: 8\r\n\r\n"
CHUNKED = b"POST /a HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"


def pair(times: int = 1, *codes: int, replay_bytes: int = 16) -> Pair:
    made = Pair(Http1Limits(replay_bytes=replay_bytes))
    made.gate.edit = HeadEdit(response=ResponseRule(retry_on=frozenset(codes or (503,))))
    made.gate.rule_retries = times
    return made


def go_on(made: Pair, *, fresh: bool) -> None:
    """The gate's pause is over: the request goes to the same connection, or to a fresh one."""
    if fresh:
        made.connect()
    made.client.proceed(made.gate.token, Forward(made.upstream, made.gate.edit, 1))


def test_an_unwanted_answer_is_never_seen_and_its_connection_serves_on() -> None:
    made = pair()
    made.client.received(HEAD)
    made.upstream.received(BUSY)
    assert (made.down.out, made.up.take()) == (b"", HEAD)
    assert made.idle == [made.upstream] and made.upstream.reusable
    go_on(made, fresh=False)
    assert made.up.out == HEAD
    made.upstream.received(OK)
    assert made.down.out == OK
    assert made.gate.log == [("retry_by_rule", 1, Cause.RETRIABLE_STATUS), ("finished", 1, 200, None)]


def test_the_last_answer_is_given_as_it_is() -> None:
    made = pair(times=2)
    made.client.received(HEAD)
    for _ in range(2):
        made.upstream.received(BUSY)
        go_on(made, fresh=False)
    made.upstream.received(BUSY)
    assert made.down.out == BUSY
    assert made.gate.log[-1] == ("finished", 1, 503, None)


@pytest.mark.parametrize("answer", [OK, BUSY.replace(b"503", b"500"), b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"])
def test_other_answers_are_given(answer: bytes) -> None:
    made = pair()
    made.client.received(HEAD)
    made.upstream.received(answer)
    assert made.down.out == answer and made.gate.rule_retries == 1


@pytest.mark.parametrize(
    "answer",
    [
        BUSY[:-1],
        BUSY + b"x",
        b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\n\r\n",
    ],
)
def test_a_connection_whose_answer_is_not_all_here_serves_nobody_else(answer: bytes) -> None:
    made = pair()
    made.client.received(HEAD)
    made.upstream.received(answer)
    assert made.down.out == b"" and made.up.fate and made.idle == [] and made.gone == [made.upstream]
    go_on(made, fresh=True)
    made.upstream.received(OK)
    assert made.down.out == OK


@pytest.mark.parametrize("request_", [POST + b"all of it", CHUNKED + b"3\r\nall\r\n0\r\n\r\n"])
def test_a_body_that_is_at_hand_is_sent_again(request_: bytes) -> None:
    made = pair()
    made.client.received(request_[:-1] if request_.startswith(POST) else request_)
    first = made.up.take()
    made.upstream.received(BUSY)
    go_on(made, fresh=False)
    assert made.up.take() == first
    made.upstream.received(OK)
    assert made.down.out == OK


def test_a_body_goes_on_arriving_while_it_is_sent_again() -> None:
    made = pair()
    made.client.received(POST + b"1234")
    assert made.up.take() == POST + b"1234"
    made.upstream.received(BUSY)
    assert made.up.fate == "abort", "an app that answered early may still wait for the rest"
    made.client.received(b"56")
    go_on(made, fresh=True)
    made.client.received(b"78")
    assert made.up.take() == POST + b"12345678"
    made.upstream.received(OK)
    assert made.down.take() == OK
    made.client.received(HEAD)
    assert made.up.take() == HEAD


def test_a_body_that_is_too_long_is_sent_once() -> None:
    made = pair(replay_bytes=7)
    made.client.received(POST + b"12345678")
    made.upstream.received(BUSY)
    assert made.down.out == BUSY and made.gate.rule_retries == 1


@pytest.mark.parametrize("served", [False, True])
def test_a_connection_that_dies_is_no_answer(served: bool) -> None:
    made = pair()
    if served:
        made.exchange()
    made.client.received(POST + b"12345678")
    made.upstream.lost(True)
    assert made.down.out == b"" and made.gate.log == [("retry_by_rule", len(made.gate.seen), Cause.UPSTREAM_RESET)]
    go_on(made, fresh=True)
    assert made.up.out == POST + b"12345678"


def test_what_comes_too_late_is_no_answer_and_the_whole_time_is_the_gates() -> None:
    made = pair()
    made.client.received(HEAD)
    made.client.expire(made.gate.token, Cause.ROUTE_TIMEOUT)
    assert made.up.fate == "abort" and made.down.out == b""
    go_on(made, fresh=True)
    made.client.expire(made.gate.token, Cause.ROUTE_TIMEOUT)
    assert made.down.out.startswith(b"HTTP/1.1 504 ")
    assert made.gate.log[-1] == ("finished", 1, 504, Cause.ROUTE_TIMEOUT)


def test_an_answer_that_has_begun_is_the_answer() -> None:
    made = pair()
    made.client.received(HEAD)
    made.upstream.received(OK[:-1])
    made.upstream.lost(True)
    assert made.down.fate == "abort" and made.gate.log == [("finished", 1, 200, Cause.UPSTREAM_RESET)]


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
    ],
)
def test_what_may_become_a_tunnel_is_sent_once(request_: bytes) -> None:
    made = pair()
    made.client.received(request_)
    made.upstream.received(BUSY)
    assert made.down.out.startswith(b"HTTP/1.1 503 ") and made.gate.rule_retries == 1


def test_a_client_that_leaves_while_its_request_waits_cancels_it() -> None:
    made = pair()
    made.client.received(HEAD)
    made.upstream.received(BUSY)
    made.client.lost(True)
    assert made.gate.log[-1] == ("cancelled", made.gate.token)


def test_pipelined_requests_wait_for_the_one_that_is_sent_again() -> None:
    made = pair()
    made.client.received(HEAD + HEAD)
    made.upstream.received(BUSY)
    assert made.up.take() == HEAD
    go_on(made, fresh=False)
    assert made.up.take() == HEAD
    made.upstream.received(OK)
    assert made.up.take() == HEAD and made.down.out == OK


def test_without_a_rule_nothing_is_asked() -> None:
    made = Pair(Http1Limits(replay_bytes=16))
    made.gate.rule_retries = 9
    made.client.received(HEAD)
    made.upstream.received(BUSY)
    assert made.down.out == BUSY and made.gate.rule_retries == 9


@pytest.mark.parametrize("seed", range(40))
def test_whenever_an_attempt_fails_the_next_one_gets_the_whole_request(seed: int) -> None:
    pick = random.Random(seed)
    chunks = [b"%x\r\n%s\r\n" % (size, b"b" * size) for size in (pick.randint(1, 30) for _ in range(pick.randint(0, 5)))]
    whole = pick.choice((CHUNKED + b"".join(chunks) + b"0\r\nx-sum: 1\r\n\r\n", POST + b"12345678", HEAD))
    made = pair(times=1000, replay_bytes=1000)
    arriving, waiting = whole, False
    while arriving or waiting:
        act = pick.random()
        if act < 0.5 and arriving:
            size = pick.randint(1, 25)
            made.client.received(arriving[:size])
            arriving = arriving[size:]
        elif waiting:
            go_on(made, fresh=True)
        elif made.up.out:
            fail = pick.choice(
                (
                    lambda: made.upstream.received(BUSY),
                    lambda: made.upstream.lost(True),
                    lambda: made.client.expire(made.gate.token, Cause.ROUTE_TIMEOUT),
                )
            )
            fail()
        waiting = bool(made.up.fate) or (made.upstream.reusable and bool(made.up.out))
    assert made.up.out == whole and made.down.out == b""
    made.upstream.received(OK)
    assert made.down.out == OK and made.gate.log[-1] == ("finished", 1, 200, None)
