"""What engines tell their gate about an exchange beside status and cause: the gRPC status, and how long the bodies were."""

from __future__ import annotations

import h2.events
import pytest

from proxy.protocol.requests import Answer
from proxy.rescue import Cause
from tests.proxy.http1_fakes import HEAD, OK, Pair
from tests.proxy.http2_fakes import GRPC, Chain
from tests.proxy.http2_fakes import OK as OK2

CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
TUNNEL = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"


def post(framing: bytes, body: bytes) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: a.test\r\n" + framing + body


@pytest.mark.parametrize(
    ("request_", "response", "bytes_"),
    [
        (HEAD, OK, (0, 2)),
        (HEAD.replace(b"GET", b"HEAD"), b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", (0, 0)),
        (HEAD, b"HTTP/1.1 204 No Content\r\n\r\n", (0, 0)),
        (post(b"Content-Length: 4\r\n\r\n", b"body"), OK, (4, 2)),
        (
            post(CHUNKED, b"3;a=b\r\nabc\r\n1\r\nd\r\n0\r\nT: 1\r\n\r\n"),
            b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"5\r\nabcde\r\n0\r\n\r\n",
            (4, 5),
        ),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_http1_bodies_are_counted_without_their_framing(request_: bytes, response: bytes, bytes_: tuple[int, int], step: int) -> None:
    pair = Pair()
    for _ in range(2):  # the second time through what was remembered of the first
        for at in range(0, len(request_), step):
            pair.client.received(request_[at : at + step])
        for at in range(0, len(response), step):
            pair.upstream.received(response[at : at + step])
        assert pair.gate.body_bytes == bytes_
        pair.gate.body_bytes = (-1, -1)
        pair.client.received(HEAD)
        pair.upstream.received(OK)
        assert pair.gate.body_bytes == (0, 2)
    assert pair.gate.grpc_status == -1


def test_a_close_delimited_body_is_counted_to_its_end() -> None:
    pair = Pair()
    pair.client.received(HEAD)
    pair.upstream.received(b"HTTP/1.1 200 OK\r\n\r\nab")
    pair.upstream.received(b"cde")
    pair.upstream.ended()
    assert pair.gate.body_bytes == (0, 5)


def test_of_a_cut_exchange_what_came_is_counted() -> None:
    pair = Pair()
    pair.client.received(post(b"Content-Length: 10\r\n\r\n", b"begin"))
    pair.upstream.received(b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"a\r\n1234567")
    pair.upstream.lost(True)
    assert pair.gate.log[-1][2:] == (200, Cause.UPSTREAM_RESET)
    assert pair.gate.body_bytes == (5, 7)


def test_of_an_exchange_that_the_client_leaves_what_came_is_counted() -> None:
    pair = Pair()
    pair.client.received(HEAD)
    pair.upstream.received(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123")
    pair.client.lost(True)
    assert pair.gate.log[-1][2:] == (200, Cause.CLIENT_GONE)
    assert pair.gate.body_bytes == (0, 3)


def test_what_goes_through_a_tunnel_is_its_body() -> None:
    pair = Pair()
    pair.client.received(HEAD.replace(b"\r\n\r\n", b"\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"))
    pair.upstream.received(TUNNEL + b"early")
    pair.client.received(b"abc")
    pair.upstream.received(b"de")
    pair.client.received(b"f")
    pair.upstream.ended()
    pair.client.ended()
    assert pair.gate.log[-1][2:] == (101, None)
    assert pair.gate.body_bytes == (4, 7)


def test_an_answer_of_the_proxy_has_no_body() -> None:
    pair = Pair()
    pair.answer_with(Cause.DENIED)
    pair.client.received(post(b"Content-Length: 4\r\n\r\n", b"body"))
    assert pair.gate.body_bytes == (4, 0)


# ---- HTTP/2


@pytest.mark.parametrize(("told", "status"), [("0", 0), ("14", 14), ("16", 16), ("17", 2), ("-1", 2), ("", 2), ("0 ", 2), ("1e1", 2)])
def test_the_grpc_status_of_the_trailers_is_told(told: str, status: int) -> None:
    chain = Chain()
    stream = chain.ask(GRPC, b"ping!")
    chain.answer(stream, body=b"pong", end=False)
    if told.strip() != told:
        return  # h2 does not send it
    chain.server.h2.send_headers(1, [("grpc-status", told)], end_stream=True)
    chain.run()
    assert chain.gate.log == [("finished", stream, 200, None)]
    assert (chain.gate.grpc_status, chain.gate.body_bytes) == (status, (5, 4))


def test_the_grpc_status_of_a_response_without_a_body_is_told() -> None:
    chain = Chain()
    stream = chain.ask(GRPC, b"ping")
    chain.answer(stream, [*OK2, ("grpc-status", "5")])
    assert (chain.gate.grpc_status, chain.gate.body_bytes) == (5, (4, 0))
    stream = chain.ask(GRPC, b"ping")
    chain.answer(stream, body=b"no status at all")
    assert (chain.gate.grpc_status, chain.gate.body_bytes) == (-1, (4, 16))


def test_an_answer_of_the_proxy_tells_the_status_it_gave() -> None:
    chain = Chain()
    chain.gate.decide = lambda _head, token: Answer(Cause.DENIED, True, token)
    chain.ask(GRPC, b"ping")
    assert (chain.gate.grpc_status, chain.gate.body_bytes[1]) == (7, 0)
    chain.ask([(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test")])
    assert (chain.gate.grpc_status, chain.gate.body_bytes) == (-1, (0, 0))


@pytest.mark.parametrize("announced", [True, False])
def test_http2_bodies_are_counted_whether_announced_or_not(announced: bool) -> None:
    chain = Chain()
    length = [("content-length", "3000")] if announced else []
    stream = chain.ask([*GRPC, *length], b"x" * 3000)
    chain.answer(stream, [*OK2, *length], b"y" * 1000, end=False)
    chain.server.h2.send_data(1, b"y" * 2000, end_stream=True)
    chain.run()
    assert chain.client.body(stream) == b"y" * 3000
    assert chain.gate.body_bytes == (3000, 3000)


def test_of_a_cut_http2_exchange_what_came_is_counted() -> None:
    chain = Chain()
    stream = chain.ask(GRPC, b"x" * 10, end=False)
    chain.answer(stream, [*OK2, ("content-length", "3000")], b"y" * 1000, end=False)
    chain.server.h2.reset_stream(1, 2)
    chain.run()
    assert chain.client.of(h2.events.StreamReset)
    assert (chain.gate.grpc_status, chain.gate.body_bytes) == (-1, (10, 1000))


def test_a_retried_request_is_told_the_status_of_the_second_answer() -> None:
    chain = Chain()
    stream = chain.ask([(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a.test")])
    chain.add_server()
    chain.far.lost(True)
    chain.run()
    server = chain.servers[1][0]
    server.h2.send_headers(1, [(":status", "200")])
    server.h2.send_data(1, b"four", end_stream=True)
    chain.run()
    assert chain.client.body(stream) == b"four"
    assert chain.gate.body_bytes == (0, 4)
