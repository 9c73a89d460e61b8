from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import policy_lab as lab
import pytest
import trio
import trio.testing
from policy_lab import CART, indexed, parsed

from core.names import WorkloadId
from policy import wire
from policy.answers import encoded_destination, encoded_policy
from policy.index import Index
from policy.limits import Limits
from policy.lines import LineBuffer
from policy.server import PolicyServer
from policy.shares import bytes_of

HELLO = wire.Hello("shop", "cart-0", "1")
LONG_ADDR = "10.96.0.1:" + "80".zfill(54) + "!"  # an address in its first 64 characters, none as a whole


class Peer:
    """The far end of a connection, speaking the wire format by hand."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._lines = LineBuffer(wire.MAX_LINE_BYTES)
        self._messages: list[wire.ToSidecar] = []

    async def say(self, *messages: wire.ToController | bytes) -> None:
        await self.stream.send_all(b"".join(part if isinstance(part, bytes) else wire.encode(part) for part in messages))

    async def hear(self) -> wire.ToSidecar:
        """The next message; EOFError when the server has closed."""
        with trio.fail_after(3600):
            while not self._messages:
                data = bytes(await self.stream.receive_some(65536))
                if not data:
                    raise EOFError
                self._messages = [wire.decode_to_sidecar_untrusted(line) for line in self._lines.feed_untrusted(data)]
            return self._messages.pop(0)

    async def hear_refusal(self) -> str:
        found = await self.hear()
        assert isinstance(found, wire.Refused)
        with pytest.raises(EOFError):
            await self.hear()
        return found.reason

    async def is_quiet(self) -> bool:
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0) as scope:
            await self.hear()
        return scope.cancelled_caught


Connect = Callable[..., Peer]


@asynccontextmanager
async def serving(server: PolicyServer) -> AsyncIterator[Connect]:
    async with trio.open_nursery() as nursery:

        def connect(peer: WorkloadId = CART, ip: str | None = "10.0.0.5") -> Peer:
            near, far = trio.testing.memory_stream_pair()
            nursery.start_soon(server.serve_peer, far, peer, ip)
            return Peer(near)

        yield connect
        nursery.cancel_scope.cancel()


def served(*raws: lab.Raw, **limits: float) -> tuple[Index, PolicyServer]:
    index = indexed(*(raws or (lab.namespace(), lab.pod(), lab.service(), lab.endpoints("cart-0"))))
    return index, PolicyServer(index, Limits(**limits))  # type: ignore[arg-type]


async def test_a_watched_port_and_destination_are_answered_whole_and_again_when_they_change() -> None:
    index, server = served()
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(8080), wire.WatchDestination("10.96.0.1:80"))
        assert await peer.hear() == wire.PortPolicy(8080, index.inbound_policy("shop", "cart-0", 8080))
        assert await peer.hear() == wire.AddressDestination("10.96.0.1:80", index.destination("10.96.0.1:80"))
        server.changed(index.apply(parsed(lab.server())))
        assert await peer.hear() == wire.PortPolicy(8080, index.inbound_policy("shop", "cart-0", 8080))
        server.changed(index.apply(parsed(lab.endpoints())))
        assert await peer.hear() == wire.AddressDestination("10.96.0.1:80", index.destination("10.96.0.1:80"))
        assert await peer.is_quiet()


async def test_a_change_that_makes_no_difference_to_the_subscriber_is_not_sent() -> None:
    index, server = served()
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(8080))
        await peer.hear()
        server.changed(index.apply(parsed(lab.server(port=9999))))
        assert await peer.is_quiet()


async def test_forgetting_ends_a_subscription_and_watching_again_answers_again() -> None:
    index, server = served()
    addr = "10.96.0.1:80"
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchDestination(addr))
        await peer.hear()
        await peer.say(wire.ForgetDestination(addr))
        await trio.testing.wait_all_tasks_blocked()
        server.changed(index.apply(parsed(lab.endpoints())))
        assert await peer.is_quiet()
        await peer.say(wire.WatchDestination(addr))
        assert await peer.hear() == wire.AddressDestination(addr, index.destination(addr))
        await peer.say(wire.WatchDestination(addr))
        assert await peer.hear() == wire.AddressDestination(addr, index.destination(addr))


@pytest.mark.parametrize(
    ("peer", "ip", "word", "reason"),
    [
        (
            WorkloadId("cluster.local", "shop", "web"),
            "10.0.0.5",
            "identity",
            f"pod shop/cart-0 is {CART.uri}, not spiffe://cluster.local/ns/shop/sa/web",
        ),
        (
            WorkloadId("cluster.local", "ops", "cart"),
            "10.0.0.5",
            "identity",
            "pod shop/cart-0 cannot be spoken for by spiffe://cluster.local/ns/ops/sa/cart",
        ),
        (
            WorkloadId("other.example", "shop", "cart"),
            "10.0.0.5",
            "identity",
            f"pod shop/cart-0 is {CART.uri}, not spiffe://other.example/ns/shop/sa/cart",
        ),
        (CART, "10.0.0.6", "address", "pod shop/cart-0 has no address 10.0.0.6"),
    ],
)
async def test_subscribing_as_somebody_else_is_refused(peer: WorkloadId, ip: str, word: str, reason: str) -> None:
    _, server = served()
    async with serving(server) as connect:
        stranger = connect(peer, ip)
        await stranger.say(HELLO, wire.WatchPort(8080))
        assert await stranger.hear_refusal() == reason
    assert server.counters.refused == {word: 1}
    assert (server.counters.accepted, server.counters.connected) == (0, 0)


async def test_a_pod_without_known_addresses_may_speak_from_any() -> None:
    _, server = served(lab.pod(ip=""))
    async with serving(server) as connect:
        peer = connect(CART, "10.0.0.77")
        await peer.say(HELLO, wire.WatchPort(1))
        assert isinstance(await peer.hear(), wire.PortPolicy)


async def test_a_pod_that_is_on_its_way_to_us_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    index, server = served(lab.namespace())
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(8080))
        await trio.sleep(1)
        server.changed(index.apply(parsed(lab.pod())))
        assert isinstance(await peer.hear(), wire.PortPolicy)
        ghost = connect()
        await ghost.say(wire.Hello("shop", "ghost", "1"))
        began = trio.current_time()
        assert await ghost.hear_refusal() == "pod shop/ghost is not known"
        assert trio.current_time() - began == pytest.approx(Limits().pod_wait_s)


@pytest.mark.parametrize(
    ("said", "word", "reason"),
    [
        (wire.encode(wire.WatchPort(80)), "no-hello", "the first message must be a hello"),
        (b"GET / HTTP/1.1\r\n\r\n", "invalid-message", "not a message of this API"),
        (wire.encode(HELLO) * 2, "second-hello", "a second hello on one connection"),
        (wire.encode(HELLO) + wire.encode(wire.WatchPort(0)), "invalid-message", "port 0 does not exist"),
        (wire.encode(HELLO) + wire.encode(wire.WatchDestination("cart:80")), "invalid-message", "'cart' is not an IP address"),
        (
            wire.encode(HELLO) + wire.encode(wire.WatchDestination("10.96.0.1:080")),
            "invalid-message",
            "'10.96.0.1:080': expected 10.96.0.1:80",
        ),
        (
            wire.encode(HELLO) + wire.encode(wire.WatchDestination("[0:0:0:0:0:ffff:a60:1]:80")),
            "invalid-message",
            "'[0:0:0:0:0:ffff:a60:1]:80': expected 10.96.0.1:80",  # one of thousands of spellings, and the answer would be kept for each
        ),
        (wire.encode(HELLO) + wire.encode(wire.WatchDestination(LONG_ADDR)), "invalid-message", f"'{LONG_ADDR[:64]}"),
        (wire.encode(HELLO) + wire.encode(wire.ForgetDestination(LONG_ADDR)), "invalid-message", f"'{LONG_ADDR[:64]}"),
        (wire.encode(HELLO) + b"[" * 3000 + b"\n", "invalid-message", "not a message of this API"),
        (b"x" * 70_000, "line-too-long", "a line of more than 65536 bytes"),
        (wire.encode(HELLO) + b"x" * 70_000, "line-too-long", "a line of more than 65536 bytes"),
    ],
)
async def test_a_peer_that_breaks_a_rule_is_told_and_cut(said: bytes, word: str, reason: str) -> None:
    _, server = served()
    async with serving(server) as connect:
        peer = connect()
        await peer.say(said)
        assert (await peer.hear_refusal()).startswith(reason)
    assert server.counters.refused == {word: 1}


async def test_a_peer_that_says_nothing_is_cut(autojump_clock: trio.testing.MockClock) -> None:
    _, server = served()
    async with serving(server) as connect:
        assert await connect().hear_refusal() == "no hello within 5 s"


async def test_subscriptions_beyond_the_bound_are_ignored_and_the_others_go_on() -> None:
    index, server = served(subscriptions=2)
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(1), wire.WatchPort(2), wire.WatchDestination("10.96.0.1:80"))
        assert [type(await peer.hear()) for _ in range(2)] == [wire.PortPolicy] * 2
        assert await peer.is_quiet()
        server.changed(index.apply(parsed(lab.server(port=2))))
        assert (await peer.hear()).port == 2  # type: ignore[union-attr]
    assert server.counters.subscriptions_ignored == 1


async def test_a_forgotten_port_makes_room_and_is_not_told_of_any_more() -> None:
    index, server = served(subscriptions=1)
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(1))
        assert (await peer.hear()).port == 1  # type: ignore[union-attr]
        await peer.say(wire.ForgetPort(1), wire.WatchPort(2))
        assert (await peer.hear()).port == 2  # type: ignore[union-attr]
        server.changed(index.apply(parsed(lab.server(port=1))))
        assert await peer.is_quiet()
    assert server.counters.subscriptions_ignored == 0


async def test_a_slow_reader_costs_one_entry_per_subscription_and_then_sees_the_newest_state() -> None:
    index, server = served()
    async with trio.open_nursery() as nursery:
        near, far = trio.testing.memory_stream_pair()
        gate, sends = trio.Event(), 0
        deliver = far.send_stream.send_all_hook
        assert deliver is not None

        async def wait_gate() -> None:
            nonlocal sends
            sends += 1
            await gate.wait()
            await deliver()

        far.send_stream.send_all_hook = wait_gate
        nursery.start_soon(server.serve_peer, far, CART, "10.0.0.5")
        peer = Peer(near)
        await peer.say(HELLO, wire.WatchDestination("10.96.0.1:80"))
        await trio.testing.wait_all_tasks_blocked()
        for number in range(500):
            server.changed(index.apply(parsed(lab.endpoints(cart_0=f"10.0.1.{number % 250}"))))
        await trio.testing.wait_all_tasks_blocked()
        assert sends == 1
        (subscriber,) = next(iter(server._subscriptions._by_pod.values()))
        assert list(subscriber.due) == ["10.96.0.1:80"]
        gate.set()
        assert isinstance(await peer.hear(), wire.AddressDestination)
        assert await peer.hear() == wire.AddressDestination("10.96.0.1:80", index.destination("10.96.0.1:80"))
        assert await peer.is_quiet()
        nursery.cancel_scope.cancel()


async def test_a_peer_that_watches_every_port_lets_the_others_have_their_turn() -> None:
    """Each change in its namespace has all of its ports looked up, though next to none has another answer: not in one go."""
    index, server = served()
    turns = _Turns()
    look_up = index.inbound_policy

    def counted(namespace: str, pod: str, port: int) -> wire.InboundPolicy:
        turns.looked_up += 1
        return look_up(namespace, pod, port)

    index.inbound_policy = counted  # type: ignore[method-assign]
    trio.lowlevel.add_instrument(turns)
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, *(wire.WatchPort(port) for port in range(1, 2001)))
        for _ in range(2000):
            await peer.hear()
        turns.all = 0
        server.changed(index.apply(parsed(lab.server(port=1500))))
        found = await peer.hear()
        assert isinstance(found, wire.PortPolicy) and found.port == 1500
        assert await peer.is_quiet()
        assert turns.all == 2000 and turns.most <= 100


class _Turns(trio.abc.Instrument):
    """How many policies were looked up in all, and at most without a turn for any other task."""

    looked_up = all = most = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.all += self.looked_up
        self.most = max(self.most, self.looked_up)
        self.looked_up = 0


async def test_a_peer_that_never_reads_is_cut(autojump_clock: trio.testing.MockClock) -> None:
    _, server = served()
    near, far = trio.testing.memory_stream_pair()
    far.send_stream.send_all_hook = trio.sleep_forever
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_peer, far, CART, "10.0.0.5")
        await Peer(near).say(HELLO, wire.WatchPort(8080))
    assert server.counters.refused == {"slow-reader": 1}
    assert server.counters.connected == 0


async def test_of_too_many_connections_of_one_pod_the_oldest_goes() -> None:
    _, server = served(per_pod=2)
    async with serving(server) as connect:
        peers = [connect() for _ in range(3)]
        for peer in peers:
            await peer.say(HELLO, wire.WatchPort(8080))
            await peer.hear()
        with pytest.raises(EOFError):
            await peers[0].hear()
        assert await peers[1].is_quiet()
        assert await peers[2].is_quiet()


async def test_a_pod_that_becomes_somebody_else_loses_its_subscriptions() -> None:
    index, server = served()
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(8080))
        await peer.hear()
        server.changed(index.apply(parsed(lab.pod(account="web"))))
        assert await peer.hear_refusal() == "pod shop/cart-0 is now spiffe://cluster.local/ns/shop/sa/web"


async def test_a_pod_that_is_gone_keeps_the_policy_it_had() -> None:
    index, server = served()
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(8080))
        await peer.hear()
        server.changed(index.delete(parsed(lab.pod()).ref))
        assert await peer.is_quiet()


async def test_nothing_is_left_of_a_peer_that_went() -> None:
    _, server = served()
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(8080), wire.WatchDestination("10.96.0.1:80"))
        await peer.hear()
        await peer.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        kept = server._subscriptions
        assert (kept._by_pod, kept._by_ip, kept._answers._known, server.counters.connected) == ({}, {}, {}, 0)


def test_what_no_sidecar_would_read_is_shortened_or_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"p-{n}" for n in range(64)]
    pods = [lab.pod(), *(lab.pod(name, f"10.0.0.{5 + n}") for n, name in enumerate(names))]
    index = indexed(*pods, lab.service(), lab.server(accessPolicy="all-unauthenticated"), lab.endpoints(*names))
    policy, destination = index.inbound_policy("shop", "cart-0", 8080), index.destination("10.96.0.1:80")
    assert wire.decode_to_sidecar_untrusted(encoded_policy(8080, policy)) == wire.PortPolicy(8080, policy)
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 1000)
    short = wire.decode_to_sidecar_untrusted(encoded_destination("10.96.0.1:80", destination))
    assert isinstance(short, wire.AddressDestination) and 0 < len(short.destination.endpoints) < 64
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 300)
    denied = wire.decode_to_sidecar_untrusted(encoded_policy(8080, policy))
    assert isinstance(denied, wire.PortPolicy) and (denied.policy.server, denied.policy.authorizations) == (policy.server, ())


WEB = WorkloadId("cluster.local", "shop", "web")
WEB_HELLO = wire.Hello("shop", "web-0", "1")


def of_two_pods(**limits: float) -> tuple[Index, PolicyServer]:
    return served(lab.namespace(), lab.pod(), lab.pod("web-0", "10.0.0.6", account="web"), lab.service(), **limits)


def dialled(count: int) -> list[wire.ToController]:
    return [wire.WatchDestination(f"192.0.2.{number // 250}:{1 + number % 250}") for number in range(count)]


async def test_who_holds_far_more_than_others_leaves_for_them_when_memory_is_short() -> None:
    _, server = of_two_pods(memory_bytes=bytes_of(1000))
    async with serving(server) as connect:
        greedy, modest = connect(), connect(WEB, "10.0.0.6")
        await greedy.say(HELLO, *dialled(1001))
        for _ in range(1000):
            await greedy.hear()
        assert await greedy.is_quiet()
        assert (server.counters.subscriptions_ignored, server.counters.bytes_taken) == (1, bytes_of(1000))
        await modest.say(WEB_HELLO, wire.WatchPort(8080), *dialled(200))
        assert await greedy.hear_refusal() == "memory is short, and pod shop/cart-0 has 1000 subscriptions here, see docs/scale.md"
        for _ in range(201):
            await modest.hear()
        assert server.counters.refused == {"overloaded": 1}
        assert server.counters.bytes_taken == bytes_of(201)


async def test_who_has_to_leave_comes_back_to_what_the_others_leave_and_drives_nobody_out() -> None:
    _, server = of_two_pods(memory_bytes=bytes_of(300) + bytes_of(500))
    async with serving(server) as connect:
        steady, greedy = connect(WEB, "10.0.0.6"), connect()
        await steady.say(WEB_HELLO, *dialled(300))
        await greedy.say(HELLO, *dialled(4000))
        for _ in range(300):
            await steady.hear()
        for _ in range(500):
            await greedy.hear()
        assert await greedy.is_quiet() and await steady.is_quiet()
        assert (server.counters.refused, server.counters.subscriptions_ignored) == ({}, 3500)
        assert server.counters.bytes_taken == bytes_of(300) + bytes_of(500)


async def test_pods_that_ask_for_little_stay_and_one_that_finds_no_room_is_told_why() -> None:
    _, server = of_two_pods(memory_bytes=bytes_of(0))
    async with serving(server) as connect:
        first, second = connect(), connect(WEB, "10.0.0.6")
        await first.say(HELLO, wire.WatchPort(8080))
        await first.hear()
        await second.say(WEB_HELLO, wire.WatchPort(8080))
        assert await second.hear_refusal() == "no memory is left for one more sidecar, see docs/scale.md"
        await first.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert server.counters.bytes_taken == 0
        again = connect(WEB, "10.0.0.6")
        await again.say(WEB_HELLO, wire.WatchPort(8080))
        assert isinstance(await again.hear(), wire.PortPolicy)


async def test_what_is_forgotten_takes_no_memory() -> None:
    _, server = served()
    async with serving(server) as connect:
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(1), *dialled(100))
        for _ in range(101):
            await peer.hear()
        assert server.counters.bytes_taken == bytes_of(101)
        await peer.say(wire.ForgetPort(1), *(wire.ForgetDestination(message.addr) for message in dialled(100)))  # type: ignore[union-attr]
        await trio.testing.wait_all_tasks_blocked()
        assert server.counters.bytes_taken == bytes_of(0)


async def test_connections_that_never_say_who_they_are_keep_no_other_address_out() -> None:
    _, server = of_two_pods(newcomers=6)
    async with serving(server) as connect:
        for _ in range(6):
            connect(WEB, "10.0.0.6")
        await trio.testing.wait_all_tasks_blocked()
        peer = connect()
        await peer.say(HELLO, wire.WatchPort(8080))
        assert isinstance(await peer.hear(), wire.PortPolicy)
        assert server.counters.refused == {"overloaded": 1}
