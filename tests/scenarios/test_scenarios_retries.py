"""Retries of routes through both sidecars: what a caller sees of a backend that fails now and then, and what a backend sees of a caller."""

from __future__ import annotations

import socket
import struct

import h2.events
import pytest
import trio

from core.refs import Ref
from policy.wire import Action, Backend, Endpoint, Retry, Share, Timeouts
from tests.scenarios.grpc_peers import Cart, Client, calling, grpc_server
from tests.scenarios.h2_peers import H2, H2App
from tests.scenarios.mesh import WEB, Mesh, mesh
from tests.scenarios.peers import PATIENCE_S, Exchange, H11App, Http1
from tests.scenarios.test_scenarios_http2 import connected
from tests.scenarios.test_scenarios_routes import live, tell
from tests.scenarios.test_scenarios_timeouts import elapse, pending, until


class Flaky:
    """An app that answers so many requests with 503, and then with what it was sent. bodies: what came, in order."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.bodies: list[bytes] = []

    async def http1(self, exchange: Exchange) -> None:
        body = await exchange.body()
        self.bodies.append(body)
        await exchange.answer(b"busy" if len(self.bodies) <= self.failures else body, 503 if len(self.bodies) <= self.failures else 200)

    async def http2(self, end: H2, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.StreamEnded):
            body = end.data(event.stream_id)
            self.bodies.append(body)
            fails = len(self.bodies) <= self.failures
            end.h2.send_headers(event.stream_id, [(":status", "503" if fails else "200")])
            end.h2.send_data(event.stream_id, b"busy" if fails else body, end_stream=True)


def again(made: Mesh, attempts: int, *, timeouts: Timeouts | None = None, backoff_s: float = 0.001, backend: Backend | None = None) -> None:
    action = Action((Share(0),), timeouts=timeouts, retry=Retry((503,), attempts, backoff_s))
    tell(made, ("/", action), backends=(backend or live(made),))


def retries(made: Mesh, error: str) -> float:
    return made.metric(made.client, "pillion_retries_total", direction="outbound", error=error)


async def test_http1_callers_see_the_answer_that_was_good() -> None:
    app = Flaky(2)
    async with mesh(H11App(app.http1)) as made:
        again(made, 3)
        client = Http1(await made.dial())
        assert (await client.ask("/", "POST", b"a body"))[:2] == (200, b"a body")
        assert app.bodies == [b"a body"] * 3
        assert (await client.ask("/"))[0] == 200
        assert retries(made, "retriable-status") == 2
        assert made.metric(made.client, "pillion_response_total", status_code="200") == 2
        assert made.metric(made.client, "pillion_response_total", status_code="503") == 0


async def test_the_last_answer_is_given_when_there_was_no_good_one() -> None:
    app = Flaky(9)
    async with mesh(H11App(app.http1)) as made:
        again(made, 2)
        assert (await Http1(await made.dial()).ask("/"))[:2] == (503, b"busy")
        assert len(app.bodies) == 3


async def test_http2_callers_see_the_answer_that_was_good() -> None:
    app = Flaky(2)
    async with mesh(H2App(app.http2)) as made:
        again(made, 3)
        async with connected(made) as client:
            number = await client.request("/", "POST", b"a body")
            client.h2.end_stream(number)
            await client.flush()
            assert await client.answer(number) == ("200", b"a body")
            assert app.bodies == [b"a body"] * 3
            assert await client.answer(await client.request("/")) == ("200", b"")


async def test_an_attempt_that_takes_too_long_is_sent_again_and_reset_at_the_backend() -> None:
    async def slow_once(exchange: Exchange) -> None:
        seen.append(exchange.path)
        if len(seen) == 1:
            asked.set()
            await trio.sleep_forever()
        await exchange.answer(b"at last")

    asked, seen, answers = trio.Event(), list[bytes](), list[tuple[int, bytes]]()
    async with mesh(H11App(slow_once)) as made:
        again(made, 1, timeouts=Timeouts(0.0, 600.0))
        client = Http1(await made.dial())

        async def ask() -> None:
            answers.append((await client.ask("/"))[:2])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await asked.wait()
            elapse(made)
        assert answers == [(200, b"at last")]
        assert retries(made, "route-timeout") == 1
        assert len(pending(made)) == 0


async def test_a_grpc_call_that_takes_too_long_is_called_again() -> None:
    cart = Cart()

    def talk(client: Client) -> None:
        client.echo(b"", timeout=PATIENCE_S)
        assert client.wait(b"", timeout=PATIENCE_S) == b"too late"  # the service waits only until its first call is cancelled

    with grpc_server(cart) as app:
        async with mesh(app) as made:
            again(made, 50, timeouts=Timeouts(0.0, 0.5))
            async with made.entry() as entry:
                await trio.to_thread.run_sync(calling, entry, talk)
            assert retries(made, "route-timeout") >= 1


async def test_the_time_for_a_request_is_that_of_all_its_attempts() -> None:
    app = Flaky(10_000)
    async with mesh(H11App(app.http1)) as made:
        again(made, 100, timeouts=Timeouts(0.5), backoff_s=0.2)
        status, _, headers = await Http1(await made.dial()).ask("/")
        assert (status, headers[b"pillion-proxy-error"]) == (504, b"route-timeout")
        assert len(app.bodies) <= 3, "the pauses alone take longer than the time there is"


@pytest.mark.parametrize("http1", [True, False])
async def test_a_backend_that_cannot_be_reached_is_tried_as_often_as_the_rule_says(http1: bool) -> None:
    async with mesh(H11App(Flaky(0).http1)) as made:
        closed = Backend(Ref("", "Service", "shop", "closed"), (Endpoint("127.0.0.1:1", WEB.uri),))
        again(made, 3, backend=closed)
        if http1:
            status, _, headers = await Http1(await made.dial()).ask("/", "POST", b"a body")
            assert (status, headers[b"pillion-proxy-error"]) == (502, b"connect-refused")
        else:
            async with connected(made) as client:
                assert (await client.answer(await client.request("/")))[0] == "502"
        assert retries(made, "connect-refused") == 3


async def test_another_endpoint_is_asked_where_there_is_one() -> None:
    app = Flaky(0)
    async with mesh(H11App(app.http1)) as made:
        first, second = made.add_peer(), made.add_peer()
        again(made, 1, backend=Backend(Ref("", "Service", "shop", "two"), (first.endpoint, second.endpoint)))
        client = Http1(await made.dial())
        for number in range(6):
            app.failures = len(app.bodies) + 1
            assert (await client.ask("/"))[0] == 200
            assert (first.accepted > 0, second.accepted > 0) == (True, True), number


async def test_a_caller_that_leaves_during_a_pause_is_not_asked_for_again() -> None:
    app = Flaky(9)
    async with mesh(H11App(app.http1)) as made:
        again(made, 9, timeouts=Timeouts(600.0), backoff_s=600.0)
        stream = await made.dial()
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: web.shop\r\n\r\n")
        with trio.fail_after(PATIENCE_S):
            while not retries(made, "retriable-status"):  # noqa: ASYNC110 - a counter wakes nobody
                await trio.sleep(0.01)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()
        await until(pending(made), 0)
        assert len(app.bodies) == 1
