"""HTTP/1.1 exchanges between one client and its upstreams: keep-alive, pipelining, bodies, endings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.http1 import Http1Limits
from proxy.protocol.requests import Forward, HeadEdit, RequestHead, Verdict
from proxy.rescue import Cause
from tests.proxy.http1_fakes import HEAD, OK, FakeGate, Pair


def test_a_get_and_its_response_pass_untouched_in_one_write_each() -> None:
    pair = Pair()
    for turn in range(1, 4):
        pair.client.received(HEAD)
        assert pair.up.take() == HEAD
        pair.upstream.received(OK)
        assert pair.down.take() == OK
        assert pair.gate.log[-1] == ("finished", turn, 200, None)
        assert pair.idle == [pair.upstream] * turn
    assert pair.up.writes == pair.down.writes == 3
    assert not pair.gone and pair.upstream.reusable


def test_an_answer_of_the_gate_keeps_the_connection_when_its_effect_does() -> None:
    pair = Pair()
    pair.answer_with(Cause.DENIED, explain=True)
    pair.client.received(HEAD + HEAD)
    one = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\npillion-proxy-error: denied\r\n\r\n"
    assert pair.down.take() == one * 2
    assert pair.gate.log == [("finished", "answered", 403, Cause.DENIED)] * 2
    assert pair.down.fate == "" and pair.up.out == b""


POST = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\n\r\nbody"
SLOW = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 10\r\n\r\nbegin"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"
CLOSE = b"connection: close\r\n"

# Conversations that must go the same way however they are split: requests, what the upstream gets, responses, what the client gets.
CONVERSATIONS = {
    "get": (HEAD, HEAD, OK, OK),
    "post": (POST, POST, OK, OK),
    "pipelined": (HEAD + POST + HEAD, HEAD + POST + HEAD, OK * 3, OK * 3),
    "chunked both ways": (
        CHUNKED + b"3;a=b\r\nabc\r\n0\r\nT: 1\r\n\r\n" + HEAD,
        CHUNKED + b"3;a=b\r\nabc\r\n0\r\nT: 1\r\n\r\n" + HEAD,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + OK,
    ),
    "an empty line between requests": (POST + b"\r\n" + HEAD, POST + HEAD, OK * 2, OK * 2),
    "head": (
        HEAD.replace(b"GET", b"HEAD") + HEAD,
        HEAD.replace(b"GET", b"HEAD") + HEAD,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + OK,
    ),
    "no content and not modified": (
        HEAD * 2,
        HEAD * 2,
        b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n",
    ),
    "interim responses": (
        HEAD * 2,
        HEAD * 2,
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK * 2,
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK * 2,
    ),
    "hop-by-hop fields": (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x-a\r\nX-A: 1\r\nTE: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: X-B\r\nX-B: 1\r\nKeep-Alive: timeout=5\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ),
    "an HTTP/1.0 response becomes HTTP/1.1": (
        HEAD,
        HEAD,
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ),
    "an HTTP/1.0 client is kept alive": (
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2,
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2,
        OK * 2,
        OK.replace(b"\r\n\r\n", b"\r\nconnection: keep-alive\r\n\r\n") * 2,
    ),
    "a tunnel": (UPGRADE + b"ping", UPGRADE + b"ping", SWITCH + b"pong", SWITCH + b"pong"),
    "connect": (
        b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\nhello",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nwelcome",
        b"HTTP/1.1 200 OK\r\n\r\nwelcome",
    ),
}


def _converse(requests: list[bytes], responses: list[bytes]) -> tuple[bytes, bytes, Pair]:
    """Feed both sides; a response is fed when the upstream waits for one."""
    pair = Pair()
    for piece in requests:
        pair.client.received(piece)
    for piece in responses:
        pair.upstream.received(piece)
    return pair.up.out, pair.down.out, pair


def _messages(data: bytes) -> list[bytes]:
    """Responses one by one: the upstream answers a pipelined request only after it got it."""
    count = data.count(OK) if data == OK * data.count(OK) else 1
    if count > 1:
        return [OK] * count
    for last in (OK + OK, OK, b"HTTP/1.1 304"):
        at = data.rfind(last)
        if at > 0:
            return [data[:at], *([OK, OK] if last == OK + OK else [data[at:]])][:3]
    return [data]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_whole_split_anywhere_and_byte_by_byte(name: str) -> None:
    requests, up, responses, down = CONVERSATIONS[name]
    parts = _messages(responses)

    def bytewise(data: bytes) -> list[bytes]:
        return [data[i : i + 1] for i in range(len(data))]

    ways = [([requests], parts), (bytewise(requests), [piece for part in parts for piece in bytewise(part)])]
    ways += [([requests[:at], requests[at:]], parts) for at in range(1, len(requests))]
    ways += [
        ([requests], [*parts[:index], part[:at], part[at:], *parts[index + 1 :]])
        for index, part in enumerate(parts)
        for at in range(1, len(part))
    ]
    for sent, answered in ways:
        got_up, got_down, pair = _converse(sent, answered)
        assert (got_up, got_down) == (up, down)
        assert pair.down.fate == "" and not pair.gone
        assert all(entry[3] is None for entry in pair.gate.log)


def test_an_http10_response_with_close_is_translated() -> None:
    pair = Pair()
    pair.client.received(HEAD)
    pair.upstream.received(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert pair.down.take() == OK
    assert pair.gone == [pair.upstream] and pair.up.fate == "close" and pair.down.fate == ""


@pytest.mark.parametrize("when", ["head", "pipelined", "body"])
def test_a_refused_request_is_never_forwarded(when: str) -> None:
    pair = Pair()
    evil = b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" if when != "body" else CHUNKED + b"0x1\r\na\r\n"
    if when == "pipelined":
        pair.client.received(HEAD + evil)
        pair.upstream.received(OK)
        assert pair.up.out == HEAD and pair.down.out.startswith(OK)
    else:
        pair.client.received(evil)
        assert pair.up.out == b"" and len(pair.gate.seen) == 0
    assert pair.down.out.endswith(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    assert ("refused", Cause.BAD_REQUEST) in pair.gate.log
    pair.client.received(HEAD)  # thrown away
    assert pair.down.fate == "end" and pair.down.timer == 2.0
    pair.client.expired()
    assert pair.down.fate == "close"


def test_a_chunk_that_breaks_later_cuts_the_upstream_and_is_answered_with_400() -> None:
    pair = Pair()
    pair.client.received(CHUNKED + b"1\r\na\r\n")
    pair.client.received(b"-1\r\n")
    assert pair.up.out == CHUNKED + b"1\r\na\r\n" and pair.up.fate == "abort"
    assert pair.down.out.startswith(b"HTTP/1.1 400 ") and pair.down.fate == "end"
    assert pair.gate.log == [("finished", 1, 400, Cause.BAD_REQUEST)]


@pytest.mark.parametrize("name", [b"Pillion-Client-Id", b"X-Role", b"x_role"])
def test_a_forbidden_trailer_is_refused_although_the_gate_forwards_it(name: bytes) -> None:
    pair = Pair()
    pair.gate.edit = HeadEdit((b"pillion-client-id",), (), trailers=(b"x-role",))
    pair.client.received(CHUNKED + b"0\r\n" + name + b": evil\r\n\r\n")
    assert pair.up.out == b"" and pair.idle == [pair.upstream]
    assert pair.down.out.startswith(b"HTTP/1.1 400 ") and pair.gate.log == [("finished", 1, 400, Cause.BAD_REQUEST)]


def test_a_late_verdict_sends_what_came_meanwhile_and_only_the_right_token_counts() -> None:
    pair = Pair()
    pair.gate.verdict = None
    pair.client.received(SLOW)
    pair.client.received(b"12345" + HEAD)
    assert pair.up.out == b"" and pair.gate.token == 1
    verdict = Forward(pair.upstream, pair.gate.edit, "late")
    pair.client.proceed(7, verdict)
    assert pair.up.out == b""
    pair.client.proceed(1, verdict)
    assert pair.up.take() == SLOW + b"12345"
    pair.client.proceed(1, verdict)
    assert pair.up.out == b""
    pair.gate.verdict = "forward"
    pair.upstream.received(OK)
    assert pair.up.out == HEAD


@pytest.mark.parametrize("request_", [HEAD, POST, SLOW])
def test_held_bytes_are_bounded_by_pausing(request_: bytes) -> None:
    pair = Pair(Http1Limits(held_bytes=100))
    pair.gate.verdict = None
    pair.client.received(request_)
    for _ in range(40):
        if not pair.down.paused:
            pair.client.received(b"12345")
    assert pair.down.paused
    pair.gate.verdict = "forward"
    pair.client.proceed(1, Forward(pair.upstream, pair.gate.edit, 1))
    assert pair.down.paused == (request_ != SLOW)  # what is held now is the next request, which has to wait


def test_pipelined_requests_wait_paused_and_are_read_again_afterwards() -> None:
    pair = Pair(Http1Limits(held_bytes=60))
    pair.client.received(HEAD * 3)
    assert pair.down.paused and pair.up.take() == HEAD
    pair.upstream.received(OK)
    assert pair.up.take() == HEAD and not pair.down.paused
    pair.upstream.received(OK)
    pair.upstream.received(OK)
    assert pair.down.out == OK * 3 and not pair.down.paused


def test_a_slow_upstream_pauses_the_client_and_a_slow_client_the_upstream() -> None:
    pair = Pair()
    pair.client.received(SLOW)
    pair.up.blocked = True
    pair.client.received(b"123")
    assert pair.down.paused
    pair.up.blocked = False
    pair.upstream.drained()
    assert not pair.down.paused
    pair.client.received(b"45")
    pair.down.blocked = True
    pair.upstream.received(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
    assert pair.up.paused
    pair.down.blocked = False
    pair.client.drained()
    assert not pair.up.paused
    pair.upstream.received(b"67890")
    assert pair.idle == [pair.upstream]


def test_a_client_that_does_not_read_its_answers_gets_no_new_ones() -> None:
    pair = Pair()
    pair.client.received(HEAD * 2)
    pair.down.blocked = True
    pair.upstream.received(OK)
    assert pair.up.take() == HEAD and pair.down.paused and not pair.up.paused
    pair.down.blocked = False
    pair.client.drained()
    assert pair.up.take() == HEAD and not pair.down.paused


def test_an_upstream_in_the_pool_is_never_left_paused() -> None:
    pair = Pair()
    pair.client.received(HEAD)
    pair.down.blocked = True
    pair.upstream.received(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12")
    pair.upstream.received(b"345")
    assert pair.idle == [pair.upstream] and not pair.up.paused


@pytest.mark.parametrize("how", ["ended", "lost", "extra", "data"])
def test_an_idle_upstream_that_speaks_or_ends_is_gone(how: str) -> None:
    pair = Pair()
    if how == "extra":
        pair.client.received(HEAD)
        pair.upstream.received(OK + b"HTTP/1.1 200 OK\r\n")
        assert pair.down.out == OK
    elif how == "data":
        pair.exchange()
        pair.upstream.received(OK)
        assert pair.down.out == b""
    elif how == "ended":
        pair.upstream.ended()
    else:
        pair.upstream.lost(True)
    assert pair.gone == [pair.upstream] and not pair.idle and not pair.upstream.reusable
    with pytest.raises(RuntimeError):
        pair.upstream.start(pair.client, HEAD)


@pytest.mark.parametrize("how", ["ended", "lost"])
def test_a_stale_upstream_is_retried_once(how: str) -> None:
    pair = Pair()
    for stale in range(2):
        pair.exchange() if not stale else None
    first = pair.upstream
    pair.client.received(HEAD)
    pair.connect().served = 1
    second = pair.upstream
    first.ended() if how == "ended" else first.lost(True)
    assert pair.up.take() == HEAD and pair.down.out == b""
    assert pair.gate.log == [("retry_unprocessed", 2)]
    second.lost(True)
    assert pair.down.take() == BAD_GATEWAY
    assert pair.gate.log[-1] == ("finished", 3, 502, Cause.UPSTREAM_RESET)
    pair.connect()
    pair.client.received(HEAD)
    pair.upstream.received(OK)
    assert pair.down.out == OK


class RetryGate(FakeGate):
    """Hands out a dead upstream first."""

    def retry_unprocessed(self, exchange: object, head: RequestHead, token: int, cause: Cause) -> Verdict | None:
        self.verdict = "forward"
        return super().retry_unprocessed(exchange, head, token, cause)


@pytest.mark.parametrize("request_", [HEAD, POST, SLOW])
def test_any_request_is_retried_of_which_nothing_was_sent(request_: bytes) -> None:
    pair = Pair(gate=RetryGate())
    dead = pair.upstream
    dead.lost(True)
    pair.gate.verdict = Forward(dead, pair.gate.edit, "dead")
    pair.connect()
    pair.client.received(request_)
    assert pair.up.out == request_ and pair.gate.log == [("retry_unprocessed", "dead")]


def test_a_client_that_leaves_in_its_body_gets_no_half_response_in_order() -> None:
    pair = Pair()
    pair.client.received(SLOW)
    pair.upstream.received(b"HTTP/1.1 200 OK\r\n\r\n12")
    pair.client.ended()
    assert pair.down.fate == "abort" and pair.up.fate == "abort"


def test_a_trailer_longer_than_what_may_be_held_still_arrives() -> None:
    pair = Pair(Http1Limits(held_bytes=10))
    data = CHUNKED + b"0\r\nX-Trailer: " + b"a" * 100 + b"\r\n\r\n"
    for at in range(len(data)):
        assert not pair.down.paused
        pair.client.received(data[at : at + 1])
    assert pair.up.out == data


@pytest.mark.parametrize(
    ("request_", "fresh", "partial"),
    [
        (HEAD, True, b""),
        (HEAD, False, b"H"),
        (POST, False, b""),
        (HEAD.replace(b"GET", b"POST"), False, b""),
        (HEAD, False, b"HTTP/1.1 100 C\r\n\r\n"),
    ],
)
def test_what_cannot_be_sent_twice_is_a_502(request_: bytes, fresh: bool, partial: bytes) -> None:
    pair = Pair()
    if not fresh:
        pair.exchange()
    pair.client.received(request_)
    if partial:
        pair.upstream.received(partial)
    pair.upstream.lost(True)
    assert pair.down.out.endswith(BAD_GATEWAY)
    assert [entry[2:] for entry in pair.gate.log] == [(502, Cause.UPSTREAM_RESET)] and pair.down.fate == ""


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\n",
        SWITCH,
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000,
        b"HTTP/1.1 102 Processing\r\n\r\n" * 65,
    ],
)
def test_a_response_that_breaks_the_protocol_is_a_502(response: bytes) -> None:
    pair = Pair()
    pair.client.received(HEAD)
    pair.upstream.received(response)
    assert pair.down.out.endswith(BAD_GATEWAY) and pair.up.fate == "abort" and pair.gone == [pair.upstream]
    assert pair.gate.log == [("finished", 1, 502, Cause.UPSTREAM_PROTOCOL)]


@pytest.mark.parametrize(
    "begun",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n12345",
    ],
)
@pytest.mark.parametrize("how", ["reset", "cut", "fin", "bad"])
def test_a_response_cut_short_is_cut_for_the_client_too(begun: bytes, how: str) -> None:
    pair = Pair()
    pair.client.received(HEAD)
    pair.upstream.received(begun)
    delimited = b"Length" in begun or b"chunked" in begun
    cause = Cause.UPSTREAM_RESET
    if how == "bad" and b"chunked" in begun:
        pair.upstream.received(b"xyz\r\n")
        cause = Cause.UPSTREAM_PROTOCOL
    elif how == "fin" and delimited:
        pair.upstream.ended()
    else:
        pair.upstream.lost(how == "reset")
    assert pair.down.fate == "abort"
    assert pair.gate.log == [("finished", 1, 200, cause)]


def test_a_close_delimited_response_ends_with_the_connection() -> None:
    pair = Pair()
    pair.client.received(HEAD)
    pair.upstream.received(b"HTTP/1.1 200 OK\r\n\r\nab")
    pair.upstream.received(b"cd")
    assert pair.down.out == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabcd"
    assert pair.down.fate == "" and not pair.gate.log
    pair.upstream.ended()
    assert pair.down.fate == "close" and pair.gate.log == [("finished", 1, 200, None)] and pair.gone


def test_an_answer_that_ends_the_connection_closes_at_once_when_nothing_is_unread() -> None:
    pair = Pair()
    pair.answer_with(Cause.NO_POLICY)
    pair.client.received(HEAD)
    assert pair.down.out == b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    assert pair.down.fate == "close"


def test_an_early_response_ends_the_upstream_and_the_rest_of_the_body_is_thrown_away() -> None:
    pair = Pair()
    pair.client.received(SLOW)
    pair.upstream.received(OK)
    assert pair.down.take() == OK and pair.up.fate == "abort" and not pair.idle
    pair.connect()
    pair.client.received(b"12345" + HEAD)
    assert pair.up.out == HEAD and pair.down.fate == ""


def test_an_early_response_with_close_closes_the_client_so_that_it_can_read() -> None:
    pair = Pair()
    pair.client.received(SLOW)
    pair.upstream.received(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert pair.down.take() == OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert pair.down.fate == "end"
    pair.client.received(b"1" * 70000)
    assert pair.down.fate == "close"


def test_a_long_unread_body_is_not_read_to_keep_a_connection() -> None:
    pair = Pair()
    pair.answer_with(Cause.DENIED)
    pair.client.received(SLOW.replace(b"10", b"1000000"))
    assert CLOSE in pair.down.out and pair.down.fate == "end"
    short = Pair()
    short.answer_with(Cause.DENIED)
    short.client.received(SLOW)
    assert CLOSE not in short.down.take()
    short.client.received(b"12345" + HEAD)
    assert short.down.out.startswith(b"HTTP/1.1 403")


def test_a_client_that_waits_for_100_gets_it_from_the_upstream() -> None:
    pair = Pair()
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    pair.client.received(head)
    assert pair.up.take() == head
    pair.upstream.received(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert pair.down.take() == b"HTTP/1.1 100 Continue\r\n\r\n"
    pair.client.received(b"ab")
    pair.upstream.received(OK)
    assert pair.up.out == b"ab" and pair.down.out == OK and pair.idle


@pytest.mark.parametrize("by", ["gate", "upstream"])
def test_a_client_that_waits_for_100_and_is_answered_otherwise_is_closed(by: str) -> None:
    pair = Pair()
    if by == "gate":
        pair.answer_with(Cause.DENIED)
    pair.client.received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    if by == "upstream":
        pair.upstream.received(OK)
    assert CLOSE in pair.down.out and pair.down.fate == "end"


def test_an_http10_client_sees_no_interim_and_no_chunks() -> None:
    pair = Pair()
    pair.client.received(b"GET / HTTP/1.0\r\n\r\n")
    pair.upstream.received(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    assert pair.down.out == b""
    pair.upstream.received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert pair.down.out.startswith(b"HTTP/1.1 502 ") and pair.down.fate == "close"


def test_close_asked_for_by_the_client_is_told_back_and_kept_from_the_upstream() -> None:
    pair = Pair()
    pair.client.received(HEAD[:-2] + b"Connection: close\r\n\r\n")
    assert pair.up.out == HEAD
    pair.upstream.received(OK)
    assert pair.down.out == OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    assert pair.down.fate == "close" and pair.idle == [pair.upstream]


def test_half_close_after_a_request_still_gets_the_answer() -> None:
    pair = Pair()
    pair.client.received(HEAD * 2)
    pair.client.ended()
    pair.upstream.received(OK)
    assert pair.down.fate == ""
    pair.upstream.received(OK)
    assert pair.down.out == OK * 2 and pair.down.fate == "close"


def test_half_close_in_a_request_is_no_request() -> None:
    pair = Pair()
    pair.client.received(HEAD[:10])
    pair.client.ended()
    assert pair.down.out.startswith(b"HTTP/1.1 400 ") and pair.down.fate == "close"
    pair = Pair()
    pair.client.received(SLOW)
    pair.client.ended()
    assert pair.up.fate == "abort" and pair.down.fate == "close"
    assert pair.gate.log == [("finished", 1, 0, Cause.CLIENT_GONE)]


def test_an_idle_client_that_ends_is_closed() -> None:
    pair = Pair()
    pair.exchange()
    pair.client.ended()
    assert pair.down.fate == "close" and not pair.gate.log


def test_a_lost_client_cancels_the_upstream_or_the_question() -> None:
    pair = Pair()
    pair.client.received(HEAD)
    pair.client.lost(True)
    assert pair.up.fate == "abort" and pair.gate.log == [("finished", 1, 0, Cause.CLIENT_GONE)]
    pair = Pair()
    pair.gate.verdict = None
    pair.client.received(HEAD)
    pair.client.lost(True)
    assert pair.gate.log == [("cancelled", 1)]
    pair.client.proceed(1, Forward(pair.upstream, pair.gate.edit, 1))
    assert pair.up.out == b""


def tunnel() -> Pair:
    pair = Pair()
    pair.client.received(UPGRADE)
    pair.upstream.received(SWITCH)
    pair.up.take()
    pair.down.take()
    return pair


def test_a_tunnel_closes_in_halves() -> None:
    pair = tunnel()
    pair.client.received(b"last words")
    pair.client.ended()
    assert pair.up.out == b"last words" and pair.up.fate == "end" and pair.down.fate == ""
    pair.upstream.received(b"answer")
    pair.upstream.ended()
    assert pair.down.out == b"answer" and (pair.down.fate, pair.up.fate) == ("close", "close")
    assert pair.gate.log == [("finished", 1, 101, None)] and pair.gone == [pair.upstream]


@pytest.mark.parametrize("side", ["client", "upstream"])
def test_a_broken_tunnel_is_reset(side: str) -> None:
    pair = tunnel()
    pair.client.lost(True) if side == "client" else pair.upstream.lost(True)
    assert (pair.up if side == "client" else pair.down).fate == "abort"
    assert pair.gate.log == [("finished", 1, 101, Cause.CLIENT_GONE if side == "client" else Cause.UPSTREAM_RESET)]


def test_a_tunnel_has_backpressure_both_ways() -> None:
    pair = tunnel()
    pair.up.blocked = pair.down.blocked = True
    pair.client.received(b"a")
    pair.upstream.received(b"b")
    assert pair.down.paused and pair.up.paused
    pair.up.blocked = pair.down.blocked = False
    pair.upstream.drained()
    pair.client.drained()
    assert not pair.down.paused and not pair.up.paused


def test_a_refused_upgrade_goes_on_as_http() -> None:
    pair = Pair()
    pair.client.received(UPGRADE)
    pair.upstream.received(OK)
    pair.client.received(HEAD)
    assert pair.down.out == OK and pair.up.out == UPGRADE + HEAD


def test_bytes_sent_ahead_of_a_refused_connect_are_not_read_as_requests() -> None:
    pair = Pair()
    pair.client.received(b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n" + HEAD)
    pair.upstream.received(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    assert len(pair.gate.seen) == 1 and pair.down.fate == "end" and CLOSE in pair.down.out


def test_drain_closes_an_idle_client_and_lets_a_busy_one_finish() -> None:
    idle = Pair()
    idle.exchange()
    idle.client.drain()
    assert idle.down.fate == "close"
    busy = Pair()
    busy.client.received(HEAD)
    busy.client.drain()
    assert busy.down.fate == ""
    busy.upstream.received(OK)
    assert CLOSE in busy.down.out and busy.down.fate == "close" and busy.idle


def test_a_head_has_one_deadline_from_its_first_byte() -> None:
    pair = Pair()
    assert pair.down.timer == 75.0
    pair.client.received(HEAD[:5])
    assert pair.down.timer == 10.0
    pair.down.timer = None
    pair.client.received(HEAD[5:9])
    assert pair.down.timer is None
    pair.client.expired()
    assert pair.down.out.startswith(b"HTTP/1.1 408 ") and pair.gate.log == [("refused", Cause.HEAD_TIMEOUT)]


def test_a_head_that_arrives_in_time_stops_its_deadline() -> None:
    pair = Pair()
    pair.client.received(HEAD[:5])
    pair.client.received(HEAD[5:])
    assert pair.down.timer == 75.0
    pair.client.expired()
    pair.upstream.received(OK)
    assert pair.down.out == OK


def test_an_idle_client_is_closed_after_the_idle_time_counted_in_ticks() -> None:
    pair = Pair()
    for _ in range(3):
        pair.client.expired()
    pair.exchange()
    for _ in range(3):
        pair.client.expired()
        assert pair.down.fate == "" and pair.down.timer == 75.0
    pair.client.expired()
    assert pair.down.fate == "close"


def test_a_body_that_stalls_is_a_408_unless_the_upstream_is_why() -> None:
    pair = Pair()
    pair.client.received(SLOW)
    pair.client.expired()
    pair.client.received(b"1")
    for _ in range(3):
        pair.client.expired()
    assert pair.down.out == b""
    pair.up.blocked = True
    pair.client.received(b"1")
    for _ in range(9):
        pair.client.expired()
    assert pair.down.out == b""
    pair.upstream.drained()
    pair.client.expired()
    assert pair.down.out.startswith(b"HTTP/1.1 408 ") and pair.up.fate == "abort"
    assert pair.gate.log == [("finished", 1, 408, Cause.BODY_TIMEOUT)]


def test_a_long_response_is_not_idle_time() -> None:
    pair = Pair()
    pair.client.received(HEAD)
    for _ in range(20):
        pair.client.expired()
    pair.upstream.received(OK)
    assert pair.down.out == OK and pair.down.fate == ""


def test_the_gate_can_end_an_exchange_with_an_answer_or_a_cut() -> None:
    pair = Pair()
    pair.client.received(HEAD)
    pair.client.fail(Cause.UPSTREAM_TIMEOUT)
    assert pair.down.out.startswith(b"HTTP/1.1 504 ") and pair.down.fate == "" and pair.up.fate == "abort"
    pair.connect()
    pair.client.received(HEAD)
    pair.upstream.received(OK[:-1])
    pair.client.fail(Cause.DENIED)
    assert pair.down.fate == "abort" and pair.gate.log[-1] == ("finished", 2, 200, Cause.DENIED)


def test_each_request_may_go_to_another_upstream() -> None:
    pair = Pair()
    first, first_sink = pair.upstream, pair.up
    pair.client.received(HEAD)
    second = pair.connect()
    first.received(OK)
    pair.client.received(HEAD)
    second.received(OK)
    assert first_sink.out == pair.up.out == HEAD and pair.idle == [first, second]


def test_the_client_identity_is_set_and_never_taken_over() -> None:
    pair = Pair()
    pair.gate.edit = HeadEdit((b"pillion-client-id",), ((b"pillion-client-id", b"spiffe://real"),))
    for _ in range(2):
        pair.client.received(HEAD[:-2] + b"Pillion-Client-Id: spiffe://evil\r\n\r\n")
        assert pair.up.take() == HEAD[:-2] + b"pillion-client-id: spiffe://real\r\n\r\n"
        pair.upstream.received(OK)


def test_close_by_the_owner_tells_it_once() -> None:
    pair = Pair()
    pair.upstream.close()
    pair.upstream.close()
    assert pair.gone == [pair.upstream] and pair.up.fate == "close"


@given(
    st.lists(
        st.binary(max_size=60) | st.sampled_from([HEAD, POST, SLOW, CHUNKED, b"5\r\nhello\r\n", b"0\r\n\r\n", OK, UPGRADE]), max_size=6
    )
)
def test_any_bytes_from_the_client_never_raise(pieces: list[bytes]) -> None:
    pair = Pair()
    for piece in pieces:
        if piece and pair.down.fate in ("", "end"):
            pair.client.received(piece)


@given(
    st.lists(
        st.binary(max_size=60) | st.sampled_from([OK, OK[:20], SWITCH, b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 100 C\r\n\r\n"]), max_size=5
    )
)
def test_any_bytes_from_the_upstream_never_raise(pieces: list[bytes]) -> None:
    pair = Pair()
    pair.client.received(HEAD * 2)
    for piece in pieces:
        if piece and pair.up.fate == "" and pair.upstream is pair.gate.upstreams[-1]:
            pair.upstream.received(piece)


def test_a_client_that_takes_nothing_of_its_answer_is_reset_and_one_that_takes_some_is_not() -> None:
    pair = Pair(Http1Limits(idle_timeout_s=100, unread_s=100))
    pair.client.received(HEAD)
    pair.upstream.received(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000)
    for _ in range(10):  # ticks of 25 s in which nothing waits to be read: the app takes its time
        pair.client.expired()
    pair.down.blocked = True
    for _ in range(3):
        pair.client.expired()
    pair.client.drained()  # and is blocked again at once
    for _ in range(3):
        pair.client.expired()
    assert (pair.down.fate, pair.up.fate) == ("", "")
    pair.client.expired()
    assert (pair.down.fate, pair.up.fate) == ("abort", "abort")
    assert pair.gate.log == [("finished", 1, 200, Cause.CLIENT_GONE)]
