"""The admin port: routes, refusals, and bounds against clients that are slow, wrong or many."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import structlog
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, memory_stream_pair

from core.addrs import ClientAddr, ListenAddr, parse_addr
from core.runtime import admin, logs
from core.runtime.admin import AdminServer, Request, Response, json_response, loopback_only, standard_routes, text_response
from core.runtime.listen import CannotListen, listen, trio_listener


async def _echo(request: Request) -> Response:
    return json_response({"rest": request.rest, "query": request.query, "body": request.body.decode()})


async def _broken(_: Request) -> Response:
    raise RuntimeError("dump failed")


async def _stuck(_: Request) -> Response:
    await trio.sleep_forever()
    raise AssertionError


ROUTES: admin.Routes = {
    ("GET", "/echo"): _echo,
    ("POST", "/echo"): _echo,
    ("GET", "/policy/"): _echo,
    ("GET", "/broken"): _broken,
    ("GET", "/stuck"): _stuck,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logs.configure("error", "json", lambda line: None)
    yield
    structlog.reset_defaults()
    logs.set_level("info")


@asynccontextmanager
async def connected(routes: admin.Routes = ROUTES) -> AsyncIterator[trio.abc.Stream]:
    client, server = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(AdminServer(routes).handle, server)
        yield client
        await client.aclose()


async def ask(data: bytes, routes: admin.Routes = ROUTES) -> bytes:
    """Everything the server says to these bytes until it closes (we never do)."""
    async with connected(routes) as client:
        await client.send_all(data)
        answer = b""
        async for chunk in client:
            answer += chunk
        return answer


def get(path: str, method: str = "GET", more: str = "connection: close\r\n") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n{more}\r\n".encode()


async def test_answers_a_route_with_query_and_rest_of_a_prefix() -> None:
    assert b'"a": "2"' in await ask(get("/echo?a=1&a=2"))
    answer = await ask(get("/policy/8080/x%2fy"))
    assert answer.startswith(b"HTTP/1.1 200 ") and b'"rest": "8080/x/y"' in answer


async def test_answers_requests_of_one_connection_in_turn() -> None:
    answer = await ask(get("/echo?n=1", more="") + get("/echo?n=2", more="") + get("/echo?n=3"))
    assert [answer.index(b'"n": "%d"' % n) for n in (1, 2, 3)] == sorted(answer.index(b'"n": "%d"' % n) for n in (1, 2, 3))
    assert answer.count(b"HTTP/1.1 200") == 3


async def test_head_is_get_without_a_body() -> None:
    answer = await ask(get("/echo", "HEAD"))
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n") and b"content-length: 4" in answer.lower()


async def test_an_unknown_path_is_404_and_names_what_there_is() -> None:
    answer = await ask(get("/nope"))
    assert answer.startswith(b"HTTP/1.1 404") and b"/echo" in answer


async def test_a_wrong_method_is_405_and_names_the_right_ones() -> None:
    answer = await ask(get("/echo", "DELETE"))
    assert answer.startswith(b"HTTP/1.1 405") and b"allow: GET, POST" in answer


async def test_a_broken_handler_costs_its_own_answer_only() -> None:
    answer = await ask(get("/broken", more="") + get("/echo"))
    assert answer.startswith(b"HTTP/1.1 500") and b"HTTP/1.1 200" in answer
    assert b"dump failed" not in answer


async def test_a_stuck_handler_is_given_up(autojump_clock: MockClock) -> None:
    assert (await ask(get("/stuck"))).startswith(b"HTTP/1.1 504")


async def test_a_body_is_read_after_100_continue() -> None:
    async with connected() as client:
        await client.send_all(b"POST /echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        assert b" 100 " in await client.receive_some()
        await client.send_all(b"hi")
        assert b'"body": "hi"' in await client.receive_some()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 40_000, b"431"),
        (b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 70000\r\n\r\n" + b"a" * 70_000, b"413"),
        (
            b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            + b"fff0\r\n"
            + b"a" * 0xFFF0
            + b"\r\n20\r\n"
            + b"a" * 32,
            b"413",
        ),
        (b"GET /echo HTTP/1.1\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01", b"400"),
        (get("/echo?" + "&".join(f"a{n}=1" for n in range(100))), b"400"),
    ],
)
async def test_what_is_too_much_or_wrong_is_refused_and_closed(data: bytes, status: bytes) -> None:
    assert (await ask(data)).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (get("/echo?" + "&".join(f"a{n}=1" for n in range(100)), "HEAD"), b"400"),
        (get("/echo", "HEAD", "content-length: 70000\r\n") + b"a" * 70_000, b"413"),
        (get("/echo", "HEAD", "transfer-encoding: chunked\r\n") + b"no size\r\n", b"400"),
    ],
)
async def test_a_head_that_is_refused_gets_no_body_either(data: bytes, status: bytes) -> None:
    answer = await ask(data)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert answer.endswith(b"\r\n\r\n")


async def test_a_bug_of_ours_ends_the_connection_and_not_the_listener() -> None:
    async def impossible(_: Request) -> Response:
        return Response(200, b"", headers=(("no name", ""),))

    assert await ask(get("/impossible"), {("GET", "/impossible"): impossible}) == b""


@pytest.mark.parametrize("data", [b"", b"GET /ec", b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nab"])
async def test_a_client_that_never_finishes_is_closed(autojump_clock: MockClock, data: bytes) -> None:
    assert await ask(data) == b""


async def test_beyond_the_bound_the_oldest_connection_makes_room_for_the_newest() -> None:
    """Or a pod that holds the limit would keep the kubelet's probes out."""
    server = AdminServer(ROUTES)
    async with trio.open_nursery() as nursery:
        clients = []
        for _ in range(66):
            client, end = memory_stream_pair()
            nursery.start_soon(server.handle, end)
            clients.append(client)
            await trio.testing.wait_all_tasks_blocked()  # trio starts tasks in any order, and the first ones are to go
        assert [await client.receive_some() for client in clients[:2]] == [b"", b""]
        for client in (clients[2], clients[65]):
            await client.send_all(get("/echo"))
            assert (await client.receive_some()).startswith(b"HTTP/1.1 200")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("ip", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.9", 403), (None, 200)])
async def test_what_changes_state_answers_on_loopback_only(ip: str | None, status: int) -> None:
    stopped: list[str] = []
    routes = standard_routes(not_ready=list, metrics=bytes, shutdown=stopped.append)
    client = None if ip is None else ClientAddr(parse_addr(f"[{ip}]:1" if ":" in ip else f"{ip}:1"))
    response = await routes["POST", "/shutdown"](Request("POST", "/shutdown", client=client))
    assert response.status == status
    assert stopped == (["/shutdown"] if status == 200 else [])
    assert (await loopback_only(_echo)(Request("GET", "/echo", client=client))).status == status


async def test_shutdown_needs_post() -> None:
    stopped: list[str] = []
    routes = standard_routes(not_ready=list, metrics=bytes, shutdown=stopped.append)
    assert (await ask(get("/shutdown"), routes)).startswith(b"HTTP/1.1 405")
    assert stopped == []


async def test_ready_says_why_not() -> None:
    reasons = ["no certificate yet", "no policy yet"]
    routes = standard_routes(not_ready=lambda: reasons, metrics=lambda: b"x 1\n")
    answer = await ask(get("/ready"), routes)
    assert answer.startswith(b"HTTP/1.1 503") and answer.endswith(b"\r\n\r\nno certificate yet\nno policy yet\n")
    reasons.clear()
    assert (await ask(get("/ready"), routes)).endswith(b"\r\n\r\nready\n")
    assert b"HTTP/1.1 404" in await ask(get("/shutdown", "POST"), routes)
    assert b"version=0.0.4" in await ask(get("/metrics"), routes)


async def test_the_log_level_is_read_and_set() -> None:
    routes = standard_routes(not_ready=list, metrics=bytes)
    assert b"\r\n\r\ndebug\n" in await ask(get("/log-level", "PUT", "content-length: 5\r\nconnection: close\r\n") + b"debug", routes)
    assert logs.level() == "debug"
    assert b"400" in await ask(get("/log-level", "PUT", "content-length: 1\r\nconnection: close\r\n") + b"x", routes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=5), st.booleans())
