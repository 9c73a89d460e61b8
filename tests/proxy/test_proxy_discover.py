"""Which ports stay subscribed: declared ones for ever, others while a connection holds them or they were dialled lately."""

from __future__ import annotations

import pytest
import trio

from core.addrs import Addr
from core.refs import Ref
from core.runtime.watch import Cell
from policy.wire import Anyone, Authorization, Destination, InboundPolicy, Network
from proxy.discover import Discovery, PortState
from proxy.rescue import Cause, Failure

SERVER = Ref("policy.pillion.dev", "Server", "shop", "web")
NOBODY = InboundPolicy(SERVER, "detect", ())
ANYONE = InboundPolicy(SERVER, "detect", (Authorization(SERVER, (Network("0.0.0.0/0"),), Anyone()),))


class Controller:
    """Knows every port at once."""

    def __init__(self) -> None:
        self.watched: dict[int, Cell[InboundPolicy | None]] = {}
        self.forgotten: list[int] = []
        self.dialled: dict[str, Cell[Destination | None]] = {}

    def watch_port(self, port: int) -> Cell[InboundPolicy | None]:
        self.watched[port] = Cell(NOBODY)
        return self.watched[port]

    def forget_port(self, port: int) -> None:
        del self.watched[port]
        self.forgotten.append(port)

    def watch_destination(self, addr: str) -> Cell[Destination | None]:
        self.dialled[addr] = Cell(Destination("external", None, "detect"))
        return self.dialled[addr]

    def forget_destination(self, addr: str) -> None:
        del self.dialled[addr]


async def test_a_port_scan_does_not_add_up() -> None:
    controller = Controller()
    discovery = Discovery(controller, "cluster.local", 1)
    discovery.port(80)
    for port in range(1000, 6000):
        await discovery.wait_port(port)
    assert len(controller.watched) <= 65 and len(discovery.ports) <= 65
    assert 80 in controller.watched, "a declared port stays"
    assert 5999 in controller.watched, "the next connection finds what is known"


async def test_a_port_with_a_connection_hears_of_new_policy_however_many_others_are_dialled() -> None:
    controller = Controller()
    discovery = Discovery(controller, "cluster.local", 1)
    held = await discovery.wait_port(999)
    for port in range(1000, 2000):
        await discovery.wait_port(port)
    assert await discovery.wait_port(999) is held
    controller.watched[999].set(ANYONE)
    assert held.authorizer is not None and held.authorizer.policy is ANYONE


async def test_a_forgotten_port_is_asked_for_again() -> None:
    controller = Controller()
    discovery = Discovery(controller, "cluster.local", 1)
    for port in (1, *range(1000, 1064)):
        await discovery.wait_port(port)
    assert controller.forgotten == [1]
    assert (await discovery.wait_port(1)).authorizer is not None and 1 in controller.watched


async def test_ports_with_connections_are_bounded_and_declared_ones_unaffected() -> None:
    discovery = Discovery(Controller(), "cluster.local", 1)
    held: list[PortState] = [await discovery.wait_port(port) for port in range(1000, 2024)]
    with pytest.raises(Failure) as refused:
        await discovery.wait_port(5000)
    assert refused.value.cause is Cause.OVERLOADED
    discovery.port(80)
    assert (await discovery.wait_port(80)).authorizer is not None
    held.clear()
    await discovery.wait_port(5000)


async def test_a_client_that_dials_the_world_evicts_what_is_unused_for_longest_and_nothing_in_use(
    autojump_clock: trio.testing.MockClock,
) -> None:
    controller = Controller()
    discovery = Discovery(controller, "cluster.local", 1, trio.current_time)
    in_use = await discovery.wait_destination(Addr("10.0.0.1", 1))
    for port in range(1, 10_000):
        (await discovery.wait_destination(Addr("10.0.0.2", port))).release(trio.current_time())
        await trio.sleep(0.001)
    assert len(controller.dialled) == len(discovery.destinations) <= 4096
    assert discovery.destinations[in_use.addr] is in_use
    assert "10.0.0.2:9999" in controller.dialled and "10.0.0.2:9000" in controller.dialled and "10.0.0.2:1" not in controller.dialled


async def test_a_destination_is_refused_only_when_all_are_in_use() -> None:
    discovery = Discovery(Controller(), "cluster.local", 1)
    held = [await discovery.wait_destination(Addr("10.0.0.2", port)) for port in range(4096)]
    with pytest.raises(Failure) as refused:
        await discovery.wait_destination(Addr("10.0.0.3", 80))
    assert refused.value.cause is Cause.OVERLOADED
    held[7].release(0)
    assert (await discovery.wait_destination(Addr("10.0.0.3", 80))).destination is not None
    assert held[7].addr not in discovery.destinations
