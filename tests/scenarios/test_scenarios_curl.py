"""curl, the websockets library and raw bytes through both sidecars: the whole of HTTP/1.1 as a client sees it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import h11
import pytest
import trio
import websockets.sync.client

from core.addrs import Addr
from tests.scenarios.mesh import inbound_policy, mesh, only
from tests.scenarios.peers import MIB, PATIENCE_S, Exchange, H11App, curl, read_all, read_until, run
from tests.scenarios.websocket_peers import websocket_server

pytestmark = pytest.mark.needs("curl")
_BIG = random.Random(7).randbytes(10 * MIB)


async def _shop(exchange: Exchange) -> None:
    """The paths the tests below ask for; anything else is echoed."""
    path, body = exchange.path, b""
    if path == b"/big":
        await exchange.answer(_BIG)
    elif path in (b"/204", b"/304"):
        await exchange.answer(status=int(path[1:]), etag='"a"')
    elif path == b"/chunked":
        body = await exchange.body()
        head = h11.Response(status_code=200, headers=[("transfer-encoding", "chunked"), ("trailer", "x-sum")])
        await exchange.send(head, h11.Data(body[:3]), h11.Data(body[3:]))
        trailers = [("x-sum", hashlib.sha256(body).hexdigest()), *((b"x-got-" + name, value) for name, value in exchange.trailers.items())]
        await exchange.send(h11.EndOfMessage(headers=trailers))
    elif path == b"/until-close":
        await exchange.stream.send_all(b"HTTP/1.1 200 OK\r\n\r\nall of it")
    elif path.startswith(b"/cut"):
        framing = {b"/cut": b"content-length: 100\r\n\r\nhalf", b"/cut-chunked": b"transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"}[path]
        await exchange.stream.send_all(b"HTTP/1.1 200 OK\r\n" + framing)
        await exchange.stream.aclose()
    elif path == b"/early":
        await exchange.answer(b"too much", 413, connection="close")
    else:
        await exchange.answer(await exchange.body())


async def test_keep_alive_serves_several_requests_over_one_connection_on_either_side():
    app = H11App(_shop)
    async with mesh(app) as made, made.entry() as entry:
        ran = await curl(entry, "/a", "-w", "%{num_connects}\n", f"http://{entry}/b", f"http://{entry}/c")
        assert ran.out.decode().split() == ["1", "0", "0"]
        assert ("connection" in ran.err.lower(), app.connections, len(app.requests)) == (False, 1, 3)


async def test_ten_mebibytes_arrive_unchanged_both_ways(tmp_path: Path):
    (tmp_path / "big").write_bytes(_BIG)
    async with mesh(H11App(_shop)) as made, made.entry() as entry:
        assert (await curl(entry, "/big")).out == _BIG
        up = await curl(entry, "/echo", "--data-binary", f"@{tmp_path / 'big'}")
        assert "HTTP/1.1 100" in up.err  # curl asks first for a body of this size
        assert hashlib.sha256(up.out).digest() == hashlib.sha256(_BIG).digest()
        chunked = await curl(entry, "/echo", "-T", "-", "-H", "Expect:", stdin=_BIG)
        assert hashlib.sha256(chunked.out).digest() == hashlib.sha256(_BIG).digest()


async def test_expect_100_continue_is_asked_of_the_app_and_a_denial_needs_no_body():
    app = H11App(_shop)
    async with mesh(app) as made, made.entry() as entry:
        ran = await curl(entry, "/echo", "-H", "Expect: 100-continue", "-d", "body")
        assert (ran.out, ran.err.count("HTTP/1.1 100"), ran.err.count("HTTP/1.1 200")) == (b"body", 1, 1)
        made.policy(inbound_policy(only("spiffe://cluster.local/ns/shop/sa/other")))
        denied = await curl(entry, "/echo", "-H", "Expect: 100-continue", "-d", "body")
        assert ("HTTP/1.1 403" in denied.err, "HTTP/1.1 100" in denied.err) == (True, False)
        assert len(app.requests) == 1


async def test_chunked_bodies_pass_with_their_trailers_both_ways():
    async with mesh(H11App(_shop)) as made, made.entry() as entry:
        ran = await curl(entry, "/chunked", "-X", "POST", "-H", "Transfer-Encoding: chunked", "-d", "chunked body")
        assert (ran.out, f"x-sum: {hashlib.sha256(b'chunked body').hexdigest()}" in ran.err.lower()) == (b"chunked body", True)
        stream = await made.dial()
        head = b"POST /chunked HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\ntrailer: mark\r\n\r\n"
        await stream.send_all(head + b"4\r\nbody\r\n0\r\nmark: set\r\n\r\n")
        assert (await read_until(stream, b"x-got-mark: set\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_head_204_and_304_have_no_body_and_leave_the_connection_usable():
    app = H11App(_shop)
    async with mesh(app) as made, made.entry() as entry:
        head = await curl(entry, "/big", "-I", "-w", "%{num_connects}")
        assert (head.out[-1:], f"content-length: {len(_BIG)}" in head.err.lower()) == (b"1", True)
        ran = await curl(entry, "/204", "-w", "%{http_code}:%{num_connects} ", f"http://{entry}/304", f"http://{entry}/echo")
        assert ran.out.decode().split() == ["304:1", "200:0", "204:0"]
        assert ran.exit == 0


async def test_an_http_1_0_client_gets_its_answer_and_the_end_of_the_connection():
    async with mesh(H11App(_shop)) as made, made.entry() as entry:
        ran = await curl(entry, "/echo", "--http1.0", "-d", "old", "-w", "|%{num_connects}", f"http://{entry}/echo")
        assert ran.out == b"old|1old|1"
        until_close = await curl(entry, "/until-close", "--http1.0")
        assert (until_close.exit, until_close.out) == (0, b"all of it")


async def test_a_body_that_ends_with_the_connection_is_complete_when_the_app_closes_in_order():
    async with mesh(H11App(_shop)) as made, made.entry() as entry:
        ran = await curl(entry, "/until-close")
        assert (ran.exit, ran.out) == (0, b"all of it")


@pytest.mark.parametrize("path", ["/cut", "/cut-chunked"])
async def test_a_response_cut_short_reaches_the_client_as_cut_short(path: str):
    async with mesh(H11App(_shop)) as made, made.entry() as entry:
        ran = await curl(entry, path)
        assert ran.exit in (18, 56)  # transferred a partial file, or receiving failed
        assert made.metric(made.client, "pillion_response_total", status_code="200") <= 1


async def test_an_answer_before_the_end_of_the_body_reaches_a_client_that_still_sends(tmp_path: Path):
    (tmp_path / "big").write_bytes(_BIG)
    async with mesh(H11App(_shop)) as made, made.entry() as entry:
        ran = await curl(entry, "/early", "-H", "Expect:", "--data-binary", f"@{tmp_path / 'big'}")
        assert ("HTTP/1.1 413" in ran.err, ran.out) == (True, b"too much")


async def test_pipelined_requests_are_answered_in_their_order():
    async with mesh(H11App(_shop)) as made:
        stream = await made.dial()
        await stream.send_all(b"".join(b"POST /echo HTTP/1.1\r\nhost: web\r\ncontent-length: 2\r\n\r\n%02d" % i for i in range(20)))
        answers = await read_until(stream, b"\r\n\r\n19")
        assert [part[:2] for part in answers.split(b"\r\n\r\n")[1:]] == [b"%02d" % i for i in range(20)]


async def test_connect_becomes_a_tunnel_through_both_sidecars():
    async def proxy(exchange: Exchange) -> None:
        assert (exchange.method, exchange.path) == (b"CONNECT", b"inside.shop:80")
        await exchange.stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        request = await read_until(exchange.stream, b"\r\n\r\n")
        await exchange.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n" + request[:6])

    async with mesh(H11App(proxy)) as made, made.entry() as entry:
        ran = await run("curl", "-sS", "--proxytunnel", "-x", f"http://{entry}", "http://inside.shop/")
        assert (ran.exit, ran.out) == (0, b"GET / ")


async def test_a_websocket_is_upgraded_and_carries_messages_both_ways():
    def talk(entry: Addr) -> list[str | bytes]:
        with websockets.sync.client.connect(f"ws://{entry}/chat", proxy=None) as socket:
            said = [socket.recv(PATIENCE_S)]
            for message in ("text", b"\x00binary", "x" * 300_000):
                socket.send(message)
                said.append(socket.recv(PATIENCE_S))
            return said

    with websocket_server() as app:
        async with mesh(app) as made, made.entry() as entry:
            said = await trio.to_thread.run_sync(talk, entry)
            assert said == ["welcome spiffe://cluster.local/ns/shop/sa/cart", "text", b"\x00binary", "x" * 300_000]
            with trio.fail_after(PATIENCE_S):
                await made.server.live.wait_none()  # a tunnel is counted when it ends
            assert made.metric(made.server, "pillion_response_total", status_code="101") == 1


async def test_requests_beyond_a_limit_are_refused_by_the_first_sidecar():
    app = H11App(_shop)
    async with mesh(app) as made, made.entry() as entry:
        assert "HTTP/1.1 414" in (await curl(entry, "/" + "a" * 9000)).err
        assert "HTTP/1.1 431" in (await curl(entry, "/", "-H", "x: " + "a" * 70_000)).err
        assert "HTTP/1.1 431" in (await curl(entry, "/", *(part for i in range(120) for part in ("-H", f"x{i}: 1")))).err
        assert app.requests == []


async def test_a_head_that_never_ends_is_answered_408(autojump_clock: trio.testing.MockClock):
    async with mesh(H11App(_shop), PILLION_HEADER_TIMEOUT_S="1") as made:
        stream = await made.dial()
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: web\r\nx: ")
        assert (await read_all(stream)).startswith(b"HTTP/1.1 408")


async def test_a_client_that_ends_its_half_after_the_request_gets_its_answer():
    async with mesh(H11App(_shop)) as made:
        stream = await made.dial()
        await stream.send_all(b"POST /echo HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\n\r\nbody")
        await stream.send_eof()
        assert (await read_all(stream)).endswith(b"\r\n\r\nbody")


@pytest.mark.parametrize(
    "first", [b"GET /echo HTTP/1.1\r\nhost: web\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], ids=["HTTP/1.1", "HTTP/2"]
)
async def test_the_protocol_is_found_however_the_first_bytes_are_split(first: bytes):
    async with mesh(H11App(_shop)) as made:
        stream = await made.dial()
        for at in range(len(first)):
            await stream.send_all(first[at : at + 1])
            await trio.testing.wait_all_tasks_blocked()
        answer = await stream.receive_some(65536)
        assert answer.startswith(b"HTTP/1.1 200" if first.startswith(b"GET") else b"\0\0")


async def test_an_absolute_target_names_the_host_and_is_passed_on():
    seen: list[tuple[bytes, bytes | None]] = []

    async def reply(exchange: Exchange) -> None:
        seen.append((exchange.path, exchange.headers.get(b"host")))
        await exchange.answer()

    async with mesh(H11App(reply)) as made, made.entry() as entry:
        ran = await run("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-x", f"http://{entry}", "http://web.shop/path?q")
        assert ran.out == b"200"
        assert seen in ([(b"http://web.shop/path?q", b"web.shop")], [(b"/path?q", b"web.shop")])


@pytest.mark.parametrize(
    "first", [b"GET http://web.shop:80/path HTTP/1.1\r\nHost: web.shop\r\n\r\n", b"CONNECT web.shop:443 HTTP/1.1\r\nHost: web.shop\r\n\r\n"]
)
async def test_a_client_of_a_proxy_may_leave_out_the_default_port_in_its_host_field(first: bytes):
    """As Java's HttpURLConnection does."""
    said: list[bytes] = []

    async def proxy(stream: trio.SocketStream) -> None:
        said.append(await read_until(stream, b"\r\n\r\n"))
        await stream.send_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
        await stream.aclose()

    async with mesh(proxy) as made:
        stream = await made.dial()
        await stream.send_all(first)
        assert (await read_all(stream)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert said[0].startswith(first[:-2])
