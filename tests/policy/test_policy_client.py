from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import policy_lab as lab
import pytest
import trio
import trio.testing
from certs import Authority
from policy_lab import CART, indexed, parsed

from core.addrs import InvalidAddr
from core.credentials import Credentials
from core.names import WorkloadId
from core.runtime.backoff import Backoff
from core.runtime.watch import Cell
from policy import wire
from policy.client import ControllerAway, PolicyClient
from policy.limits import Limits
from policy.lines import LineBuffer, LineTooLong
from policy.server import PolicyServer

CONTROLLER = WorkloadId("cluster.local", "pillion", "pillion-policy")
HELLO = wire.Hello("shop", "cart-0", "1")
ADDR = "10.96.0.1:80"
NO_KEY = Credentials(CART, b"", b"", b"", 0, 0)


class Controllers:
    """What the client dials: each connection's far end is handed to the test; ``away`` makes dialling fail."""

    def __init__(self) -> None:
        self.away = False
        self.dialled: list[float] = []
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](100)

    async def dial(self, _: Credentials) -> trio.abc.Stream:
        self.dialled.append(trio.current_time())
        if self.away:
            raise ControllerAway("nobody is there")
        near, far = trio.testing.memory_stream_pair()
        self._send.send_nowait(far)
        return near

    async def accept(self) -> Far:
        return Far(await self._receive.receive())


