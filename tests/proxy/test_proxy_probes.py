"""Probes performed for the kubelet: against real servers, with only the result passed on."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent import futures
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from core.runtime.admin import Request
from local import probing
from proxy import probes
from proxy.probes import InvalidProbe, ProbeRunner, read_probes
from proxy.protocol.grpc_health import HealthCheck, NotHealthy
from tests.certs import Authority

PATH = "/pillion-probe/app/livenessProbe"


async def probe(spec: dict[str, Any]) -> tuple[int, str]:
    response = await ProbeRunner(read_probes({PATH: spec}), "127.0.0.1").handle(Request("GET", PATH))
    return response.status, response.body.decode().strip()


async def against(app: Callable[[trio.SocketStream], Awaitable[None]], spec: dict[str, Any]) -> tuple[int, str]:
    """The result of a probe against an app that handles one connection at a time."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, app, [listener])
        kind = next(iter(spec))
        port = listener.socket.getsockname()[1]
        result = await probe({**spec, kind: {**spec[kind], "port": port}})
        nursery.cancel_scope.cancel()
    return result


class Http:
    """An app that answers each request with the next of these, and remembers the heads."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.heads: list[str] = []

    async def __call__(self, stream: trio.abc.Stream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some()
        self.heads.append(head.decode("latin-1"))
        await stream.send_all(self.answers.pop(0))
        await stream.aclose()


@pytest.mark.parametrize(("status", "result"), [("200", 200), ("204", 200), ("304", 200), ("400", 503), ("500", 503)])
async def test_http_succeeds_from_200_to_399(status: str, result: int) -> None:
    app = Http(
        f"HTTP/1.1 {status} x\r\ncontent-length: 6\r\n\r\nsecret".encode()
        if status not in ("204", "304")
        else f"HTTP/1.1 {status} x\r\n\r\n".encode()
    )
    answer = await against(app, {"httpGet": {"path": "/healthz?full=1"}})
    assert answer == (result, "ok" if result == 200 else f"failed: status {status}")
    assert app.heads[0].startswith("GET /healthz?full=1 HTTP/1.1\r\n")


async def test_http_sends_the_probes_own_headers() -> None:
    app = Http(b"HTTP/1.1 200 x\r\n\r\n")
    headers = [{"name": "Host", "value": "shop.example"}, {"name": "X-Probe", "value": "1"}, {"name": "x-probe", "value": "2"}]
    assert (await against(app, {"httpGet": {"path": "healthz", "httpHeaders": headers}}))[0] == 200
    head = app.heads[0].lower()
    assert head.startswith("get /healthz ")
    assert head.count("host:") == 1 and "host: shop.example\r\n" in head
    assert "x-probe: 1\r\n" in head and "x-probe: 2\r\n" in head
    assert "user-agent: kube-probe\r\n" in head


async def test_http_follows_redirects_on_the_same_place_only() -> None:
    app = Http(b"HTTP/1.1 302 x\r\nlocation: /login?next=1\r\n\r\n", b"HTTP/1.1 500 x\r\n\r\n")
    assert (await against(app, {"httpGet": {}}))[0] == 503
    assert app.heads[1].startswith("GET /login?next=1 ")
    elsewhere = Http(b"HTTP/1.1 302 x\r\nlocation: http://metadata.internal/\r\n\r\n")
    assert (await against(elsewhere, {"httpGet": {}}))[0] == 200
    assert len(elsewhere.heads) == 1
    loop = Http(*[b"HTTP/1.1 302 x\r\nlocation: /\r\n\r\n"] * 20)
    assert await against(loop, {"httpGet": {}}) == (503, "failed: more than 10 redirects")
    strange = Http(b"HTTP/1.1 302 x\r\nlocation: /a b\xff\r\n\r\n")
    assert (await against(strange, {"httpGet": {}}))[0] == 503


@pytest.mark.parametrize("answer", [b"", b"220 smtp ready\r\n", b"HTTP/1.1 200 x\r\nx: " + b"a" * 100_000])
async def test_http_fails_for_what_is_no_answer_and_passes_nothing_on(answer: bytes) -> None:
    status, text = await against(Http(answer), {"httpGet": {}})
    assert status == 503
    assert "smtp" not in text


async def test_https_does_not_check_the_certificate_as_the_kubelet_does_not(tmp_path: Path) -> None:
    credentials = Authority().credentials("spiffe://cluster.local/ns/shop/sa/cart", ends_in=-60)
    (tmp_path / "both.pem").write_bytes(credentials.key_pem + credentials.chain_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    plain = Http(b"HTTP/1.1 200 x\r\n\r\n", b"HTTP/1.1 200 x\r\n\r\n")

    async def app(stream: trio.SocketStream) -> None:
        try:
            await plain(trio.SSLStream(stream, context, server_side=True, https_compatible=True))
        except trio.BrokenResourceError:
            await trio.aclose_forcefully(stream)

    assert await against(app, {"httpGet": {"scheme": "HTTPS"}}) == (200, "ok")
    assert (await against(app, {"httpGet": {"scheme": "HTTP"}}))[0] == 503


async def test_tcp_succeeds_when_something_listens(unused: int) -> None:
    async def app(stream: trio.SocketStream) -> None:
        await stream.aclose()

    assert await against(app, {"tcpSocket": {}}) == (200, "ok")
    assert await probe({"tcpSocket": {"port": unused}}) == (503, f"failed: port {unused} cannot be connected to")


@pytest.mark.parametrize("kind", ["readinessProbe", "startupProbe"])
async def test_an_app_that_does_not_listen_yet_has_until_the_probes_timeout(kind: str, autojump_clock: MockClock) -> None:
    """The kubelet's next question would come a whole period later."""
    path = f"/pillion-probe/app/{kind}"
    with socket.socket() as app:
        app.bind(("127.0.0.1", 0))
        spec = {"tcpSocket": {"port": app.getsockname()[1]}, "timeoutSeconds": 3}
        runner = ProbeRunner(read_probes({path: spec}), "127.0.0.1")
        began = trio.current_time()
        answer = await runner.handle(Request("GET", path))
        assert answer.status == 503 and b"cannot be connected to" in answer.body, "and not that there was no result in time"
        assert trio.current_time() - began == pytest.approx(3, abs=0.05)

        async def begin_to_listen() -> None:
            await trio.sleep(2)
            app.listen()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin_to_listen)
            assert (await runner.handle(Request("GET", path))).status == 200


