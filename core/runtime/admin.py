"""The admin port: a small HTTP/1.1 server for liveness, readiness, metrics, shutdown and read-only dumps.

It parses with h11, answers one request at a time per connection, and bounds everything: connections, heads, bodies, time. It is meant
for kubelets, Prometheus and people with curl, never for the data path. The routes are the caller's; this module knows no component.
"""

from __future__ import annotations

import ipaddress
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import h11
import msgspec
import trio

from core.addrs import ClientAddr, InvalidAddr, from_sockaddr
from core.runtime import logs
from core.runtime.rooms import Rooms

_log = logs.logger("admin")

_HEAD_BYTES_MAX = 16 << 10
_BODY_BYTES_MAX = 64 << 10
_CONNECTIONS_MAX = 64
_IDLE_S = 30.0  # between requests, and for a request to arrive whole
_SEND_S = 30.0  # for an answer to be taken
_HANDLER_S = 60.0  # a probe's own timeout is shorter (kubelet's default: 1 s)

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Request:
    """What a handler gets. path: percent-decoded, without the query. rest: what follows the prefix of a prefix route, else empty.

    query: the last value of each name. client: None on a Unix socket.
    """

    method: str
    path: str
    rest: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    client: ClientAddr | None = None


@dataclass(frozen=True)
class Response:
    """status: 200 to 599."""

    status: int = 200
    body: bytes = b""
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()


Handler = Callable[[Request], Awaitable[Response]]
Routes = Mapping[tuple[str, str], Handler]
"""(method, path) -> handler. A path that ends in ``/`` stands for everything below it; the longest one wins. HEAD follows GET."""


def text_response(text: str, status: int = 200) -> Response:
    """A line (or lines) of text; the final newline is added."""
    return Response(status, text.encode() + b"\n")


def json_response(value: object, status: int = 200) -> Response:
    """Anything msgspec can encode; other objects as their text."""
    return Response(status, msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2) + b"\n", JSON)


def loopback_only(handler: Handler) -> Handler:
    """Refuse everybody but this host's (pod's) own processes with 403: for what changes state."""

    async def guarded(request: Request) -> Response:
        if request.client is not None and not ipaddress.ip_address(request.client.ip).is_loopback:
            return text_response(f"{request.path} answers on loopback only; you are {request.client.ip}", 403)
        return await handler(request)

    return guarded


def standard_routes(
    *, not_ready: Callable[[], Iterable[str]], metrics: Callable[[], bytes], shutdown: Callable[[str], None] | None = None
) -> dict[tuple[str, str], Handler]:
    """``/live /ready /metrics`` and, with ``shutdown``, ``POST /shutdown``; also ``/log-level`` to read and (loopback) set it.

    not_ready: one sentence for each reason why not; none means ready. shutdown: starts the drain, gets the reason.
    """

    async def live(_: Request) -> Response:
        return text_response("live")

    async def ready(_: Request) -> Response:
        reasons = list(not_ready())
        return text_response("\n".join(reasons), 503) if reasons else text_response("ready")

    async def scrape(_: Request) -> Response:
        return Response(200, metrics(), PROMETHEUS)

    async def get_level(_: Request) -> Response:
        return text_response(logs.level())

    async def put_level(request: Request) -> Response:
        try:
            logs.set_level(request.body.decode("utf-8", "replace").strip())
        except ValueError as error:
            return text_response(str(error), 400)
        return text_response(logs.level())

    routes: dict[tuple[str, str], Handler] = {
        ("GET", "/live"): live,
        ("GET", "/ready"): ready,
        ("GET", "/metrics"): scrape,
        ("GET", "/log-level"): get_level,
        ("PUT", "/log-level"): loopback_only(put_level),
    }
    if shutdown is not None:
        stop = shutdown

        async def shut_down(_: Request) -> Response:
            stop("/shutdown")
            return text_response("shutting down")

        routes["POST", "/shutdown"] = loopback_only(shut_down)
    return routes


