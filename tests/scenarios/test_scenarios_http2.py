"""HTTP/2 through both sidecars: curl, nghttp and h2load with nghttpd, and the h2 package where a peer must misbehave on purpose."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import h2.errors
import h2.events
import pytest
import trio
import trio.lowlevel

from core.addrs import Addr
from tests.ports import unused_port
from tests.scenarios.h2_peers import H2, H2App
from tests.scenarios.mesh import CART, WEB, Mesh, inbound_policy, mesh, only
from tests.scenarios.peers import MIB, PATIENCE_S, curl, program, run

_BIG = random.Random(8).randbytes(10 * MIB)
H2Code = h2.errors.ErrorCodes


@asynccontextmanager
async def nghttpd(folder: Path, *options: str) -> AsyncIterator[Addr]:
    addr = Addr("127.0.0.1", unused_port())
    async with program("nghttpd", "--no-tls", "-a", addr.ip, "-d", str(folder), *options, str(addr.port), ready=addr):
        yield addr


@asynccontextmanager
async def connected(made: Mesh, **more: bool) -> AsyncIterator[H2]:
    """A client of the VIP, pumping."""
    async with trio.open_nursery() as nursery:
        client = H2(await made.dial(), client=True, **more)
        await client.start()
        nursery.start_soon(client.pump)
        yield client
        nursery.cancel_scope.cancel()


async def greet(end: H2, event: h2.events.Event) -> None:
    """Answers each complete request with the name the app was told, then the body."""
    if isinstance(event, h2.events.StreamEnded):
        number = event.stream_id
        head = dict(end.got(number, h2.events.RequestReceived)[0].headers)
        end.h2.send_headers(number, [(":status", "200")])
        end.h2.send_data(number, (head.get("pillion-client-id", "nobody") + "|").encode() + end.data(number), end_stream=True)


@pytest.mark.needs("curl", "nghttpd")
async def test_ten_mebibytes_arrive_unchanged_both_ways(tmp_path: Path):
    (tmp_path / "big").write_bytes(_BIG)
    async with nghttpd(tmp_path, "--echo-upload") as app, mesh(app) as made, made.entry() as entry:
        down = await curl(entry, "/big", "--http2-prior-knowledge")
        up = await curl(entry, "/", "--http2-prior-knowledge", "--data-binary", f"@{tmp_path / 'big'}")
        for ran in (down, up):
            assert (ran.exit, hashlib.sha256(ran.out).digest()) == (0, hashlib.sha256(_BIG).digest())
        assert made.metric(made.server, "pillion_response_total", status_code="200", client_id=CART.uri) == 2


@pytest.mark.needs("h2load", "nghttpd")
@pytest.mark.parametrize("endpoints", [1, 2])
async def test_thousands_of_requests_on_many_streams_all_succeed(tmp_path: Path, endpoints: int):
    (tmp_path / "small").write_bytes(b"x" * 3000)
    async with nghttpd(tmp_path) as app, mesh(app) as made, made.entry() as entry:
        made.destination(*(made.add_peer().endpoint for _ in range(endpoints)))
        ran = await run("h2load", "-n", "3000", "-c", "4", "-m", "60", f"http://{entry}/small")
        assert b"3000 succeeded, 0 failed, 0 errored" in ran.out, ran.out
        assert made.metric(made.server, "pillion_request_total") == 3000


@pytest.mark.needs("nghttp", "nghttpd")
async def test_nghttp_sends_trailers_and_reads_a_big_answer(tmp_path: Path):
    (tmp_path / "big").write_bytes(_BIG[:MIB])
    async with nghttpd(tmp_path) as app, mesh(app) as made, made.entry() as entry:
        ran = await run("nghttp", "--no-dep", "--trailer=x-end: here", f"--data={tmp_path / 'big'}", f"http://{entry}/big")
        assert (ran.exit, ran.out) == (0, _BIG[:MIB])


async def test_streams_are_decided_on_one_by_one():
    async with mesh(H2App(greet)) as made, connected(made) as client:
        assert await client.answer(await client.request(body=None)) == ("200", f"{CART.uri}|".encode())
        made.policy(inbound_policy(only(WEB)))
        assert (await client.answer(await client.request()))[0] == "403"
        made.policy(inbound_policy(only(CART)))
        lying = [("pillion-client-id", WEB.uri)]
        assert await client.answer(await client.request(more=lying)) == ("200", f"{CART.uri}|".encode())
        made.nowhere()
        assert (await client.answer(await client.request()))[0] == "503"


async def test_a_reset_passes_both_ways_with_its_code():
    async def refuse(end: H2, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived) and dict(event.headers)[":path"] == "/refused":
            end.h2.reset_stream(event.stream_id, H2Code.ENHANCE_YOUR_CALM)

    app = H2App(refuse)
    async with mesh(app) as made, connected(made) as client:
        refused = await client.request("/refused")
        await client.wait(lambda: bool(client.got(refused, h2.events.StreamReset)) or bool(client.got(refused, h2.events.StreamEnded)))
        open_ended = await client.request("/open", "POST", b"first")
        await app.connections[0].wait(lambda: app.connections[0].data(3) == b"first")
        client.h2.reset_stream(open_ended, H2Code.CANCEL)
        await client.flush()
        await app.connections[0].wait(lambda: bool(app.connections[0].got(3, h2.events.StreamReset)))
        assert app.connections[0].got(3, h2.events.StreamReset)[0].error_code is H2Code.CANCEL
        assert made.metric(made.server, "pillion_tcp_open_total", client_id=CART.uri) == 1


async def test_a_stream_that_nobody_reads_does_not_hold_up_another_and_costs_bounded_memory():
    written = 0

    async def flood(end: H2, event: h2.events.Event) -> None:
        nonlocal written
        if isinstance(event, h2.events.RequestReceived):
            end.h2.send_headers(event.stream_id, [(":status", "200")])
            if event.stream_id != 1:
                end.h2.send_data(event.stream_id, b"quick", end_stream=True)
        while 1 in end.seen and (room := min(end.h2.local_flow_control_window(1), 16384)):
            end.h2.send_data(1, bytes(room))
            written += room

    app = H2App(flood)
    async with mesh(app) as made, connected(made, credit=False) as client:
        await client.request("/unread")
        await client.wait(lambda: len(client.data(1)) >= 65535)
        client.h2.increment_flow_control_window(1 << 20)  # of the connection, not of the stream
        await client.flush()
        assert (await client.answer(await client.request("/quick")))[1] == b"quick"
        assert len(client.data(1)) == 65535
        assert written < 4 * MIB  # what the windows of two hops take


async def test_goaway_of_the_app_ends_a_connection_and_no_request():
    async def retire(end: H2, event: h2.events.Event) -> None:
        await greet(end, event)
        if isinstance(event, h2.events.StreamEnded) and event.stream_id == 3:
            end.h2.close_connection()

    app = H2App(retire)
    async with mesh(app) as made, connected(made) as client:
        for _ in range(10):
            assert (await client.answer(await client.request()))[0] == "200"
        assert len(app.connections) >= 3


async def test_a_ping_is_answered_by_the_sidecar_itself():
    app = H2App(greet)
    async with mesh(app) as made, connected(made) as client:
        client.h2.ping(b"12345678")
        await client.flush()
        await client.wait(lambda: any(isinstance(event, h2.events.PingAckReceived) for event in client.events))
        assert app.connections == []


async def test_an_extended_connect_becomes_a_tunnel_on_one_stream():
    async def tunnel(end: H2, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            head = dict(event.headers)
            assert (head[":method"], head[":protocol"]) == ("CONNECT", "websocket")
            end.h2.send_headers(event.stream_id, [(":status", "200")])
        elif isinstance(event, h2.events.DataReceived):
            end.h2.send_data(event.stream_id, event.data.upper())

    app = H2App(tunnel, enable_connect_protocol=1)
    async with mesh(app) as made, connected(made) as client:
        await client.wait(lambda: client.h2.remote_settings.enable_connect_protocol == 1)
        number = await client.request("/chat", "CONNECT", b"", [(":protocol", "websocket")])
        for word in (b"one", b"two"):
            client.h2.send_data(number, word)
            await client.flush()
            await client.wait(lambda word=word: client.data(number).endswith(word.upper()))


async def test_an_extended_connect_that_the_app_does_not_offer_is_refused():
    app = H2App(greet)
    async with mesh(app) as made, connected(made) as client:
        number = await client.request("/chat", "CONNECT", b"", [(":protocol", "websocket")])
        await client.wait(lambda: bool(client.got(number, h2.events.ResponseReceived)))
        assert dict(client.got(number, h2.events.ResponseReceived)[0].headers)[":status"] == "502"
        assert app.connections[0].got(1, h2.events.RequestReceived) == []


async def test_a_header_list_beyond_the_limit_is_431_and_the_connection_lives():
    app = H2App(greet)
    async with mesh(app) as made, connected(made) as client:
        await client.wait(lambda: client.h2.remote_settings.header_table_size == 0)
        assert (await client.answer(await client.request(more=[(f"x-{at}", "v" * 4000) for at in range(17)])))[0] == "431"
        assert app.connections == []
        assert (await client.answer(await client.request()))[0] == "200"


@pytest.mark.parametrize("copies", ["of one table entry", "written out"])
async def test_a_header_bomb_ends_its_connection_and_never_reaches_the_app(copies: str):
    app = H2App(greet)
    async with mesh(app) as made, trio.open_nursery() as nursery:
        client = H2(await made.dial(), client=True)
        await client.start()
        indexed = copies == "of one table entry"  # 4 KB on the wire, a megabyte decoded; the limit on tables is not known yet
        await client.request(more=[("x-same", "v" * 3900)] * 300 if indexed else [(f"x-{at}", "v" * 4000) for at in range(60)])
        nursery.start_soon(client.pump)
        with trio.fail_after(PATIENCE_S):
            while not client.over:
                await trio.lowlevel.checkpoint()
        goaway = [event for event in client.events if isinstance(event, h2.events.ConnectionTerminated)]
        assert goaway[0].error_code is H2Code.ENHANCE_YOUR_CALM
        assert app.connections == []