@pytest.fixture
def unused() -> Iterator[int]:
    """A port that nobody else gets but nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


async def test_the_timeout_is_the_probes_own(autojump_clock: MockClock) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    began = trio.current_time()
    assert await against(silent, {"httpGet": {}, "timeoutSeconds": 3}) == (503, "failed: no result within 3 s")
    assert trio.current_time() - began == pytest.approx(3)


class SlowApp:
    """Counts requests, and answers all of them once it may. ask: one caller of its probe."""

    def __init__(self) -> None:
        self.asked, self.may_answer = 0, trio.Event()
        self.runner: ProbeRunner
        self.statuses: list[int] = []

    async def __call__(self, stream: trio.SocketStream) -> None:
        self.asked += 1
        await self.may_answer.wait()
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async def ask(self) -> None:
        self.statuses.append((await self.runner.handle(Request("GET", PATH))).status)

    async def was_asked(self, times: int) -> None:
        with trio.fail_after(30):
            while self.asked < times:  # noqa: ASYNC110
                await trio.sleep(0.001)


def test_the_local_runner_knows_how_an_answer_begins() -> None:
    assert probing._FAILED == probes.FAILED


@asynccontextmanager
async def slow_app() -> AsyncIterator[SlowApp]:
    app = SlowApp()
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, app, [listener])
        spec = {"httpGet": {"port": listener.socket.getsockname()[1]}, "timeoutSeconds": 60}
        app.runner = ProbeRunner(read_probes({PATH: spec}), "127.0.0.1")
        yield app
        nursery.cancel_scope.cancel()


async def test_all_who_ask_at_once_get_the_result_of_one_attempt() -> None:
    """A stranger who asks sixty times must not have the kubelet wait for sixty answers of a slow app, nor the app give them."""
    async with slow_app() as app:
        async with trio.open_nursery() as callers:
            for _ in range(61):
                callers.start_soon(app.ask)
            await app.was_asked(1)
            app.may_answer.set()
        assert app.statuses == [200] * 61 and app.asked == 1
        await app.ask()
        assert app.asked == 2, "the next one asks anew"


async def test_who_waits_for_an_attempt_that_is_cut_makes_its_own() -> None:
    async with slow_app() as app, trio.open_nursery() as others:
        async with trio.open_nursery() as first:
            first.start_soon(app.ask)
            await app.was_asked(1)
            for _ in range(3):
                others.start_soon(app.ask)
            await wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        await app.was_asked(2)
        app.may_answer.set()
    assert app.statuses == [200] * 3 and app.asked == 2


async def test_the_log_says_when_a_probe_begins_to_fail_and_when_it_passes_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubelet's event says only that the status was 503."""
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(probes, "_log", SimpleNamespace(info=lambda event, **fields: told.append((event, fields.get("reason", "")))))
    outcomes = iter(["", "port 1 cannot be connected to", "port 1 cannot be connected to", "status 500", ""])

    async def performed(_probe: object, _ip: str) -> None:
        if why := next(outcomes):
            raise probes.ProbeFailed(why)

    monkeypatch.setattr(probes, "perform", performed)
    runner = ProbeRunner(read_probes({PATH: {"tcpSocket": {"port": 1}}}), "127.0.0.1")
    for _ in range(5):
        await runner.handle(Request("GET", PATH))
        await trio.sleep(1)
    assert told == [("probe failed", "port 1 cannot be connected to"), ("probe failed", "status 500"), ("probe passed", "")]


