"""The relay loop over real sockets: order, half-close, resets, back-pressure, TLS, timers."""

from __future__ import annotations

import gc
import select
import socket
import threading
import time
import weakref

import pytest
import trio
import trio.testing

from core.names import parse_workload_id
from core.runtime.tls import TlsStream, client_context, server_context
from proxy.protocol.opaque import Splice
from proxy.transport.link import Link
from proxy.transport.relay import Relay
from proxy.transport.tls_bio import PortableRecords, Records, records
from tests.certs import Authority

WEB = parse_workload_id("spiffe://cluster.local/ns/shop/sa/web")


class Placeholder:
    def received(self, data: bytes) -> None: ...
    def ended(self) -> None: ...
    def lost(self, reset: bool) -> None: ...
    def drained(self) -> None: ...
    def expired(self) -> None: ...


_sockets: list[socket.socket] = []


@pytest.fixture(autouse=True)
def no_socket_left_open():
    yield
    while _sockets:
        _sockets.pop().close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    _sockets.extend((left, right))
    for end in (left, right):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return left, right


def join(relay: Relay, one: tuple[socket.socket, Records | None], two: tuple[socket.socket, Records | None], done) -> tuple[Link, Link]:
    for sock, _ in (one, two):
        sock.setblocking(False)
    a, b = relay.adopt(one[0], Placeholder(), one[1]), relay.adopt(two[0], Placeholder(), two[1])
    splice = Splice(a, b, done)
    a.receiver, b.receiver = splice.client, splice.upstream
    a.start()
    b.start()
    return a, b


def crash(error: BaseException) -> None:
    raise error


@pytest.fixture(params=[True, False], ids=["where trio would sleep", "as a task"])
async def relay(request, nursery):
    loop = Relay(crash, take_turns=request.param)
    nursery.start_soon(loop.run)
    return loop


async def stream(sock: socket.socket) -> trio.SocketStream:
    sock.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def read_all(end: trio.abc.ReceiveStream) -> bytes:
    got = bytearray()
    while chunk := await end.receive_some(65536):
        got += chunk
    return bytes(got)


async def test_bytes_and_half_closes_pass_in_both_directions(relay):
    app, inner = tcp_pair()
    outer, server = tcp_pair()
    ended: list[str] = []
    join(relay, (inner, None), (outer, None), ended.append)
    client_end, server_end = await stream(app), await stream(server)
    payload = bytes(range(256)) * 20000
    answers: list[bytes] = []

    async def serve() -> None:
        got = await read_all(server_end)
        await server_end.send_all(got[::-1])
        await server_end.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await client_end.send_all(payload)
        await client_end.send_eof()
        answers.append(await read_all(client_end))
    assert answers == [payload[::-1]]
    assert ended == [""]
    assert relay.open_links <= 2  # closing links linger until the peers' FINs are read


async def test_a_reset_is_carried_as_a_reset(relay):
    app, inner = tcp_pair()
    outer, server = tcp_pair()
    finished = trio.Event()
    causes: list[str] = []
    join(relay, (inner, None), (outer, None), lambda cause: (causes.append(cause), finished.set()))
    app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    app.close()
    await finished.wait()
    assert causes == ["reset"]
    server.settimeout(30)
    with pytest.raises(ConnectionResetError):
        await trio.to_thread.run_sync(server.recv, 1)
    server.close()


class Hearing(Placeholder):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[bytes | str] = []

    def received(self, data: bytes) -> None:
        self.heard.append(data)

    def ended(self) -> None:
        self.heard.append("ended")

    def lost(self, reset: bool) -> None:
        self.heard.append("reset" if reset else "cut off")


async def test_an_answer_that_came_before_a_reset_is_heard_when_a_send_fails(relay):
    app, outer = tcp_pair()
    outer.setblocking(False)
    upload = Hearing()
    link = relay.adopt(outer, upload, None)
    link.start()
    link.write(b"a long upload")
    app.sendall(b"too long")
    app.close()  # over what it did not read, which makes a reset of it
    died = select.poll()
    died.register(outer, 0)
    assert died.poll(10_000)
    with relay.batch():  # before the loop looks at what there is to read
        link.write(b" that goes on")
    assert upload.heard == [b"too long", "reset"]


