"""Several endpoints behind one Service: requests are spread, endpoints come and go, connections die, and no request is lost or repeated."""

from __future__ import annotations

import socket
import struct

import pytest
import trio
import trio.lowlevel

from tests.scenarios.h2_peers import H2, H2App
from tests.scenarios.mesh import Mesh, mesh
from tests.scenarios.peers import PATIENCE_S, Exchange, H11App, Http1, read_until


class Gathering:
    """Answers nobody until ``size`` requests are there at once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting = 0
        self._all = trio.Event()

    async def join(self) -> None:
        self._waiting += 1
        if self._waiting == self._size:
            self._all.set()
        with trio.fail_after(PATIENCE_S):
            await self._all.wait()


async def _ask(made: Mesh, times: int, seen: list[int], method: str = "GET") -> None:
    client = Http1(await made.dial())
    for _ in range(times):
        with trio.fail_after(PATIENCE_S):
            seen.append((await client.ask("/", method))[0])


async def test_requests_that_are_open_at_once_are_spread_over_all_endpoints():
    gathering = Gathering(30)

    async def reply(exchange: Exchange) -> None:
        await gathering.join()
        await exchange.answer(b"ok")

    async with mesh(H11App(reply)) as made:
        peers = [made.add_peer() for _ in range(3)]
        made.destination(*(peer.endpoint for peer in peers))
        seen: list[int] = []
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(_ask, made, 1, seen)
        assert seen == [200] * 30
        assert min(peer.accepted for peer in peers) >= 3  # the chance of a fair spread to miss this is nil


async def test_streams_of_one_client_connection_are_spread_over_all_endpoints():
    async def greet(end: H2, event: object) -> None:
        if type(event).__name__ == "StreamEnded":
            end.h2.send_headers(event.stream_id, [(":status", "200")], end_stream=True)

    async with mesh(H2App(greet)) as made, trio.open_nursery() as nursery:
        peers = [made.add_peer() for _ in range(2)]
        made.destination(*(peer.endpoint for peer in peers))
        client = H2(await made.dial(), client=True)
        await client.start()
        nursery.start_soon(client.pump)
        numbers = [await client.request() for _ in range(40)]
        assert [(await client.answer(number))[0] for number in numbers] == ["200"] * 40
        assert [peer.accepted for peer in peers] == [1, 1]  # both used, each over one shared connection
        nursery.cancel_scope.cancel()


async def test_opaque_connections_are_spread_over_all_endpoints():
    async def echo(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send_all(data)

    async with mesh(echo) as made:
        peers = [made.add_peer() for _ in range(2)]
        made.destination(*(peer.endpoint for peer in peers))
        streams = [await made.dial() for _ in range(20)]  # all open at once: the one with fewer gets the next
        for stream in streams:
            await stream.send_all(b"\x00")
            assert await stream.receive_some(1) == b"\x00"
        assert [peer.accepted for peer in peers] == [10, 10]


@pytest.mark.parametrize("told", ["before the controller says so", "after the controller says so"])
async def test_an_endpoint_that_leaves_loses_no_request(told: str):
    async def reply(exchange: Exchange) -> None:
        await exchange.answer(await exchange.body())

    async with mesh(H11App(reply)) as made:
        stays, leaves = made.add_peer(), made.add_peer()
        made.destination(stays.endpoint, leaves.endpoint)
        seen: list[int] = []
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(_ask, made, 60, seen)
            while len(seen) < 100:
                await trio.lowlevel.checkpoint()
            if told.startswith("before"):
                leaves.leave()
                while len(seen) < 200:
                    await trio.lowlevel.checkpoint()
                made.destination(stays.endpoint)
            else:
                made.destination(stays.endpoint)
                leaves.leave()
            nursery.start_soon(_ask, made, 60, seen)  # newcomers as well
        assert seen == [200] * 540
        assert leaves.accepted > 0


async def test_an_endpoint_that_arrives_is_used():
    gathering = Gathering(20)

    async def reply(exchange: Exchange) -> None:
        if exchange.path == b"/gather":
            await gathering.join()
        await exchange.answer()

    async with mesh(H11App(reply)) as made:
        first, second = made.add_peer(), made.add_peer()
        made.destination(first.endpoint)
        assert (await Http1(await made.dial()).ask())[0] == 200
        made.destination(first.endpoint, second.endpoint)

        async def gather() -> None:
            assert (await Http1(await made.dial()).ask("/gather"))[0] == 200

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(gather)
        assert second.accepted > 0


class Dying:
    """An app whose connections serve one request each, say that they live on, and are reset by the second request."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []

    async def __call__(self, stream: trio.SocketStream) -> None:
        async with stream:
            self.requests.append(await read_until(stream, b"\r\n\r\n"))
            await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            if data := await stream.receive_some(65536):
                self.requests.append(data)
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stream.socket.close()


async def test_a_kept_connection_that_dies_without_an_answer_is_retried_once_for_get():
    app = Dying()
    async with mesh(app) as made:
        client = Http1(await made.dial())
        assert [(await client.ask())[0] for _ in range(4)] == [200] * 4
        assert len(app.requests) == 7  # the second, third and fourth came twice each


async def test_and_not_for_a_post_that_may_have_been_acted_upon():
    app = Dying()
    async with mesh(app) as made:
        client = Http1(await made.dial())
        assert (await client.ask())[0] == 200
        status, _, headers = await client.ask("/pay", "POST", b"once")
        assert (status, headers[b"pillion-proxy-error"]) == (502, b"upstream-reset")
        assert sum(request.startswith(b"POST /pay") for request in app.requests) == 1


async def test_an_app_that_resets_every_connection_is_asked_once_more_at_most():
    asked: list[bytes] = []

    async def slam(stream: trio.SocketStream) -> None:
        asked.append(await read_until(stream, b"\r\n\r\n"))
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()

    async with mesh(slam) as made:
        assert (await Http1(await made.dial()).ask())[0] == 502
        assert len(asked) == 1  # a fresh connection that dies proves that the app saw the request
