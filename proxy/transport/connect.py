"""Dial an endpoint: TCP within a time, TLS when it has an identity, which it must prove. Every way to fail has its own cause."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from functools import lru_cache, partial

import trio

from core.addrs import Addr, ClientAddr
from core.names import InvalidName, WorkloadId, parse_workload_id
from core.runtime.sockets import Connecting, RawStream
from core.runtime.tls import HandshakeFailed
from policy.wire import Endpoint
from proxy.protocol.detect import FIRST_BYTES
from proxy.rescue import Cause, Failure
from proxy.transport.caller import CallerTeller
from proxy.transport.secure import Security
from proxy.transport.tls_bio import RECEIVE_BUFFER, Records, TlsBroken

_HANDSHAKE_CAUSES = {"identity-mismatch": Cause.PEER_IDENTITY, "foreign-trust-domain": Cause.PEER_IDENTITY}


class Dialled:
    """A connection that we made, ready for the relay. records: None for plaintext. early: plaintext that was read while waiting for it."""

    __slots__ = ("early", "records", "sock")

    def __init__(self, sock: socket.socket, records: Records | None) -> None:
        self.sock = sock
        self.records = records
        self.early = b""

    async def wait_first_bytes(self) -> bytes | None:
        """Return the first bytes of the server, b"" when it closed in order, None when the connection was cut before any came.

        Under TLS a readable socket may hold records without application data.
        """
        while not self.early:
            await trio.lowlevel.wait_readable(self.sock)
            try:
                if self.records is None:
                    return self.sock.recv(FIRST_BYTES, socket.MSG_PEEK)
                n = self.sock.recv_into(RECEIVE_BUFFER)
                if not n:
                    return None  # without close_notify
                self.early = self.records.decrypt(n)
            except BlockingIOError:
                continue
            except (OSError, TlsBroken):
                return None
            if self.records.ended:
                break
        return self.early

    def close(self) -> None:
        """Nobody wants it after all."""
        self.sock.close()


class Dialer:
    """Opens connections for both paths. own_ips: addresses of this pod; calls to them reach the app without passing a sidecar."""

    def __init__(self, security: Security, connect_s: float, own_ips: tuple[str, ...]) -> None:
        self._security = security
        self._connect_s = connect_s
        self._own_ips = frozenset(own_ips)
        self._callers = CallerTeller()

    async def plain(self, addr: Addr) -> Dialled:
        """Connect without TLS; raises Failure."""
        stream = await self._connect(addr)
        return Dialled(stream.release(), None)

    def begin_app(self, addr: Addr, caller: ClientAddr) -> Connecting:
        """Begin to connect to the pod's own app, which sees ``caller`` where the kernel can show it; raises Failure.

        An app on this machine has mostly accepted by the time this returns (`Connecting.done`), and nobody has to wait.
        """
        return self._begin(addr, partial(self._callers.tell, caller=caller) if self._callers.heard else None)

    async def finish(self, addr: Addr, connecting: Connecting) -> Dialled:
        """A connection without TLS once it is made; raises Failure."""
        return Dialled((await self._made(addr, connecting)).release(), None)

    async def endpoint(self, endpoint: Endpoint, addr: Addr, inside: bytes) -> Dialled:
        """Connect as discovery says: mutual TLS when the endpoint has an identity, plaintext when not; raises Failure.

        inside: the ALPN name of what will be spoken. A call of the pod to itself stays inside it and is plain, because traffic over
        loopback is not redirected to any sidecar (as in Linkerd).
        """
        if endpoint.identity is None or addr.ip in self._own_ips:
            return await self.plain(addr)
        try:
            expect = _workload_id(endpoint.identity)
        except InvalidName as error:
            raise Failure(Cause.PEER_IDENTITY, f"{addr}: {error}") from None
        self._security.current()
        try:
            return await self._secure(addr, expect, inside)
        except HandshakeFailed as error:
            if error.reason != "protocol":
                raise _handshake_failure(addr, error) from None
        # The other side answered in plaintext: our ClientHello was late, and its app spoke first. The app has received nothing: try again.
        try:
            return await self._secure(addr, expect, inside)
        except HandshakeFailed as error:
            raise _handshake_failure(addr, error) from None

    async def _secure(self, addr: Addr, expect: WorkloadId, inside: bytes) -> Dialled:
        stream = await self._connect(addr)
        try:
            secured = await self._security.dial(stream, expect, inside)
        except BaseException:
            stream.close()
            raise
        return Dialled(stream.release(), secured.records)

    async def _connect(self, addr: Addr) -> RawStream:
        return await self._made(addr, self._begin(addr))

    def _begin(self, addr: Addr, prepare: Callable[[socket.socket], None] | None = None) -> Connecting:
        try:
            return Connecting(addr, prepare)
        except OSError as error:
            raise _connect_failure(addr, error) from None

    async def _made(self, addr: Addr, connecting: Connecting) -> RawStream:
        try:
            if not connecting.done:
                with trio.fail_after(self._connect_s):
                    await connecting.wait()
            return connecting.stream()
        except trio.TooSlowError:
            raise Failure(Cause.CONNECT_TIMEOUT, f"{addr} did not answer within {self._connect_s:g} s") from None
        except OSError as error:
            raise _connect_failure(addr, error) from None


def _connect_failure(addr: Addr, error: OSError) -> Failure:
    refused = error.errno == errno.ECONNREFUSED
    return Failure(Cause.CONNECT_REFUSED if refused else Cause.CONNECT_FAILED, f"{addr}: {error.strerror or error}")


_workload_id = lru_cache(maxsize=1024)(parse_workload_id)  # the same few endpoints are dialled again and again


def _handshake_failure(addr: Addr, error: HandshakeFailed) -> Failure:
    return Failure(_HANDSHAKE_CAUSES.get(error.reason, Cause.TLS_FAILED), f"{addr}: {error}")