async def test_only_declared_paths_are_probed() -> None:
    runner = ProbeRunner(read_probes({PATH: {"tcpSocket": {"port": 1}}}), "127.0.0.1")
    assert (await runner.handle(Request("GET", PATH + "/x"))).status == 404


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ([], "expected an object"),
        ({}, "exactly one of"),
        ({"httpGet": {"port": 1}, "grpc": {"port": 1}}, "exactly one of"),
        ({"tcpSocket": {"port": "http"}}, "port: expected a number"),
        ({"tcpSocket": {"port": True}}, "port: expected a number"),
        ({"tcpSocket": {"port": 1}, "timeoutSeconds": 0}, "timeoutSeconds"),
        ({"httpGet": {"port": 1, "scheme": "FTP"}}, "scheme"),
        ({"httpGet": {"port": 1, "path": "/a b"}}, "not a request"),
        ({"httpGet": {"port": 1, "httpHeaders": [{"name": "x", "value": "a\r\nb: c"}]}}, "not a request"),
        ({"httpGet": {"port": 1, "httpHeaders": {"name": "x"}}}, "not a request"),
        ({"grpc": {"port": 1, "service": 3}}, "grpc.service"),
    ],
)
def test_a_probe_that_cannot_be_performed_is_refused_by_name(spec: Any, error: str) -> None:
    with pytest.raises(InvalidProbe, match=error) as caught:
        read_probes({PATH: spec})
    assert PATH in str(caught.value)


@pytest.fixture(scope="module")
def grpc_server() -> Iterator[int]:
    """A real gRPC server: ``shop`` serves, ``down`` does not, others are unknown."""

    def check(request: bytes, context: grpc.ServicerContext) -> bytes:
        service = request[2:].decode()
        if service not in ("", "shop", "down"):
            context.abort(grpc.StatusCode.NOT_FOUND, "secret detail")
        return b"\x08\x02" if service == "down" else b"\x08\x01"

    server = grpc.server(futures.ThreadPoolExecutor(1))
    methods = {"Check": grpc.unary_unary_rpc_method_handler(check)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(0).wait()


@pytest.mark.parametrize(
    ("service", "result"),
    [
        ("", (200, "ok")),
        ("shop", (200, "ok")),
        ("down", (503, "failed: the service is not serving")),
        ("other", (503, "failed: the server does not know this service")),
    ],
)
async def test_grpc_asks_a_real_server(grpc_server: int, service: str, result: tuple[int, str]) -> None:
    assert await probe({"grpc": {"port": grpc_server, "service": service}, "timeoutSeconds": 10}) == result


async def test_grpc_fails_for_a_server_without_health_checks() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        expected = (503, "failed: the server does not implement health checks")
        assert await probe({"grpc": {"port": port}, "timeoutSeconds": 10}) == expected
    finally:
        await trio.to_thread.run_sync(server.stop(0).wait)


async def test_grpc_fails_for_an_http1_server() -> None:
    assert (await against(Http(b"HTTP/1.1 400 x\r\n\r\n"), {"grpc": {}}))[0] == 503


@given(st.lists(st.binary(max_size=60), max_size=8), st.booleans())
def test_any_bytes_from_a_server_give_an_outcome_or_not_healthy(chunks: list[bytes], framed: bool) -> None:
    check = HealthCheck("10.0.0.1:80", "shop")
    try:
        for number, chunk in enumerate(chunks):
            frame = len(chunk).to_bytes(3, "big") + bytes([number % 10, chunk[0] if chunk else 4]) + b"\0\0\0\1" + chunk
            assert isinstance(check.received_untrusted(frame if framed else chunk), bytes)
        check.ended()
    except NotHealthy as error:
        assert str(error)
    assert not check.done