async def test_a_reader_that_does_not_read_stops_its_writer(relay):
    app, inner = tcp_pair()
    outer, server = tcp_pair()
    _, b = join(relay, (inner, None), (outer, None), lambda cause: None)
    app.setblocking(False)
    sent = 0
    with trio.fail_after(30):
        while True:
            try:
                sent += app.send(bytes(65536))
            except BlockingIOError:
                if b.blocked:
                    break
                await trio.lowlevel.checkpoint()  # the relay gets its turn
    assert b.blocked
    held = sum(len(part) for part in b._held)
    assert held <= 256 * 1024  # one read
    server_end = await stream(server)
    app.setblocking(True)
    closer = threading.Thread(target=app.shutdown, args=(socket.SHUT_WR,))
    closer.start()
    assert len(await read_all(server_end)) == sent
    closer.join()
    app.close()


async def _tls_sockets(make) -> tuple[TlsStream, socket.socket, Records]:
    """A TLS client stream and, handshaken, the raw server end for the relay."""
    authority = Authority()
    credentials = authority.credentials(WEB)
    near, far = tcp_pair()
    client = TlsStream.client(await stream(near), client_context(credentials, authority.bundle_pem, [b"x"]), WEB.server_name, WEB)
    transport = await stream(far)
    server = TlsStream.server(transport, server_context(credentials, client="required", alpn=[b"x"]), "cluster.local")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    raw = socket.socket(fileno=transport.socket.detach())
    _sockets.append(raw)
    return client, raw, make(server.connection)


class Rekeying:
    """Records of a peer that does nothing but ask for new keys; what the real ones answer is 27 bytes each."""

    ended = False

    def decrypt(self, length: int) -> bytes:
        return b""

    def output(self) -> bytes:
        return b"k" * 27

    def encrypt(self, data: bytes | memoryview) -> bytes | memoryview:
        return data

    def close_notify(self) -> bytes:
        return b""

    def slim(self) -> None: ...


async def test_a_peer_that_only_asks_for_new_keys_is_reset(relay):
    near, far = tcp_pair()
    near.setblocking(False)
    link = relay.adopt(near, Placeholder(), Rekeying())
    link.start()
    peer = await stream(far)

    async def ask_for_ever() -> None:
        while True:
            await peer.send_all(b"update")
            await peer.receive_some(4096)

    with trio.fail_after(30), pytest.raises(trio.BrokenResourceError):
        await ask_for_ever()
    assert link.dead


@pytest.mark.parametrize("make", [records, PortableRecords])
async def test_tls_bytes_and_close_notify_pass_in_both_directions(relay, make):
    client, raw, tls = await _tls_sockets(make)
    outer, server = tcp_pair()
    ended: list[str] = []
    join(relay, (raw, tls), (outer, None), ended.append)
    server_end = await stream(server)
    payload = bytes(range(256)) * 20000

    async def serve() -> None:
        got = await read_all(server_end)
        await server_end.send_all(got[::-1])
        await server_end.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await client.send_all(payload)
        await client.send_eof()
        assert await read_all(client) == payload[::-1]
    assert ended == [""]


@pytest.mark.parametrize("make", [records, PortableRecords])
async def test_tls_cut_off_without_close_notify_resets_the_other_side(relay, make):
    client, raw, tls = await _tls_sockets(make)
    outer, server = tcp_pair()
    causes: list[str] = []
    finished = trio.Event()
    join(relay, (raw, tls), (outer, None), lambda cause: (causes.append(cause), finished.set()))
    await client.send_all(b"half a message")
    assert await trio.to_thread.run_sync(server.recv, 100) == b"half a message"
    await client.transport.send_eof()
    await finished.wait()
    assert causes == ["truncated"]
    with pytest.raises(ConnectionResetError):
        await trio.to_thread.run_sync(server.recv, 1)
    server.close()


class Ticker(Placeholder):
    def __init__(self) -> None:
        self.expirations = 0

    def expired(self) -> None:
        self.expirations += 1


def test_a_deadline_fires_once_after_its_time_and_can_be_moved():
    now = [100.2]
    relay = Relay(crash, clock=lambda: now[0])
    left, right = tcp_pair()
    ticker = Ticker()
    link = relay.adopt(left, ticker)
    link.expire_after(5)
    relay.expire(105)
    assert ticker.expirations == 0
    relay.expire(106)
    assert ticker.expirations == 1
    relay.now = 106.0
    link.expire_after(100)
    link.expire_after(2)  # earlier than before
    relay.expire(109)
    assert ticker.expirations == 2
    relay.now = 109.0
    link.expire_after(2)
    relay.now = 110.0
    link.expire_after(30)  # later than before
    relay.expire(120)
    assert ticker.expirations == 2
    relay.expire(141)
    assert ticker.expirations == 3
    link.expire_after(None)
    relay.expire(1000)
    assert ticker.expirations == 3
    link.abort()
    right.close()


