"""What idle and closed connections give back, and when."""

from __future__ import annotations

import gc
import socket
import weakref

import pytest
import trio
import trio.testing
from OpenSSL import SSL

from core.names import parse_workload_id
from core.runtime.tls import Handshake, client_context, server_context
from proxy.transport.link import NO_RECEIVER
from proxy.transport.relay import Quiet, Relay
from proxy.transport.tls_bio import RECEIVE_BUFFER, PortableRecords, Records, records
from proxy.transport.tls_link import TlsLink
from tests.certs import Authority

WEB = parse_workload_id("spiffe://cluster.local/ns/shop/sa/web")


class Clear:
    """Records that are what they carry. slimmed: how often buffers were given back."""

    def __init__(self) -> None:
        self.ended = False
        self.slimmed = 0

    def decrypt(self, length: int) -> bytes:
        return bytes(RECEIVE_BUFFER[:length])

    def encrypt(self, data: bytes | memoryview) -> bytes | memoryview:
        return data

    def close_notify(self) -> bytes:
        return b""

    def output(self) -> bytes:
        return b""

    def slim(self) -> None:
        self.slimmed += 1


@pytest.fixture
def ends():
    near, far = socket.socketpair()
    near.setblocking(False)
    yield near, far
    near.close()
    far.close()


async def test_a_connection_that_falls_silent_gives_buffers_back_once_after_each_burst(ends, autojump_clock: trio.testing.MockClock):
    near, far = ends
    async with trio.open_nursery() as nursery:
        relay = Relay(lambda error: None, trio.current_time)
        nursery.start_soon(relay.run)
        shown = Clear()
        link = relay.adopt(near, NO_RECEIVER, shown)
        link.start()
        for burst in (1, 2):
            for _ in range(5):  # used at least once a second: never at rest
                far.send(b"words")
                await trio.sleep(0.7)
                link.write(b"answer")
                await trio.sleep(0.2)
            assert shown.slimmed == burst - 1
            await trio.sleep(10)
            assert shown.slimmed == burst
        nursery.cancel_scope.cancel()


def test_a_closed_connection_lets_go_of_openssl_without_the_cycle_collector(ends):
    relay = Relay(lambda error: None, lambda: 0.0)
    shown: Records = Clear()
    gone = weakref.ref(shown)
    link = relay.adopt(ends[0], NO_RECEIVER, shown)
    assert isinstance(link, TlsLink)
    link.start()
    link.write(b"used")
    del shown
    gc.disable()
    try:
        link.abort()
        assert gone() is None
        assert not relay.active and not relay.resting
    finally:
        gc.enable()
    link.write(b"to nobody")


def handshaken(make) -> tuple[SSL.Connection, Records]:
    """The client's end, and the server's records."""
    authority = Authority()
    credentials = authority.credentials(WEB)
    client = Handshake.client(client_context(credentials, authority.bundle_pem, [b"x"]), WEB.server_name, WEB)
    server = Handshake.server(server_context(credentials, client="required", alpn=[b"x"]), "cluster.local")
    data = client.step(b"")
    while not (client.done and server.done):
        data = server.step(data)
        data = client.step(data) if data else b""
    return client.connection, make(server.connection)


@pytest.mark.parametrize("make", [records, PortableRecords])
@pytest.mark.parametrize("cut", [1, 5, 700, 1021])
def test_buffers_given_back_in_the_middle_of_a_record_lose_nothing(make, cut: int):
    client, server = handshaken(make)
    payload = bytes(range(250)) * 4
    client.sendall(payload)
    wire = client.bio_read(65536)
    got = b""
    for part in (wire[:cut], wire[cut:]):
        RECEIVE_BUFFER[: len(part)] = part
        got += server.decrypt(len(part))
        server.slim()
    assert got == payload
    client.bio_write(bytes(server.encrypt(payload)))
    assert client.recv(65536) == payload


def test_a_burst_is_over_once_nothing_happened_for_a_turn_and_only_if_it_was_one():
    quiet = Quiet()
    assert not quiet.now()
    quiet.events += 100_000
    assert [quiet.now() for _ in range(4)] == [False, True, False, False]
    quiet.events += 100
    assert [quiet.now() for _ in range(3)] == [False, False, False]
    quiet.closed += 1000
    assert [quiet.now() for _ in range(3)] == [False, True, False]
