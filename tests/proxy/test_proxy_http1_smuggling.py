"""No request reaches an upstream without a decision: whatever a client sends, the upstream's parser counts what the gate was asked."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.protocol.requests import HeadEdit, ResponseRule
from proxy.rescue import Cause
from tests.proxy.http1_fakes import HEAD, OK, Pair

SECRET = b"GET /admin HTTP/1.1\r\nHost: a.test\r\n\r\n"
TOP = b"POST / HTTP/1.1\r\nHost: a.test\r\n"


class Count:
    """How many requests httptools sees, and their targets."""

    def __init__(self, data: bytes) -> None:
        self.targets: list[bytes] = []
        self.complete = 0
        httptools.HttpRequestParser(self).feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.targets.append(url)

    def on_message_complete(self) -> None:
        self.complete += 1


def serve(pieces: list[bytes]) -> Pair:
    """Feed the pieces; the upstream answers each request as soon as all of it is there."""
    pair = Pair()
    answered = 0
    for piece in pieces:
        if not piece or pair.down.fate not in ("", "end"):
            continue
        pair.client.received(piece)
        while Count(pair.up.out).complete > answered and pair.up.fate == "":
            answered += 1
            pair.upstream.received(OK)
            assert pair.gone == []
    return pair


SMUGGLED = {
    "CL.TE": TOP + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECRET,
    "TE.CL": TOP + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\n" + SECRET + b"\r\n0\r\n\r\n",
    "TE.TE": TOP + b"Transfer-Encoding: chunked\r\nTransfer-encoding: x\r\n\r\n0\r\n\r\n" + SECRET,
    "TE with vertical tab": TOP + b"Transfer-Encoding:\x0bchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SECRET,
    "TE with space before colon": TOP + b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SECRET,
    "TE folded": TOP + b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SECRET,
    "TE behind a bare LF": TOP + b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SECRET,
    "TE behind a bare CR": TOP + b"X: y\rTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SECRET,
    "CL.CL": TOP + b"Content-Length: 0\r\nContent-Length: 60\r\n\r\n" + SECRET,
    "CL spelled as a variable": TOP + b"Content-Length: 60\r\nContent_Length: 0\r\n\r\n" + SECRET,
    "CL spelled with a dot": b"GET / HTTP/1.1\r\nHost: a.test\r\nContent.Length: 60\r\n\r\n" + SECRET,
    "TE spelled as a variable": TOP + b"Content-Length: 5\r\nTransfer_Encoding: chunked\r\n\r\n0\r\n\r\n" + SECRET,
    "CL list": TOP + b"Content-Length: 0, 60\r\n\r\n" + SECRET,
    "CL sign": TOP + b"Content-Length: +60\r\n\r\n" + SECRET,
    "CL named by Connection": TOP + b"Content-Length: 60\r\nConnection: content-length\r\n\r\n" + SECRET,
    "TE named by Connection": TOP + b"Transfer-Encoding: chunked\r\nConnection: transfer-encoding\r\n\r\n0\r\n\r\n" + SECRET,
    "a chunk size that wraps": TOP + b"Transfer-Encoding: chunked\r\n\r\n100000000000000005\r\nhello\r\n0\r\n\r\n" + SECRET,
    "a chunk ext with a bare LF": TOP + b"Transfer-Encoding: chunked\r\n\r\n2;\nxx\r\n4c\r\n0\r\n\r\n" + SECRET,
    "a chunk that spills": TOP + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n" + SECRET,
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECRET,
    "a request line in a header": b"GET / HTTP/1.1\r\nHost: a.test\r\nX: y\r\r\n\r\n" + SECRET,
    "Host twice": b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
    "another Host in the target": b"GET http://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
}


@pytest.mark.parametrize("data", SMUGGLED.values(), ids=SMUGGLED.keys())
@pytest.mark.parametrize("way", ["whole", "bytes"])
def test_known_smuggling_is_answered_with_400_and_completes_nothing_upstream(data: bytes, way: str) -> None:
    pair = serve([data] if way == "whole" else [data[i : i + 1] for i in range(len(data))])
    assert b" 400 Bad Request\r\n" in pair.down.out
    assert b"/admin" not in pair.up.out
    assert way == "bytes" or pair.up.out == b""
    assert [target for head in pair.gate.seen for target in [head.target] if target == b"/admin"] == []


LINES = st.sampled_from(
    [
        b"Content-Length: 5\r\n",
        b"Content-Length: 0\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"transfer-encoding:chunked \r\n",
        b"X: y\r\n",
        b"X: y\n",
        b" fold\r\n",
        b"Connection: close\r\n",
        b"Connection: x, content-length\r\n",
        b"Expect: 100-continue\r\n",
        b"Content-Length : 5\r\n",
    ]
)
HEADS = st.lists(LINES, max_size=3).map(lambda lines: TOP + b"".join(lines) + b"\r\n")
BODIES = st.sampled_from(
    [b"hello", b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\nT: 1\r\n\r\n", b"5;a=b\r\nhello\r\n", b"\r\n", SECRET, b"5 \r\nhello\r\n"]
)
PIECES = st.lists(HEADS | BODIES | st.just(HEAD) | st.binary(max_size=3), max_size=7)


@given(PIECES, st.integers(0, 400))
@example([TOP + b"Content-Length: 5\r\n\r\n", b"hello", HEAD], 70)
@example([TOP + b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", SECRET], 3)
def test_the_upstream_sees_as_many_requests_as_were_decided_on(pieces: list[bytes], cut: int) -> None:
    data = b"".join(pieces)
    try:
        pair = serve([data[:cut], data[cut:]])
    except httptools.HttpParserInvalidMethodError:
        return  # any token is a method, but httptools knows only a list of them
    seen = Count(pair.up.out)
    assert seen.targets == [head.target for head in pair.gate.seen]
    assert seen.complete >= len(seen.targets) - 1


def test_a_response_behind_a_response_is_never_given_to_the_next_request() -> None:
    pair = Pair()
    pair.client.received(HEAD + HEAD)
    first = pair.upstream
    second = pair.connect()
    first.received(OK + OK.replace(b"ok", b"no"))
    assert pair.down.take() == OK and pair.gone == [first]
    assert pair.up.out == HEAD
    second.received(OK)
    assert pair.down.out == OK


def test_answers_to_requests_with_bodies_leave_the_next_request_in_place() -> None:
    post = TOP + b"Content-Length: 5\r\n\r\nhello"
    chunked = TOP + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    data = post + HEAD + chunked + HEAD
    for cut in range(1, len(data)):
        pair = Pair()
        pair.answer_with(Cause.DENIED)
        pair.client.received(data[:cut])
        pair.client.received(data[cut:])
        assert pair.down.out.count(b"HTTP/1.1 403 ") == 4 and pair.down.fate == ""
        assert [head.method for head in pair.gate.seen] == [b"POST", b"GET", b"POST", b"GET"]


CONTENTLESS = pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE", b"get"])
BODIED = {
    "length": b"Content-Length: %d\r\n\r\n" % len(SECRET) + SECRET,
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(SECRET) + SECRET + b"\r\n0\r\n\r\n",
    "kept": b"Connection: keep-alive\r\nContent-Length: %d\r\n\r\n" % len(SECRET) + SECRET,
    "upgrade": b"Connection: upgrade\r\nUpgrade: x\r\nContent-Length: %d\r\n\r\n" % len(SECRET) + SECRET,
}


@CONTENTLESS
@pytest.mark.parametrize("rest", BODIED.values(), ids=BODIED.keys())
def test_an_app_that_may_leave_a_body_unread_is_told_that_nothing_follows_it(method: bytes, rest: bytes) -> None:
    pair = Pair()
    pair.client.received(method + b" / HTTP/1.1\r\nHost: a.test\r\n" + rest)
    head, _, body = pair.up.take().partition(b"\r\n\r\n")
    assert [line for line in head.lower().split(b"\r\n") if line.startswith(b"connection:")] == [b"connection: close"]
    assert body == rest.partition(b"\r\n\r\n")[2]
    pair.upstream.received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")  # an app that keeps its connection all the same
    assert pair.gone == [pair.upstream] and pair.idle == [] and pair.down.fate == ""
    pair.connect()
    pair.client.received(HEAD)
    assert pair.up.out == HEAD


@CONTENTLESS
def test_a_sidecar_reads_every_body_and_keeps_its_connection(method: bytes) -> None:
    pair = Pair()
    upstream = pair.connect(meshed=True)
    pair.client.received(method + b" / HTTP/1.1\r\nHost: a.test\r\n" + BODIED["length"])
    assert b"connection:" not in pair.up.take().lower()
    upstream.received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert pair.idle == [upstream] and pair.gone == []


def test_an_app_whose_answer_is_dismissed_for_a_retry_gets_no_second_request_behind_an_unread_body() -> None:
    pair = Pair()
    pair.gate.edit, pair.gate.rule_retries = HeadEdit(response=ResponseRule(retry_on=frozenset((503,)))), 1
    pair.client.received(b"GET / HTTP/1.1\r\nHost: a.test\r\n" + BODIED["length"])
    pair.upstream.received(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
    assert pair.gone == [pair.upstream] and pair.idle == []
