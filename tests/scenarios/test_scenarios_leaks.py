"""After everything that can happen to a connection, nothing of it is left: no socket, no link, no count of open connections."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
from OpenSSL import SSL

from core import alpn
from core.addrs import Addr, OriginalDst
from core.runtime.sockets import RawStream
from core.runtime.tls import HandshakeFailed, TlsStream, client_context
from policy.wire import Endpoint
from proxy.inbound.gate import InboundGate
from proxy.outbound.gate import Http1Gate
from proxy.protocol.http1 import Http1Client
from proxy.transport import relay
from proxy.transport.join import begin
from proxy.transport.link import NO_RECEIVER
from proxy.transport.relay import Relay
from tests.certs import Authority
from tests.scenarios.mesh import ANYONE, FOR_CART, WEB, Mesh, inbound_policy, mesh, only, tcp_pair
from tests.scenarios.peers import PATIENCE_S, Exchange, H11App, Http1

_OURS = Authority()
_RESET = struct.pack("ii", 1, 0)


async def _reply(exchange: Exchange) -> None:
    await exchange.answer(await exchange.body())


async def _say(stream: trio.SocketStream, *words: bytes, pause_s: float = 0.0) -> None:
    """Say this, hear whatever comes for a moment, leave."""
    async with stream:
        with suppress(trio.BrokenResourceError), trio.move_on_after(0.5):
            for word in words:
                await trio.sleep(pause_s)
                await stream.send_all(word)
            while await stream.receive_some(65536):
                pass


async def _served(made: Mesh) -> None:
    client = Http1(await made.dial())
    assert (await client.ask())[0] == 200
    await client.stream.aclose()


async def _denied_request(made: Mesh) -> None:
    made.policy(inbound_policy(only(WEB)))
    client = Http1(await made.dial())
    assert (await client.ask())[0] == 403
    await client.stream.aclose()


async def _denied_bytes(made: Mesh) -> None:
    made.policy(inbound_policy(only(WEB)))
    await _say(await made.dial(), b"\x00")


async def _denied_plaintext(made: Mesh) -> None:
    await _say(await made.dial_unmeshed(), b"\x00")


async def _nowhere_to_go(made: Mesh) -> None:
    made.nowhere()
    await _say(await made.dial(), b"\x00")


async def _refused_app(made: Mesh) -> None:
    made.destination(Endpoint("127.0.0.1:1", WEB.uri))
    await _say(await made.dial(), b"\x00")
    await _say(await made.dial(), b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")


async def _unknown_destination(made: Mesh) -> None:
    await _say(await made.dial(OriginalDst(Addr("10.96.0.99", 1))), b"\x00")
    await trio.sleep(3)


async def _silence_then_http(made: Mesh) -> None:
    await _say(await made.dial(), b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n", pause_s=0.3)


async def _silence_then_nothing(made: Mesh) -> None:
    await _say(await made.dial())


async def _unmeshed_silence_then_a_bad_handshake(made: Mesh) -> None:
    made.policy(inbound_policy(ANYONE))
    near = made.dial_server()
    await trio.sleep(0.3)  # the app was connected meanwhile, in case it speaks first
    context = client_context(None, _OURS.bundle_pem, [alpn.HTTP1])
    tls = TlsStream.client(RawStream(near), context, WEB.server_name, WEB)
    with suppress(HandshakeFailed, trio.BrokenResourceError, SSL.Error):
        await tls.do_handshake()
        await tls.receive_some()
    await tls.transport.aclose()


async def _gone_at_once(made: Mesh) -> None:
    for dial in (made.dial, made.dial_unmeshed):
        stream = await dial()
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        stream.socket.close()


async def _gone_in_the_middle(made: Mesh) -> None:
    for words in (b"\x00", b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 9\r\n\r\nhalf"):
        stream = await made.dial()
        await stream.send_all(words)
        await trio.sleep(0.01)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        stream.socket.close()


async def _preface_and_gone(made: Mesh) -> None:
    """HTTP/2's first write is ours, at once: it fails."""
    made.policy(inbound_policy(ANYONE))
    for dial in (made.dial, made.dial_unmeshed):
        for _ in range(5):
            stream = await dial()
            await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            stream.socket.close()


async def _no_certificate(made: Mesh) -> None:
    made.server.credentials.set(None)
    await _say(await made.dial(), b"\x00")


_FATES = [value for name, value in list(globals().items()) if name.startswith("_") and getattr(value, "__annotations__", {}).get("made")]


@pytest.mark.parametrize("fate", _FATES, ids=lambda fate: fate.__name__.strip("_").replace("_", " "))
async def test_nothing_is_left_of_a_connection(fate: Callable[[Mesh], Awaitable[None]], autojump_clock: trio.testing.MockClock):
    async with mesh(H11App(_reply), authority=_OURS) as made:
        await _served(made)  # whatever is opened once is open now
        await trio.sleep(100)
        before = _open_files()
        made.policy(FOR_CART)
        await fate(made)
        await trio.sleep(100)  # beyond lingering and idle pools
        assert (made.client.relay.open_links, made.server.relay.open_links) == (0, 0)
        assert (len(made.client.live), len(made.server.live)) == (0, 0)
        for side in (made.client, made.server):
            assert made.metric(side, "pillion_tcp_open_connections") == 0
            assert made.metric(side, "pillion_tcp_close_total") == made.metric(side, "pillion_tcp_open_total")
            assert all(state.users == 0 for state in side.discovery.destinations.values())
            assert all(load.active == 0 for state in side.discovery.destinations.values() for load in state.balancer._loads)
        assert _open_files() - before <= 0


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(relay.__file__.endswith(".so"), reason="compiled gates take no engine but the real ones")
@pytest.mark.parametrize("path", [Http1Gate, InboundGate], ids=["outbound", "inbound"])
async def test_an_engine_that_raises_on_the_first_bytes_loses_its_connection_only(path: type, monkeypatch: pytest.MonkeyPatch):
    class Broken(Http1Client):
        def received(self, data: bytes) -> None:
            if b"/bug" in data and isinstance(self._gate, path):
                raise RuntimeError("an assumption that does not hold")
            super().received(data)

    monkeypatch.setattr("proxy.engines.Http1Client", Broken)
    async with mesh(H11App(_reply), authority=_OURS) as made:
        good = Http1(await made.dial())
        assert (await good.ask())[0] == 200
        await _say(await made.dial(), b"GET /bug HTTP/1.1\r\nhost: web\r\n\r\n")
        assert len(made.log("a bug of ours")) == 1
        made.forgive()
        assert (await good.ask())[0] == 200
        await good.stream.aclose()
        with trio.fail_after(PATIENCE_S):
            await made.client.live.wait_none()
        assert made.metric(made.client, "pillion_tcp_open_connections") == 0


async def test_a_connection_that_comes_when_the_relay_has_ended_is_reset():
    async with mesh(H11App(_reply), authority=_OURS) as made:
        relay = Relay(lambda error: None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.run)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        near, far = tcp_pair()
        near.setblocking(False)
        far.setblocking(False)
        begin(relay, relay.adopt(far, NO_RECEIVER), NO_RECEIVER, b"words")
        assert relay.open_links == 0
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        assert made.log("a bug of ours") == []  # and the mesh around it goes on
