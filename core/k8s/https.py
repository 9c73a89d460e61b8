"""The HTTPS front of a component: bounded connections, one TLS context whose certificate may change, hypercorn's HTTP/1.1 on trio.

Whoever can reach the port may say anything: a connection that breaks a rule ends alone, and one client cannot keep the others out.
Moves requests to a starlette application; decides nothing about them. Called by the app modules of injector and policy controller for
their webhooks, and by `identity.serve`.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request

from core.runtime import logs
from core.runtime.arrivals import Turns, serve_arrivals
from core.runtime.rooms import Rooms
from core.runtime.throttle import Throttle

_CONNECTIONS_MAX = 128
_HANDSHAKES_OF_ONE_CLIENT = 8  # at a time
_BODY_TIMEOUT_S = 5.0
_GRACE_S = 2.0

log = logs.logger("https")


class BadBody(Exception):
    """A body that is too long, too slow or not whole. status: what to answer."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def server_context() -> ssl.SSLContext:
    """TLS 1.3, HTTP/1.1, no resumption, clients unauthenticated (kube-apiserver shows no certificate). It has no certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The whole body; raises BadBody."""
    if request.scope["http_version"] != "1.1":
        raise BadBody(400, "HTTP/1.1 only")
    body = bytearray()
    try:
        with trio.fail_after(_BODY_TIMEOUT_S):
            async with aclosing(request.stream()) as chunks:
                async for chunk in chunks:
                    body += chunk
                    if len(body) > most_bytes:
                        raise BadBody(413, f"the body is longer than {most_bytes} bytes")
    except trio.TooSlowError:
        raise BadBody(408, f"the body did not arrive within {_BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise BadBody(400, "the connection ended before the body") from None
    return bytes(body)


class Bodies:
    """Bodies of which strangers cannot make us hold much: ordinary ones, bounded by the number of connections, and larger ones one at a
    time, until their work is done."""

    def __init__(self, ordinary_bytes: int, most_bytes: int) -> None:
        self._ordinary_bytes = ordinary_bytes
        self._most_bytes = most_bytes
        self._large = trio.CapacityLimiter(1)

    async def work(self, request: Request, answer: Callable[[bytes], Awaitable[bytes]]) -> bytes:
        """What ``answer`` makes of the body; raises BadBody, and what it raises."""
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:12]) <= self._ordinary_bytes:
            return await answer(await read_body(request, self._ordinary_bytes))
        async with self._large:
            return await answer(await read_body(request, self._most_bytes))


class _Config(Config):
    """Hypercorn's settings."""

    def __init__(self) -> None:
        self.accesslog = None
        self.errorlog = None
        self.include_server_header = False
        self.h11_max_incomplete_size = 16 * 1024
        self.keep_alive_timeout = 100.0  # Go closes idle connections after 90 s: the client goes first, so no request meets a closed one
        self.read_timeout = 120
        self.ssl_handshake_timeout = 5.0
        self.graceful_timeout = _GRACE_S
        self.websocket_max_message_size = 1024


class _Http1Server(TCPServer):
    """Hypercorn's, which takes HTTP/2 without ALPN too. A stranger could have it hold 1 MiB of a header block for each connection, sixty
    times what HTTP/1.1 lets him, and no client of ours speaks it."""

    async def _read_data(self) -> None:
        self.protocol.protocol._check_protocol = _stay_http1  # type: ignore[union-attr, method-assign]
        await super()._read_data()


async def _stay_http1(event: object) -> None:
    """Replaces hypercorn's switch to HTTP/2: a preface is then refused as a request of HTTP/2.0, and a field Upgrade means nothing."""


async def serve_https(
    application: Starlette,
    context: ssl.SSLContext,
    sockets: Sequence[socket.socket],
    shutdown: Callable[[], Awaitable[None]],
    *,
    config: Config | None = None,
    connections_max: int = _CONNECTIONS_MAX,
    of_one_client_max: int = _CONNECTIONS_MAX,
    few_of_one_client: int = 0,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on listening sockets until ``shutdown`` returns, then finish what is in work within two seconds.

    config: hypercorn's settings, if not those of a webhook. connections_max and the next two: see core.runtime.rooms.
    """
    config, worker = config or _Config(), WorkerContext(None)
    rooms, turns = Rooms(connections_max, of_one_client_max, few_of_one_client), Turns(_HANDSHAKES_OF_ONE_CLIENT)
    throttle = Throttle(time.monotonic)
    app: Any = wrap_app(application, config.wsgi_max_body_size, "asgi")  # type: ignore[arg-type]

    async def handle(transport: trio.SocketStream) -> None:
        ip = _ip_of(transport)
        stream = trio.SSLStream(transport, context, server_side=True, https_compatible=True)
        try:
            with rooms.one(ip):
                async with turns.one(ip):
                    with trio.fail_after(config.ssl_handshake_timeout):
                        await stream.do_handshake()
                await _Http1Server(app, config, worker, ConnectionState({}), stream)
        except (trio.BrokenResourceError, trio.TooSlowError):
            pass  # no handshake, which many a probe of the port leaves it at
        except Exception as error:  # what a stranger sends, or does not, must never end the server
            throttle.say(log.warning, "failed", "connection failed", error=repr(error)[:300])
        finally:
            await trio.aclose_forcefully(stream)

    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]
    async with trio.open_nursery() as handlers:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(serve_arrivals, listeners, handle, handlers)
            task_status.started()
            await shutdown()
            accepting.cancel_scope.cancel()
        await worker.terminated.set()
        handlers.cancel_scope.deadline = trio.current_time() + _GRACE_S


def _ip_of(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return ""
