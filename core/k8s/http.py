"""One HTTP/1.1 connection to the API server over trio: request out, response head and body chunks in, all of it bounded.

Knows TLS and framing, nothing of Kubernetes. Used by core.k8s.client and core.k8s.watch; what goes wrong is `Broken` with a sentence.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import h11
import trio

CONNECT_S = 10.0
_READ_BYTES = 65536
_HEAD_BYTES = 64 * 1024
_KEEPALIVE_S, _KEEPALIVE_PROBES = 15, 4  # a watch may be silent for minutes: a vanished peer is noticed within 75 s
_USER_TIMEOUT_MS = 30_000


class Broken(Exception):
    """The connection could not be made, or did not survive. untrusted: the server's certificate was the reason."""

    def __init__(self, sentence: str, *, untrusted: bool = False) -> None:
        super().__init__(sentence)
        self.untrusted = untrusted


@dataclass(frozen=True)
class Access:
    """Where an API server is and what we show to it.

    prefix: path in front of every request ("" or "/k8s/clusters/x"). tls: None for plain HTTP (tests, kubectl proxy). server_name: what
    its certificate must say. authorization: value of the header, "" for none; may read files or run a program, so it is called in a
    thread. namespace: the one that commands mean without saying so.
    """

    host: str
    port: int
    prefix: str = ""
    tls: ssl.SSLContext | None = None
    server_name: str = ""
    authorization: Callable[[], str] = str
    namespace: str = "default"

    @property
    def authority(self) -> str:
        """``host:port`` as it stands in the Host header and in error messages."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Head:
    """Status and headers (names in lower case) of a response."""

    status: int
    headers: Mapping[str, str]


class Connection:
    """One request at a time; ``reusable`` after a response that was read to its end."""

    def __init__(self, stream: trio.abc.Stream, access: Access) -> None:
        self._stream = stream
        self._access = access
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
        self.idle_since = 0.0

    @classmethod
    async def open(cls, access: Access) -> Connection:
        """Connect within CONNECT_S; raises Broken."""
        stream: trio.abc.Stream | None = None
        try:
            with trio.fail_after(CONNECT_S):
                tcp = stream = await trio.open_tcp_stream(access.host, access.port)
                _tune(tcp)
                if access.tls is not None:
                    name = access.server_name or access.host
                    stream = trio.SSLStream(tcp, access.tls, server_hostname=name, https_compatible=True)
                    await stream.do_handshake()
        except BaseException as error:
            if stream is not None:
                await trio.aclose_forcefully(stream)
            if isinstance(error, trio.TooSlowError | trio.BrokenResourceError | OSError):
                raise _broken(access, error) from error
            raise
        return cls(stream, access)

    async def request(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> Head:
        """Send a request and wait for the head of its final response; raises Broken."""
        lines = [("host", self._access.authority), *headers.items()]
        if body is not None:
            lines.append(("content-length", str(len(body))))
        try:
            data = self._http.send(h11.Request(method=method, target=self._access.prefix + target, headers=lines)) or b""
            data += (self._http.send(h11.Data(body)) or b"") if body else b""
            data += self._http.send(h11.EndOfMessage()) or b""
            await self._stream.send_all(data)
            while True:
                event = await self._next_event()
                if isinstance(event, h11.Response):
                    return Head(event.status_code, {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers})
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, h11.ProtocolError) as error:
            raise _broken(self._access, error) from error

    async def chunk(self) -> bytes:
        """The next bytes of the body, ``b""`` at its end; raises Broken."""
        try:
            while True:
                event = await self._next_event()
                if isinstance(event, h11.Data):
                    return bytes(event.data)
                if isinstance(event, h11.EndOfMessage):
                    return b""
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, h11.ProtocolError) as error:
            raise _broken(self._access, error) from error

    async def _next_event(self) -> h11.Event:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(bytes(await self._stream.receive_some(_READ_BYTES)))
            elif isinstance(event, h11.Event):
                return event
            else:
                raise h11.RemoteProtocolError("the server closed the connection")

    def recycle(self) -> bool:
        """Make ready for the next request; False when this connection cannot carry one."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        self.idle_since = trio.current_time()
        return True

    def abandon(self) -> None:
        """Close from where nothing can be awaited; only for a connection that nobody waits on."""
        inner = self._stream.transport_stream if isinstance(self._stream, trio.SSLStream) else self._stream
        if isinstance(inner, trio.SocketStream):
            inner.socket.close()

    async def close(self) -> None:
        """At once and without ceremony; also while cancelled."""
        await trio.aclose_forcefully(self._stream)


def _tune(stream: trio.SocketStream) -> None:
    stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_KEEPALIVE, 1)
    stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPINTVL, _KEEPALIVE_S)
    stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


def _broken(access: Access, error: Exception) -> Broken:
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) and error.__cause__ is not None else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Broken(f"the API server at {access.authority} is not trusted: {cause.verify_message}", untrusted=True)
    text = f"no connection within {CONNECT_S:g} s" if isinstance(cause, trio.TooSlowError) else str(cause) or type(cause).__name__
    return Broken(f"the API server at {access.authority}: {text}")