class Far:
    """The controller's end, by hand."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._lines = LineBuffer(65536)
        self._heard: list[wire.ToController] = []

    async def hear(self) -> wire.ToController:
        while not self._heard:
            data = bytes(await self.stream.receive_some(65536))
            assert data, "the client closed"
            self._heard = [wire.decode_to_controller_untrusted(line) for line in self._lines.feed_untrusted(data)]
        return self._heard.pop(0)

    async def say(self, message: wire.ToSidecar | bytes) -> None:
        await self.stream.send_all(message if isinstance(message, bytes) else wire.encode(message))


@asynccontextmanager
async def running(controllers: Controllers, cell: Cell[Credentials | None] | None = None) -> AsyncIterator[PolicyClient]:
    backoff = Backoff(0.1, 10.0, draw=lambda: 0.0)
    client = PolicyClient(("policy", 8090), CONTROLLER, cell or Cell(NO_KEY), HELLO, dial=controllers.dial, backoff=backoff)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        yield client
        nursery.cancel_scope.cancel()


def policy(name: str) -> wire.InboundPolicy:
    return wire.InboundPolicy(lab.parsed(lab.server(name)).ref, "detect", ())


async def test_subscriptions_made_before_connecting_follow_the_hello() -> None:
    controllers = Controllers()
    client = PolicyClient(("policy", 8090), CONTROLLER, Cell(NO_KEY), HELLO, dial=controllers.dial)
    port, destination = client.watch_port(8080), client.watch_destination(ADDR)
    assert (client.watch_port(8080) is port, client.watch_destination(ADDR) is destination) == (True, True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        far = await controllers.accept()
        assert [await far.hear() for _ in range(3)] == [HELLO, wire.WatchPort(8080), wire.WatchDestination(ADDR)]
        await far.say(wire.PortPolicy(8080, policy("a")))
        assert await port.wait_for(bool) == policy("a")
        await far.say(wire.PortPolicy(8080, policy("b")))
        await port.wait_for(lambda value: value == policy("b"))
        assert destination.value is None
        nursery.cancel_scope.cancel()


async def test_later_wishes_are_said_and_a_forgotten_cell_changes_no_more() -> None:
    controllers = Controllers()
    async with running(controllers) as client:
        far = await controllers.accept()
        assert await far.hear() == HELLO
        old = client.watch_destination(ADDR)
        assert await far.hear() == wire.WatchDestination(ADDR)
        client.forget_destination(ADDR)
        assert await far.hear() == wire.ForgetDestination(ADDR)
        new = client.watch_destination(ADDR)
        assert await far.hear() == wire.WatchDestination(ADDR)
        await far.say(wire.AddressDestination(ADDR, wire.Destination("external", None, "detect")))
        assert (await new.wait_for(bool), old.value) == (wire.Destination("external", None, "detect"), None)


async def test_a_forgotten_port_can_be_watched_again() -> None:
    controllers = Controllers()
    async with running(controllers) as client:
        far = await controllers.accept()
        assert await far.hear() == HELLO
        old = client.watch_port(80)
        assert await far.hear() == wire.WatchPort(80)
        client.forget_port(80)
        assert await far.hear() == wire.ForgetPort(80)
        new = client.watch_port(80)
        assert await far.hear() == wire.WatchPort(80)
        await far.say(wire.PortPolicy(80, policy("a")))
        assert (await new.wait_for(bool), old.value) == (policy("a"), None)


async def test_wishes_that_cannot_be_sent_yet_are_bounded_by_their_subjects() -> None:
    controllers = Controllers()
    async with running(controllers) as client:
        await controllers.accept()
        for _ in range(1000):
            client.watch_destination(ADDR)
            client.forget_destination(ADDR)
        assert len(client._outgoing) == 1


async def test_what_was_known_keeps_serving_and_subscriptions_are_repeated(autojump_clock: trio.testing.MockClock) -> None:
    controllers = Controllers()
    async with running(controllers) as client:
        port = client.watch_port(8080)
        far = await controllers.accept()
        await far.say(wire.PortPolicy(8080, policy("a")))
        await port.wait_for(bool)
        version = client.connected.version
        await far.stream.aclose()
        await client.connected.wait_newer(version)
        assert (client.connected.value, port.value) == (False, policy("a"))
        far = await controllers.accept()
        assert [await far.hear(), await far.hear()] == [HELLO, wire.WatchPort(8080)]
        assert (client.connected.value, port.value) == (True, policy("a"))


async def test_pauses_between_attempts_double_to_a_cap_and_begin_anew_after_success(autojump_clock: trio.testing.MockClock) -> None:
    controllers = Controllers()
    controllers.away = True
    async with running(controllers) as client:
        port = client.watch_port(8080)
        await trio.sleep(60)
        pauses = [round(after - before, 2) for before, after in zip(controllers.dialled, controllers.dialled[1:], strict=False)]
        assert pauses[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
        controllers.away = False
        far = await controllers.accept()
        await far.say(wire.PortPolicy(8080, policy("a")))
        await port.wait_for(bool)
        lost = trio.current_time()
        await far.stream.aclose()
        await controllers.accept()
        assert trio.current_time() - lost == pytest.approx(0.1)


@pytest.mark.parametrize("said", [wire.encode(wire.Refused("not you")), b"hello\n", b"x" * 2000])
async def test_a_refusal_and_a_broken_controller_mean_trying_again_later(
    said: bytes, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 1000)
    controllers = Controllers()
    async with running(controllers) as client:
        far = await controllers.accept()
        await far.say(said)
        await client.connected.wait_for(lambda value: not value)
        await controllers.accept()


async def test_a_message_that_its_reader_cannot_use_ends_nothing() -> None:
    controllers = Controllers()
    async with running(controllers) as client:
        destination, port = client.watch_destination(ADDR), client.watch_port(80)
        destination.subscribe(lambda value: value and value.routes[0])  # there is none
        far = await controllers.accept()
        await far.say(wire.AddressDestination(ADDR, wire.Destination("external", None, "detect")))
        await far.say(wire.PortPolicy(80, policy("a")))
        assert await port.wait_for(bool) == policy("a")
        assert len(controllers.dialled) == 1


async def test_nothing_is_dialled_before_there_are_credentials() -> None:
    controllers, cell = Controllers(), Cell[Credentials | None](None)
    async with running(controllers, cell):
        await trio.testing.wait_all_tasks_blocked()
        assert controllers.dialled == []
        cell.set(NO_KEY)
        await controllers.accept()


def test_only_an_address_can_be_watched() -> None:
    client = PolicyClient(("policy", 8090), CONTROLLER, Cell(None), HELLO)
    with pytest.raises(InvalidAddr):
        client.watch_destination("cart:80")


def test_lines_are_found_however_the_bytes_arrive() -> None:
    text = b"one\n\ntwo\nthree"
    whole = LineBuffer(10).feed_untrusted(text)
    buffer = LineBuffer(10)
    assert [line for byte in text for line in buffer.feed_untrusted(bytes([byte]))] == whole == [b"one", b"", b"two"]
    buffer.feed_untrusted(b"x" * 5)
    with pytest.raises(LineTooLong):
        buffer.feed_untrusted(b"x")


# --- over real mutual TLS ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def controller_on_loopback(authority: Authority, server: PolicyServer) -> AsyncIterator[tuple[str, int]]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listeners, Cell[Credentials | None](authority.credentials(CONTROLLER)))
        yield "127.0.0.1", listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def sidecar(addr: tuple[str, int], credentials: Credentials, expect: WorkloadId = CONTROLLER) -> AsyncIterator[PolicyClient]:
    client = PolicyClient(addr, expect, Cell[Credentials | None](credentials), HELLO)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        yield client
        nursery.cancel_scope.cancel()


async def _wait_refused(server: PolicyServer, word: str) -> None:
    with trio.fail_after(30):
        while word not in server.counters.refused:  # noqa: ASYNC110  (a counter wakes nobody)
            await trio.sleep(0.01)


async def test_a_sidecar_is_served_as_itself_over_mutual_tls() -> None:
    index = indexed(lab.pod(ip="127.0.0.1"))
    server, authority = PolicyServer(index), Authority()
    async with controller_on_loopback(authority, server) as addr, sidecar(addr, authority.credentials(CART)) as client:
        port = client.watch_port(8080)
        with trio.fail_after(30):
            assert await port.wait_for(bool) == index.inbound_policy("shop", "cart-0", 8080)
            server.changed(index.apply(parsed(lab.server())))
            await port.wait_for(lambda value: value is not None and value.server.kind == "Server")


async def test_a_bug_that_one_peer_finds_ends_its_connection_and_not_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    server, authority = PolicyServer(indexed(lab.pod(ip="127.0.0.1"))), Authority()
    serve_peer = server.serve_peer

    async def broken_once(*peer: Any) -> None:
        monkeypatch.setattr(server, "serve_peer", serve_peer)
        raise KeyError("a bug")

    monkeypatch.setattr(server, "serve_peer", broken_once)
    async with controller_on_loopback(authority, server) as addr, sidecar(addr, authority.credentials(CART)) as client:
        with trio.fail_after(30):
            await client.watch_port(8080).wait_for(bool)
    assert server.counters.refused == {"internal": 1}


async def test_handshakes_that_somebody_holds_keep_nobody_out() -> None:
    server, authority = PolicyServer(indexed(lab.pod(ip="127.0.0.1")), Limits(handshakes=6)), Authority()
    async with controller_on_loopback(authority, server) as addr:
        silent = [await trio.open_tcp_stream(*addr) for _ in range(6)]
        with trio.fail_after(30):
            while len(server._handshakes) < 6:  # noqa: ASYNC110  (a number wakes nobody)
                await trio.sleep(0.01)
            async with sidecar(addr, authority.credentials(CART)) as client:
                await client.watch_port(8080).wait_for(bool)
        assert (await silent[0].receive_some(1), server.counters.refused) == (b"", {"overloaded": 1})
        for stream in silent:
            await stream.aclose()


@pytest.mark.parametrize(
    ("identity", "ip", "word"),
    [
        ("spiffe://cluster.local/ns/shop/sa/web", "127.0.0.1", "identity"),
        ("spiffe://other.example/ns/shop/sa/cart", "127.0.0.1", "foreign-trust-domain"),
        ("spiffe://cluster.local/ns/shop/sa/cart", "10.0.0.5", "address"),
    ],
)
async def test_a_peer_with_another_identity_or_address_is_refused_over_mutual_tls(identity: str, ip: str, word: str) -> None:
    server, authority = PolicyServer(indexed(lab.pod(ip=ip))), Authority()
    async with controller_on_loopback(authority, server) as addr, sidecar(addr, authority.credentials(identity)) as client:
        port = client.watch_port(8080)
        await _wait_refused(server, word)
        assert port.value is None


async def test_a_peer_of_a_foreign_anchor_is_refused() -> None:
    server, authority, foreign = PolicyServer(indexed(lab.pod(ip="127.0.0.1"))), Authority(), Authority("foreign")
    stranger = foreign.credentials(CART, bundle_pem=authority.bundle_pem)
    async with controller_on_loopback(authority, server) as addr, sidecar(addr, stranger):
        await _wait_refused(server, "unknown-issuer")


async def test_a_controller_that_is_somebody_else_is_not_believed() -> None:
    server, authority = PolicyServer(indexed(lab.pod(ip="127.0.0.1"))), Authority()
    expect = WorkloadId("cluster.local", "pillion", "pillion-identity")
    client = PolicyClient(("", 0), expect, Cell[Credentials | None](None), HELLO)
    async with controller_on_loopback(authority, server) as addr:
        client._addr = addr
        with pytest.raises(ControllerAway, match="identity-mismatch"):
            await client._dial_tls(authority.credentials(CART))