@pytest.mark.parametrize("late_s", [None, 1.0], ids=["", "and its engine asks for another deadline"])
def test_a_closed_connection_leaves_memory_long_before_its_deadline(late_s: float | None):
    relay = Relay(crash, clock=lambda: 100.0)
    left, right = tcp_pair()
    ticker = Ticker()
    link = relay.adopt(left, ticker)
    link.expire_after(300)
    link.expire_after(200)
    link.abort()
    if late_s is not None:
        link.expire_after(late_s)
    gone = weakref.ref(ticker)
    del link, ticker
    gc.collect()
    assert gone() is None
    right.close()


async def test_an_engine_that_raises_costs_its_own_connection_only(nursery):
    seen: list[BaseException] = []
    relay = Relay(seen.append)
    nursery.start_soon(relay.run)

    class Broken(Placeholder):
        def received(self, data: bytes) -> None:
            raise LookupError("bug")

    bad, bad_inner = tcp_pair()
    bad_inner.setblocking(False)
    relay.adopt(bad_inner, Broken()).start()
    app, inner = tcp_pair()
    outer, server = tcp_pair()
    join(relay, (inner, None), (outer, None), lambda cause: None)
    bad.send(b"boom")
    with pytest.raises(ConnectionResetError):
        await trio.to_thread.run_sync(bad.recv, 1)
    app.send(b"still here")
    assert await trio.to_thread.run_sync(server.recv, 100) == b"still here"
    assert [type(error) for error in seen] == [LookupError]
    for sock in (bad, app, server):
        sock.close()


@pytest.mark.parametrize("make", [records, PortableRecords])
@pytest.mark.parametrize("length", [1, 5, 20, 21, 22, 23, 100, 1039])
async def test_bytes_that_are_no_tls_records_deliver_nothing(relay, make, length):
    client, raw, tls = await _tls_sockets(make)
    outer, server = tcp_pair()
    join(relay, (raw, tls), (outer, None), lambda cause: None)
    await client.send_all(b"secret of before")  # so that the shared buffer holds somebody's plaintext
    assert await trio.to_thread.run_sync(server.recv, 100) == b"secret of before"
    await client.transport.send_all(b"\x17\x03\x03\x00\x01"[:length].ljust(length, b"\x00"))
    await client.transport.send_eof()
    server.settimeout(30)
    with pytest.raises(ConnectionResetError):
        await trio.to_thread.run_sync(server.recv, 100)


async def test_tasks_and_deadlines_are_not_held_up_by_the_relay_nor_by_its_idleness(relay):
    app, inner = tcp_pair()
    outer, server = tcp_pair()
    join(relay, (inner, None), (outer, None), lambda cause: None)
    server_end = await stream(server)
    woken = trio.Event()
    relay.later(woken.set)
    await woken.wait()
    with trio.move_on_after(0.05) as deadline:
        await trio.sleep_forever()
    assert deadline.cancelled_caught
    busy = await stream(app)

    async def flood() -> None:
        while True:
            await busy.send_all(bytes(65536))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        received = 0
        for _ in range(50):  # a task that has something to do at every turn, while the relay always has
            received += len(await server_end.receive_some(65536))
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert received


async def test_a_task_made_runnable_by_an_engine_runs_at_once(nursery):
    relay = Relay(crash)
    nursery.start_soon(relay.run)
    heard, told = trio.Event(), list[float]()

    class Wakes(Placeholder):
        def received(self, data: bytes) -> None:
            told.append(time.monotonic())
            heard.set()

    app, inner = tcp_pair()
    inner.setblocking(False)
    relay.adopt(inner, Wakes()).start()
    sender = threading.Timer(0.02, app.send, (b"x",))  # when everybody sleeps already
    sender.start()
    await heard.wait()
    assert time.monotonic() - told[0] < 0.4  # before the timer wheel, which wakes everybody once a second
    sender.join()


async def test_a_relay_that_breaks_ends_loudly():
    relay = Relay(crash)  # a report that raises is a bug in the loop itself, not in one connection

    class Broken(Placeholder):
        def received(self, data: bytes) -> None:
            raise LookupError("bug")

    async def carry_one() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.run)
            app, inner = tcp_pair()
            inner.setblocking(False)
            relay.adopt(inner, Broken()).start()
            app.send(b"x")

    with pytest.raises(ExceptionGroup) as raised, trio.fail_after(30):
        await carry_one()
    assert raised.group_contains(LookupError)
