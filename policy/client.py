"""Keeps a sidecar informed by the policy controller: one connection, any number of watched ports and destinations, latest values in cells.

Moves what the controller says into cells; decides nothing about it. While there is no connection everything known keeps serving.
Runs in the sidecar's process, called by proxy.discover. After a reconnect all subscriptions are repeated; every answer is whole, so it
just replaces what was known.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from core.addrs import parse_addr
from core.alpn import POLICY
from core.credentials import Credentials
from core.names import WorkloadId
from core.runtime import logs, sockets
from core.runtime.backoff import Backoff
from core.runtime.tls import HandshakeFailed, TlsStream, client_context
from core.runtime.watch import Cell
from policy import wire
from policy.lines import LineBuffer, LineTooLong

_log = logs.logger("policy-client")

_CONNECT_S = 5.0
_HANDSHAKE_S = 10.0
_SEND_S = 30.0
_READ_BYTES = 65536

Subject = int | str
"""A port of ours, or a dialled ``ip:port``."""


class ControllerAway(Exception):
    """The controller could not be reached, proved to be somebody else, refused us or ended the connection; the text says which."""


Dial = Callable[[Credentials], Awaitable[trio.abc.Stream]]
"""Open an authenticated stream to the controller; raises ControllerAway."""


class PolicyClient:
    """addr: host (IP or DNS name) and port of the controller. expect: the identity it must prove. hello: who we are.

    `run` runs for ever; the rest may be called at any time from the same thread. dial: another way to connect, for tests.
    """

    def __init__(
        self,
        addr: tuple[str, int],
        expect: WorkloadId,
        credentials: Cell[Credentials | None],
        hello: wire.Hello,
        *,
        dial: Dial | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self.connected = Cell(False)
        self._addr = addr
        self._expect = expect
        self._credentials = credentials
        self._hello = hello
        self._dial = dial or self._dial_tls
        self._backoff = backoff or Backoff(0.1, 10.0)
        self._ports: dict[int, Cell[wire.InboundPolicy | None]] = {}
        self._destinations: dict[str, Cell[wire.Destination | None]] = {}
        self._outgoing: dict[Subject, wire.ToController] = {}
        self._wake = trio.Event()

    def watch_port(self, port: int) -> Cell[wire.InboundPolicy | None]:
        """The policy of a port of ours, until `forget_port`; None until it is known."""
        cell = self._ports.get(port)
        if cell is None:
            cell = self._ports[port] = Cell[wire.InboundPolicy | None](None)
            self._say(port, wire.WatchPort(port))
        return cell

    def forget_port(self, port: int) -> None:
        """Nobody uses the port any more: its cell keeps its value and changes no more."""
        if self._ports.pop(port, None) is not None:
            self._say(port, wire.ForgetPort(port))

    def watch_destination(self, addr: str) -> Cell[wire.Destination | None]:
        """What stands behind ``ip:port``, until `forget_destination`; None until it is known. Raises core.addrs.InvalidAddr."""
        cell = self._destinations.get(addr)
        if cell is None:
            parse_addr(addr)
            cell = self._destinations[addr] = Cell[wire.Destination | None](None)
            self._say(addr, wire.WatchDestination(addr))
        return cell

    def forget_destination(self, addr: str) -> None:
        """Nobody uses the address any more: its cell keeps its value and changes no more."""
        if self._destinations.pop(addr, None) is not None:
            self._say(addr, wire.ForgetDestination(addr))

    def _say(self, subject: Subject, message: wire.ToController) -> None:
        """Send a subscription or its end. Of several about one subject only the last is kept, which bounds the queue; without a connection
        none is, because all are repeated at the next one."""
        if self.connected.value:
            self._outgoing[subject] = message
            self._wake.set()

    async def run(self) -> None:
        """Stay connected for ever. Nothing that the controller or the network does ends this."""
        while True:
            credentials = await self._credentials.wait_for(lambda value: value is not None)
            assert credentials is not None, "wait_for returned a value that the predicate refused"
            try:
                await self._converse(await self._dial(credentials))
            except ControllerAway as error:
                pause_s = self._backoff.next_s()
                _log.warning("policy controller away", reason=str(error), retry_in_s=round(pause_s, 2))
                await trio.sleep(pause_s)

    async def _dial_tls(self, credentials: Credentials) -> trio.abc.Stream:
        host, port = self._addr
        context = client_context(credentials, credentials.bundle_pem, (POLICY,))
        transport: trio.SocketStream | None = None
        try:
            with trio.fail_after(_CONNECT_S):
                transport = await trio.open_tcp_stream(host, port)
            sockets.tune(transport.socket)  # type: ignore[arg-type]
            stream = TlsStream.client(transport, context, self._expect.server_name, self._expect)
            with trio.fail_after(_HANDSHAKE_S):
                await stream.do_handshake()
            if stream.alpn != POLICY:
                raise HandshakeFailed("protocol", "the peer does not speak the policy API")
        except BaseException as error:
            if transport is not None:
                await trio.aclose_forcefully(transport)
            if isinstance(error, trio.TooSlowError):
                raise ControllerAway(f"{host}:{port} did not answer in time") from None
            if isinstance(error, OSError | HandshakeFailed | trio.BrokenResourceError):
                raise ControllerAway(f"{host}:{port}: {error}") from None
            raise
        return stream

    async def _converse(self, stream: trio.abc.Stream) -> None:
        """Until the connection ends, which is always ControllerAway."""
        self._outgoing = {port: wire.WatchPort(port) for port in self._ports}
        self._outgoing.update((addr, wire.WatchDestination(addr)) for addr in self._destinations)
        reason = ""
        try:
            async with trio.open_nursery() as nursery:
                self.connected.set(True)
                nursery.start_soon(self._write, stream)
                await self._read(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError) as lost:
            reason = f"connection lost: {_first(lost)}"
        except* ControllerAway as away:
            reason = str(_first(away))
        finally:
            self.connected.set(False)
            self._outgoing = {}
            await trio.aclose_forcefully(stream)
        raise ControllerAway(reason)

    async def _write(self, stream: trio.abc.Stream) -> None:
        waiting = wire.encode(self._hello)
        while True:
            messages = [waiting, *(wire.encode(message) for message in self._outgoing.values())]
            self._outgoing = {}
            waiting = b""
            with trio.move_on_after(_SEND_S) as sending:
                await stream.send_all(b"".join(messages))
            if sending.cancelled_caught:
                raise ControllerAway("the controller does not read")
            while not self._outgoing:
                self._wake = trio.Event()
                await self._wake.wait()

    async def _read(self, stream: trio.abc.Stream) -> None:
        lines = LineBuffer(wire.MAX_LINE_BYTES)
        while True:
            data = await stream.receive_some(_READ_BYTES)
            if not data:
                raise ControllerAway("the controller ended the connection")
            try:
                for line in lines.feed_untrusted(bytes(data)):
                    self._take(wire.decode_to_sidecar_untrusted(line))
            except (LineTooLong, wire.WireError) as error:
                raise ControllerAway(f"the controller sent what is no message: {error}"[:300]) from None

    def _take(self, message: wire.ToSidecar) -> None:
        if isinstance(message, wire.Refused):
            raise ControllerAway(f"refused: {message.reason}")
        self._backoff.reset()
        try:
            if isinstance(message, wire.PortPolicy):
                port = self._ports.get(message.port)
                if port is not None:
                    port.set(message.policy)
            else:
                destination = self._destinations.get(message.addr)
                if destination is not None:
                    destination.set(message.destination)
        except Exception as error:  # of the right types, and yet whoever follows the cell cannot use it: the traffic of today goes on
            subject = message.port if isinstance(message, wire.PortPolicy) else message.addr
            _log.error("what the controller said cannot be used", subject=subject, exc_info=error)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