class AdminServer:
    """Serves routes on any number of listeners. Routes are looked up at each request, so a mapping that grows later is fine."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        # Refusing newcomers would let any pod that holds all connections keep the kubelet's probes out, and so have the pod restarted.
        self._rooms = Rooms(_CONNECTIONS_MAX, _CONNECTIONS_MAX)

    async def serve(self, listeners: list[trio.SocketListener], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; closes the listeners. On cancellation connections are cut, as nothing here is worth waiting for."""
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self.handle, listeners)
            task_status.started()

    async def handle(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until it ends, breaks a rule or idles; never raises for what a client does."""
        client = _client_of(stream)
        try:
            with self._rooms.one(client.ip if client else ""):
                try:
                    await _Connection(self._routes, stream, client).run()
                except* (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass  # the client went away: nobody is left to tell
        except Exception as error:  # raised from here it would end the listener, and with it the process
            _log.error("a bug of ours ended an admin connection", exc_info=error)
        finally:
            with trio.move_on_after(1) as closing:
                closing.shield = True
                await stream.aclose()


class _Connection:
    """One client: requests in, answers out, in turn."""

    def __init__(self, routes: Routes, stream: trio.abc.Stream, client: ClientAddr | None) -> None:
        self._routes = routes
        self._stream = stream
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES_MAX)
        self._client = client
        self._head = False  # the request that was begun is a HEAD, whose answers have no body, refusals neither

    async def run(self) -> None:
        while True:
            self._head = False
            try:
                with trio.fail_after(_IDLE_S):
                    request = await self._next_request()
            except h11.RemoteProtocolError as error:
                await self._send(text_response(str(error), error.error_status_hint))
                return
            except trio.TooSlowError:
                return
            if request is None:
                return
            await self._send(await self._answer(request))
            if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
                return
            self._h11.start_next_cycle()

    async def _next_request(self) -> Request | None:
        """The next request with its whole body; None when the client is done."""
        head: h11.Request | None = None
        body = b""
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                if self._h11.they_are_waiting_for_100_continue:
                    go_on = self._h11.send(h11.InformationalResponse(status_code=100, headers=[]))
                    await self._stream.send_all(go_on or b"")
                self._h11.receive_data(bytes(await self._stream.receive_some(_HEAD_BYTES_MAX)))
            elif isinstance(event, h11.Request):
                head = event
                self._head = event.method == b"HEAD"
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
                if len(body) > _BODY_BYTES_MAX:
                    raise h11.RemoteProtocolError(f"body longer than {_BODY_BYTES_MAX} bytes", error_status_hint=413)
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return self._request(head, body)
            else:
                return None  # ConnectionClosed, or PAUSED because the client asked to leave HTTP

    def _request(self, head: h11.Request, body: bytes) -> Request:
        target = head.target.decode("latin-1")
        path, _, query = target.partition("?")
        try:
            pairs = urllib.parse.parse_qsl(query, max_num_fields=64)
        except ValueError:
            raise h11.RemoteProtocolError("more than 64 query parameters", error_status_hint=400) from None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        return Request(head.method.decode("latin-1"), urllib.parse.unquote(path), "", dict(pairs), headers, body, self._client)

    async def _answer(self, request: Request) -> Response:
        found = _find(self._routes, request.method, request.path)
        if isinstance(found, Response):
            return found
        handler, rest = found
        routed = Request(request.method, request.path, rest, request.query, request.headers, request.body, request.client)
        try:
            with trio.fail_after(_HANDLER_S):
                return await handler(routed)
        except trio.TooSlowError:
            return text_response(f"{request.path} took longer than {_HANDLER_S:g} s", 504)
        except Exception as error:  # one broken dump must not take liveness and metrics with it
            _log.error("admin request failed", method=request.method, path=request.path, exc_info=error)
            return text_response(f"{request.path} failed: {type(error).__name__}; see the log", 500)

    async def _send(self, response: Response) -> None:
        headers = [("content-type", response.content_type), ("content-length", str(len(response.body))), *response.headers]
        if self._h11.their_state is not h11.DONE:
            headers.append(("connection", "close"))
        data = self._h11.send(h11.Response(status_code=response.status, headers=headers)) or b""
        data += b"" if self._head else self._h11.send(h11.Data(data=response.body)) or b""
        data += self._h11.send(h11.EndOfMessage()) or b""
        with trio.move_on_after(_SEND_S) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("the client does not read")


def _find(routes: Routes, method: str, path: str) -> tuple[Handler, str] | Response:
    """The handler and what its prefix left over, or the refusal (404, 405)."""
    lookup = "GET" if method == "HEAD" else method
    places = [path, *(path[: index + 1] for index in range(len(path) - 1, -1, -1) if path[index] == "/")]
    for place in places:
        handler = routes.get((lookup, place))
        if handler is not None:
            return handler, path[len(place) :]
        allowed = sorted({method for method, known in routes if known == place})
        if allowed:
            refusal = text_response(f"{path} takes {', '.join(allowed)}", 405)
            return Response(405, refusal.body, TEXT, (("allow", ", ".join(allowed)),))
    known = " ".join(sorted({known for _, known in routes}))
    return text_response(f"no {path} here; there is: {known}", 404)


def _client_of(stream: trio.abc.Stream) -> ClientAddr | None:
    """Who connected; None for a Unix socket or an in-memory stream, which only this host can reach."""
    if not isinstance(stream, trio.SocketStream):
        return None
    try:
        return ClientAddr(from_sockaddr(stream.socket.getpeername()))
    except (OSError, InvalidAddr, IndexError):
        return None if stream.socket.family == trio.socket.AF_UNIX else ClientAddr(_NOBODY)


_NOBODY = from_sockaddr(("0.0.0.0", 0))  # the client is gone already: certainly not loopback
