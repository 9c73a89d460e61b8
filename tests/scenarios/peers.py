"""The real clients and servers of scenarios: curl, an HTTP/1.1 app made with h11, programs and threads with a defined end."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import h11
import trio

from core.addrs import Addr

MIB = 1 << 20
PATIENCE_S = 30.0
"""How long something may take that should come at once: on a machine with more to do than processors, seconds pass before one's turn
comes. Nothing is lost by it where it comes at once."""


class Ran(NamedTuple):
    """How a program ended. err: for curl the response heads, then its complaint."""

    exit: int
    out: bytes
    err: str


async def run(*command: str, stdin: bytes = b"", patience_s: float = PATIENCE_S) -> Ran:
    """Run a program to its end; it is killed when something hangs."""
    with trio.fail_after(patience_s):
        done = await trio.run_process(list(command), stdin=stdin, capture_stdout=True, capture_stderr=True, check=False)
    return Ran(done.returncode, done.stdout, done.stderr.decode("latin-1"))


async def curl(entry: Addr, path: str, *options: str, stdin: bytes = b"") -> Ran:
    """One curl to a path at ``entry``; further URLs may be among the options."""
    return await run("curl", "-sS", "-D", "/dev/stderr", "--max-time", "25", *options, f"http://{entry}{path}", stdin=stdin)


@asynccontextmanager
async def program(*command: str, ready: Addr) -> AsyncIterator[None]:
    """A server program that is up when its port answers, and killed at the end."""
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[trio.Process]) -> None:
            await trio.run_process(
                list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, task_status=task_status
            )

        process = await nursery.start(serve)
        try:
            with trio.fail_after(PATIENCE_S):
                while not await _answers(ready):
                    assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                    await trio.sleep(0.01)  # another process: there is no event to wait for
            yield
        finally:
            process.kill()


async def _answers(addr: Addr) -> bool:
    try:
        stream = await trio.open_tcp_stream(addr.ip, addr.port)
    except OSError:
        return False
    await stream.aclose()
    return True


async def read_until(stream: trio.SocketStream, mark: bytes) -> bytes:
    """What arrives up to and including the bytes that end with ``mark``."""
    data = b""
    with trio.fail_after(PATIENCE_S):
        while not data.endswith(mark):
            more = await stream.receive_some(65536)
            assert more, f"the connection ended after {data!r}"
            data += more
    return data


async def read_all(stream: trio.SocketStream) -> bytes:
    """Everything up to the orderly end."""
    data = b""
    with trio.fail_after(PATIENCE_S):
        while more := await stream.receive_some(65536):
            data += more
    return data


Reply = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request at the app and the means to answer it."""

    def __init__(self, app: H11App, request: h11.Request, stream: trio.SocketStream, connection: h11.Connection) -> None:
        self.method = bytes(request.method)
        self.path = bytes(request.target)
        self.headers = {bytes(name): bytes(value) for name, value in request.headers}
        self.stream = stream
        self._app = app
        self._connection = connection
        self.trailers: dict[bytes, bytes] = {}

    async def body(self) -> bytes:
        """The whole request body; answers ``Expect`` first."""
        if self._connection.they_are_waiting_for_100_continue:
            await self.send(h11.InformationalResponse(status_code=100, headers=[]))
        parts = []
        while not isinstance(event := await next_event(self._connection, self.stream), h11.EndOfMessage):
            parts.append(bytes(event.data))
        self.trailers = {bytes(name): bytes(value) for name, value in event.headers}
        return b"".join(parts)

    async def send(self, *events: h11.Event) -> None:
        await self.stream.send_all(b"".join(self._connection.send(event) or b"" for event in events))

    async def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        """A response with a Content-Length where one belongs."""
        fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
        if status not in (204, 304):
            fields.append(("content-length", str(len(body))))
        sent = b"" if self.method == b"HEAD" else body
        await self.send(h11.Response(status_code=status, headers=fields), h11.Data(sent), h11.EndOfMessage())


class H11App:
    """An HTTP/1.1 server. reply: answers one request. connections, requests: how many there were."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self.connections = 0
        self.requests: list[tuple[bytes, bytes]] = []

    async def __call__(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        connection = h11.Connection(h11.SERVER)
        async with stream:
            try:
                while isinstance(request := await next_event(connection, stream), h11.Request):
                    self.requests.append((bytes(request.method), bytes(request.target)))
                    exchange = Exchange(self, request, stream, connection)
                    await self._reply(exchange)
                    if connection.their_state is h11.SEND_BODY:
                        await exchange.body()
                    if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                        return
                    connection.start_next_cycle()
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
                return


async def next_event(connection: h11.Connection, stream: trio.SocketStream):
    """The next h11 event of a connection."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await stream.receive_some(256 * 1024))
    return event


class Http1:
    """A client of one connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.connection = h11.Connection(h11.CLIENT)

    async def ask(self, target: str = "/", method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, bytes, dict[bytes, bytes]]:
        fields = [("host", "web.shop"), *((name.replace("_", "-"), value) for name, value in headers.items())]
        if body:
            fields.append(("content-length", str(len(body))))
        sent = self.connection.send(h11.Request(method=method, target=target, headers=fields))
        sent += self.connection.send(h11.Data(body)) + self.connection.send(h11.EndOfMessage())
        await self.stream.send_all(sent)
        answer = b""
        while not isinstance(event := await next_event(self.connection, self.stream), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                answer += bytes(event.data)
        if self.connection.their_state is h11.DONE:
            self.connection.start_next_cycle()
        return response.status_code, answer, dict(response.headers)
