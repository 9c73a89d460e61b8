"""An HTTP/2 client and app made with the h2 package, for what programs cannot be told to do: resets, windows, GOAWAY, extended CONNECT."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio

from tests.scenarios.peers import PATIENCE_S

Headers = list[tuple[str, str]]


class H2:
    """One end of a connection. `pump` reads until it ends and calls ``on_event``; events of a stream are kept in ``seen``."""

    def __init__(self, stream: trio.SocketStream, *, client: bool, credit: bool = True) -> None:
        self.stream = stream
        config = h2.config.H2Configuration(client_side=client, header_encoding="utf-8", validate_inbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.credit = credit  # give received bytes back at once
        self.seen: dict[int, list[h2.events.Event]] = {}
        self.events: list[h2.events.Event] = []
        self._news = trio.Event()
        self.over = False
        self._sending = trio.Lock()

    async def flush(self) -> None:
        async with self._sending:
            if data := self.h2.data_to_send():
                await self.stream.send_all(data)

    async def start(self, **settings: int) -> None:
        for name, value in settings.items():  # before they are sent: a second SETTINGS frame would be too late for some
            self.h2.local_settings[getattr(h2.settings.SettingCodes, name.upper())] = value
            self.h2.local_settings.acknowledge()
        self.h2.initiate_connection()
        await self.flush()

    async def pump(self, on_event: Callable[[h2.events.Event], Awaitable[None]] | None = None) -> None:
        try:
            while data := await self.stream.receive_some(65536):
                try:
                    events = self.h2.receive_data(data)
                except h2.exceptions.ProtocolError:
                    break
                for event in events:
                    self.events.append(event)
                    if (number := getattr(event, "stream_id", None)) is not None:
                        self.seen.setdefault(number, []).append(event)
                    if isinstance(event, h2.events.DataReceived) and self.credit and event.flow_controlled_length:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    if on_event is not None:
                        await on_event(event)
                await self.flush()
                self._tell()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.over = True
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds; a connection that ends before fails the test."""
        with trio.fail_after(PATIENCE_S):
            while not condition():
                assert not self.over, f"the connection ended after {self.events}"
                await self._news.wait()

    async def request(self, path: str = "/", method: str = "GET", body: bytes | None = None, more: Headers | None = None) -> int:
        """Send a request; body None: no body, END_STREAM with the head."""
        number = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":scheme", "http"), (":authority", "web.shop"), (":path", path), *(more or [])]
        self.h2.send_headers(number, head, end_stream=body is None)
        if body:
            self.h2.send_data(number, body)
        await self.flush()
        return number

    def got(self, number: int, kind: type) -> list:
        return [event for event in self.seen.get(number, ()) if isinstance(event, kind)]

    def data(self, number: int) -> bytes:
        return b"".join(event.data for event in self.got(number, h2.events.DataReceived))

    async def answer(self, number: int) -> tuple[str, bytes]:
        """Status and body of a complete response."""
        await self.wait(lambda: bool(self.got(number, (h2.events.StreamEnded, h2.events.StreamReset))))
        assert not self.got(number, h2.events.StreamReset)
        return dict(self.got(number, h2.events.ResponseReceived)[0].headers)[":status"], self.data(number)


class H2App:
    """An HTTP/2 server. on_event: what it does about each event; connections: the ends, in order."""

    def __init__(self, on_event: Callable[[H2, h2.events.Event], Awaitable[None]], **settings: int) -> None:
        self._on_event = on_event
        self._settings = settings
        self.connections: list[H2] = []

    async def __call__(self, stream: trio.SocketStream) -> None:
        end = H2(stream, client=False)
        self.connections.append(end)
        async with stream:
            await end.start(**self._settings)
            await end.pump(lambda event: self._on_event(end, event))