def test_any_bytes_get_an_answer_or_a_close_and_never_an_error(chunks: list[bytes], valid_start: bool) -> None:
    async def scenario() -> None:
        client, server = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(AdminServer({("GET", "/"): _answer}).handle, server)
            try:
                for chunk in [b"GET / HTTP/1.1\r\nhost: x\r\n", *chunks] if valid_start else chunks:
                    await client.send_all(chunk)
                await client.send_eof()
                answer = b"".join([chunk async for chunk in client])
                assert not answer or answer.startswith(b"HTTP/1.1 ")
            except trio.BrokenResourceError:
                pass  # the server closed before it had everything: its right

    async def _answer(_: Request) -> Response:
        return text_response("x")

    trio.run(scenario)


@pytest.mark.needs("curl")
async def test_curl_gets_an_answer_over_ipv4_and_ipv6_from_one_listener() -> None:
    sock = listen(ListenAddr(parse_addr("[::]:0")))
    port = sock.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(AdminServer(ROUTES).serve, [trio_listener(sock)])
        for url in (f"http://127.0.0.1:{port}/echo?a=b", f"http://[::1]:{port}/echo?a=b"):
            shown = await trio.run_process(["curl", "-sS", "--noproxy", "*", "--max-time", "5", url], capture_stdout=True)
            assert b'"a": "b"' in shown.stdout
        nursery.cancel_scope.cancel()


async def test_one_socket_takes_ipv4_and_ipv6() -> None:
    with listen(ListenAddr(parse_addr("[::]:0"))) as sock:
        for host in ("127.0.0.1", "::1"):
            await trio.aclose_forcefully(await trio.open_tcp_stream(host, sock.getsockname()[1]))


def test_a_taken_port_is_named() -> None:
    with listen(ListenAddr(parse_addr("127.0.0.1:0"))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CannotListen, match=rf"cannot listen on {address}: Address already in use; another process"):
            listen(ListenAddr(parse_addr(address)))
