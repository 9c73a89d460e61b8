"""How connections arrive: whole at once, in pieces, late, or never; each is served as if it had come in one piece, or counted and reset."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from core import alpn
from core.runtime.sockets import RawStream
from core.runtime.tls import Handshake, client_context
from tests.certs import Authority
from tests.scenarios.mesh import ANYONE, CART, WEB, Mesh, inbound_policy, mesh
from tests.scenarios.peers import Exchange, H11App

_OURS = Authority()
_REQUEST = b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n"


async def _answer(exchange: Exchange) -> None:
    await exchange.answer(exchange.headers.get(b"pillion-client-id", b"nobody"))


class Client:
    """A sidecar's end of a handshake with the server's sidecar, byte by byte in a test's hands."""

    def __init__(self, made: Mesh) -> None:
        credentials = _OURS.credentials(CART)
        self.stream = RawStream(made.dial_server())
        self.handshake = Handshake.client(client_context(credentials, _OURS.bundle_pem, [alpn.HTTP1]), WEB.server_name, WEB)

    async def shake(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        """The whole handshake, by ``send``."""
        data = b""
        while True:
            await send(self.handshake.step(data))
            if self.handshake.done:
                return
            data = await self.stream.receive_some()

    async def ask(self) -> bytes:
        """The answer to a request, without its end."""
        connection = self.handshake.connection
        connection.sendall(_REQUEST)
        await self.stream.send_all(connection.bio_read(65536))
        connection.bio_write(await self.stream.receive_some())
        return connection.recv(65536)

    async def rest(self) -> None:
        """Until the sidecar ends the connection, in whatever way."""
        with contextlib.suppress(trio.BrokenResourceError):
            while await self.stream.receive_some():
                pass


@pytest.mark.parametrize("size", [10_000, 700, 100])
async def test_a_handshake_may_come_in_pieces_of_any_size(size: int):
    async with mesh(H11App(_answer), authority=_OURS) as made:
        client = Client(made)

        async def send(flight: bytes) -> None:
            for at in range(0, len(flight), size):
                await client.stream.send_all(flight[at : at + size])
                await trio.testing.wait_all_tasks_blocked(0.001)

        await client.shake(send)
        assert CART.uri.encode() in await client.ask()
        client.stream.close()
        assert len(made.server.intake.arrivals) == made.server.live.arriving == 0


async def test_a_handshake_that_stops_in_the_middle_is_given_up(autojump_clock: trio.testing.MockClock):
    async with mesh(H11App(_answer), authority=_OURS) as made:
        client = Client(made)
        await client.stream.send_all(client.handshake.step(b""))
        assert await client.stream.receive_some()  # the server's flight; ours never follows
        began = trio.current_time()
        await client.rest()
        assert trio.current_time() - began <= made.server.config.handshake_timeout_s + 2
        assert made.metric(made.server, "pillion_errors_total", direction="inbound", error="tls-timeout") == 1
        assert len(made.server.intake.arrivals) == made.server.live.arriving == made.server.relay.open_links == 0
        client.stream.close()


@pytest.mark.parametrize(("end", "reason"), [(RawStream.close, "tls-closed"), (RawStream.abort, "tls-reset")])
async def test_a_handshake_that_the_client_leaves_is_counted_with_how_it_left(end: Callable[[RawStream], None], reason: str):
    async with mesh(H11App(_answer), authority=_OURS) as made:
        client = Client(made)
        await client.stream.send_all(client.handshake.step(b""))
        assert await client.stream.receive_some()
        end(client.stream)
        await made.server.live.wait_none()
        assert made.metric(made.server, "pillion_errors_total", direction="inbound", error=reason) == 1
        assert len(made.server.intake.arrivals) == made.server.relay.open_links == 0


async def test_a_client_that_leaves_before_it_said_anything_leaves_nothing_behind():
    async with mesh(H11App(_answer), authority=_OURS) as made:
        client = Client(made)
        client.stream.abort()
        await made.server.live.wait_none()
        assert len(made.server.intake.arrivals) == made.server.relay.open_links == 0


async def test_the_policy_is_waited_for_and_then_the_first_words_are_heard():
    async with mesh(H11App(_answer), authority=_OURS, policy=None) as made:
        client = Client(made)
        assert len(made.server.intake.arrivals) == 0  # a task waits for the policy instead
        made.policy(inbound_policy(ANYONE))
        await client.shake(client.stream.send_all)
        assert CART.uri.encode() in await client.ask()
        client.stream.close()


async def test_plaintext_is_served_by_the_same_rules_without_a_task():
    async with mesh(H11App(_answer), authority=_OURS, policy=inbound_policy(ANYONE)) as made:
        stream = await made.dial_unmeshed()
        await stream.send_all(_REQUEST)
        answer = b""
        while data := await stream.receive_some():
            answer += data
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"nobody")
        await stream.aclose()
