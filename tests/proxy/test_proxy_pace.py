"""A link is never further ahead of its app than what goes past TCP, and loses nothing by waiting for it."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import trio
import trio.testing

from proxy.transport.link import Link
from proxy.transport.pace import ASK_AFTER, SEND_MAX, UNREAD_MAX, Pace, unread_by_app
from proxy.transport.relay import Relay

PIECE = bytes(range(256)) * 256  # 64 KiB


class Engine:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.drained_times = 0
        self.ends: list[str] = []

    def received(self, data: bytes) -> None: ...
    def expired(self) -> None: ...

    def ended(self) -> None:
        self.ends.append("ended")

    def lost(self, reset: bool) -> None:
        self.ends.append("lost")

    def drained(self) -> None:
        self.drained_times += 1


class Kernel:
    """What the programs would answer. unread: None where there are none."""

    def __init__(self) -> None:
        self.unread: int | None = 0
        self.asked = 0

    def __call__(self, sock: socket.socket) -> int:
        self.asked += 1
        if self.unread is None:
            raise OSError(errno.ENOPROTOOPT, "no such option")
        return self.unread


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what happens to a link wakes no task
            await trio.sleep(0.001)


class Hop:
    """A link towards an app, whose end takes whatever comes."""

    def __init__(self, relay: Relay, kernel: Kernel) -> None:
        self.kernel = kernel
        ours, self.app = socket.socketpair()
        for sock in (ours, self.app):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.engine = Engine()
        self.link: Link = relay.adopt(ours, self.engine)
        self.link.start()
        self.got = bytearray()

    def write(self, size: int) -> None:
        for _ in range(size // len(PIECE)):
            self.link.write(PIECE)
            self.take()

    def take(self) -> None:
        while True:
            try:
                data = self.app.recv(1 << 20)
            except BlockingIOError:
                return
            if not data:
                return
            self.got += data

    async def take_until(self, size: int) -> None:
        with trio.fail_after(30):
            while len(self.got) < size:
                await trio.lowlevel.wait_readable(self.app)
                self.take()


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture(params=[True, False], ids=["where trio would sleep", "as a task"])
async def hop(request: pytest.FixtureRequest, nursery: trio.Nursery, kernel: Kernel) -> AsyncIterator[Hop]:
    def crash(error: BaseException) -> None:
        raise error

    relay = Relay(crash, take_turns=request.param, unread=kernel)
    nursery.start_soon(relay.run)
    hop = Hop(relay, kernel)
    yield hop
    hop.app.close()


async def test_a_link_waits_while_its_app_has_much_unread_and_then_sends_the_rest_in_order(hop: Hop) -> None:
    hop.kernel.unread = UNREAD_MAX
    hop.write(4 * ASK_AFTER)
    assert len(hop.got) == ASK_AFTER
    assert hop.link.blocked
    asked = hop.kernel.asked
    await until(lambda: hop.kernel.asked > asked + 20)
    hop.take()
    assert len(hop.got) == ASK_AFTER
    hop.kernel.unread = 0
    await hop.take_until(4 * ASK_AFTER)
    assert bytes(hop.got) == PIECE * (4 * ASK_AFTER // len(PIECE))
    await until(lambda: not hop.link.blocked)
    assert hop.engine.drained_times == 1


async def test_one_large_write_does_not_run_past_the_limit(hop: Hop) -> None:
    hop.kernel.unread = UNREAD_MAX
    hop.link.write(bytes(8 * ASK_AFTER))

    def asked() -> bool:
        hop.take()
        return hop.kernel.asked > 0

    await until(asked)
    hop.take()
    assert len(hop.got) <= ASK_AFTER + SEND_MAX
    hop.kernel.unread = 0
    await hop.take_until(8 * ASK_AFTER)


async def test_an_app_that_keeps_up_is_asked_about_rarely(hop: Hop) -> None:
    hop.write(ASK_AFTER + 6 * UNREAD_MAX)
    assert len(hop.got) == ASK_AFTER + 6 * UNREAD_MAX
    assert hop.kernel.asked == 6


async def test_an_app_with_half_of_it_unread_gets_the_other_half_before_the_next_question(hop: Hop) -> None:
    hop.kernel.unread = UNREAD_MAX // 2
    hop.write(ASK_AFTER + 6 * UNREAD_MAX)
    assert hop.kernel.asked == 12


async def test_where_no_program_answers_the_socket_alone_decides(hop: Hop) -> None:
    hop.kernel.unread = None
    hop.write(16 * ASK_AFTER)
    assert len(hop.got) == 16 * ASK_AFTER
    assert hop.kernel.asked == 1


async def test_an_end_waits_for_what_the_app_has_to_read_first(hop: Hop) -> None:
    hop.kernel.unread = UNREAD_MAX
    hop.write(2 * ASK_AFTER)
    hop.link.end()
    hop.kernel.unread = 0
    await hop.take_until(2 * ASK_AFTER)
    with trio.fail_after(30):
        await trio.lowlevel.wait_readable(hop.app)
    assert hop.app.recv(1) == b""


async def test_a_link_that_waits_hears_that_its_app_is_gone(hop: Hop) -> None:
    hop.kernel.unread = UNREAD_MAX
    hop.write(2 * ASK_AFTER)
    hop.app.close()
    await until(lambda: bool(hop.engine.ends))


async def test_an_aborted_link_is_not_asked_about_again(hop: Hop) -> None:
    hop.kernel.unread = UNREAD_MAX
    hop.write(2 * ASK_AFTER)
    hop.link.abort()
    asked = hop.kernel.asked
    await trio.sleep(0.05)
    assert hop.kernel.asked == asked


class Stuck:
    """A link whose app reads nothing; one whose app reads a little leaves and comes back, so that the others are asked about as soon."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.asked = 0

    def send_again(self) -> None:
        self.asked += 1
        self.pace.wait(self)


class Slow(Stuck):
    def send_again(self) -> None:
        self.asked += 1
        if self.asked % 2:
            self.pace.wait(self)


class Passes:
    """As much of a relay as the task needs."""

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        yield

    def later(self, call: Callable[[], None], link: Stuck) -> None:
        call()


async def test_many_stuck_connections_are_asked_about_no_oftener_in_all_than_a_few(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace(Passes(), lambda sock: UNREAD_MAX)
    links = [*(Stuck(pace) for _ in range(5000)), *(Slow(pace) for _ in range(5))]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pace.run)
        for link in links:
            pace.wait(link)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert 5000 < sum(link.asked for link in links) <= 110_000


def test_a_kernel_without_programs_knows_no_such_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(OSError, match="not"):
        unread_by_app(sock)
