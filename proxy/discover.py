"""What the policy controller told us, compiled and kept current: the policy of our ports, and what stands behind dialled addresses.

States are shared: every connection to one port or address holds the same object and sees its replacement as soon as it arrives.
Losing the controller changes nothing here: the last known state keeps serving. What was never known is waited for, bounded, and then
refused: nothing is ever let through because nobody could be asked.
"""

from __future__ import annotations

import random
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

import trio

from core.addrs import Addr
from core.runtime.watch import Cell
from policy.authorize import PortAuthorizer
from policy.wire import Destination, InboundPolicy
from proxy.balance import Balancer
from proxy.rescue import Cause, Failure
from proxy.routing import Routing

_UNUSED_S = 90.0  # a destination nobody dialled for this long is forgotten (Linkerd keeps 5 s outbound, 90 s inbound)
_RECENT_PORTS = 64  # undeclared ports of ours that stay known although no connection uses them
_PORTS_MAX = 1024  # undeclared ports with connections: a port scan must not use up the subscriptions the controller allows a sidecar
_DESTINATIONS_MAX = 4096  # what the controller accepts from one sidecar; while all of them are in use, a new address is refused
_EVICTED = 256  # unused ones that are forgotten together when the limit is reached


class PolicySource(Protocol):
    """Where policy comes from: policy.client.PolicyClient."""

    def watch_port(self, port: int) -> Cell[InboundPolicy | None]:
        """The policy of a port of ours, None until it is known."""
        ...

    def forget_port(self, port: int) -> None:
        """Nobody uses the port any more."""
        ...

    def watch_destination(self, addr: str) -> Cell[Destination | None]:
        """What stands behind ``ip:port``, None until it is known."""
        ...

    def forget_destination(self, addr: str) -> None:
        """Nobody uses the address any more."""
        ...


class PortState:
    """The policy of one of our ports. authorizer: None until the first policy arrived. changed: called at every replacement.

    Whoever holds the object keeps the port subscribed.
    """

    __slots__ = ("__weakref__", "_cell", "_trust_domain", "authorizer", "changed", "port")

    def __init__(self, port: int, cell: Cell[InboundPolicy | None], trust_domain: str) -> None:
        self.port = port
        self._cell = cell
        self._trust_domain = trust_domain
        self.authorizer: PortAuthorizer | None = None
        self.changed: set[Callable[[], None]] = set()
        replace = weakref.WeakMethod(self._replace)

        def tell(policy: InboundPolicy | None) -> None:
            if (listening := replace()) is not None:
                listening(policy)

        cell.subscribe(tell)
        if cell.value is not None:
            self._replace(cell.value)

    def _replace(self, policy: InboundPolicy | None) -> None:
        if policy is None:
            return
        self.authorizer = PortAuthorizer(policy, self._trust_domain)
        for listener in tuple(self.changed):
            listener()

    async def wait_known(self) -> PortAuthorizer:
        """The policy, as soon as there is one. The caller bounds the time."""
        await self._cell.wait_for(lambda policy: policy is not None)
        assert self.authorizer is not None
        return self.authorizer


class DestinationState:
    """What stands behind one dialled address. users: connections that hold it now. changed: told of every replacement.

    routing: where HTTP requests go when routes decide that, None when the balancer alone does.
    """

    __slots__ = ("_cell", "_now", "addr", "balancer", "changed", "destination", "routing", "unused_since", "users")

    def __init__(self, addr: Addr, cell: Cell[Destination | None], now: Callable[[], float]) -> None:
        self.addr = addr
        self._cell = cell
        self.destination: Destination | None = None
        self.balancer = Balancer(random.random)
        self.routing: Routing | None = None
        self.changed: set[Callable[[], None]] = set()
        self.users = 0
        self._now = now
        self.unused_since = now()
        cell.subscribe(self._replace)
        if cell.value is not None:
            self._replace(cell.value)

    def _replace(self, destination: Destination | None) -> None:
        if destination is None:
            return
        self.destination = destination
        now = self._now()
        self.balancer.replace(destination.endpoints, now)
        self.routing = Routing(destination, self.addr.port, self.routing, random.random, now) if destination.routes else None
        for listener in tuple(self.changed):
            listener()

    async def wait_known(self) -> Destination:
        """The destination, as soon as it is known. The caller bounds the time."""
        await self._cell.wait_for(lambda destination: destination is not None)
        assert self.destination is not None
        return self.destination

    def hold(self) -> DestinationState:
        """A connection begins to use it."""
        self.users += 1
        return self

    def release(self, now: float) -> None:
        """A connection is done with it."""
        self.users -= 1
        self.unused_since = now


class Discovery:
    """Ports and destinations of this sidecar, subscribed on first use."""

    def __init__(self, client: PolicySource, trust_domain: str, wait_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._trust_domain = trust_domain
        self._wait_s = wait_s
        self._now = now
        self._declared: dict[int, PortState] = {}
        self._recent: OrderedDict[int, PortState] = OrderedDict()
        self._undeclared: weakref.WeakValueDictionary[int, PortState] = weakref.WeakValueDictionary()
        self.destinations: dict[Addr, DestinationState] = {}

    @property
    def ports(self) -> Mapping[int, PortState]:
        """Every port of ours that is known at present."""
        return {**self._undeclared, **self._declared}

    def port(self, port: int) -> PortState:
        """The state of a port that the pod declares, known for ever; subscribes at the first call."""
        state = self._declared.get(port)
        if state is None:
            state = self._declared[port] = PortState(port, self._client.watch_port(port), self._trust_domain)
        return state

    def _dialled_port(self, port: int) -> PortState:
        """The state of a port that somebody dialled; an undeclared one is forgotten some time after its last connection."""
        state = self._declared.get(port)
        if state is not None:
            return state
        state = self._undeclared.get(port)
        if state is None:
            if len(self._undeclared) >= _PORTS_MAX:
                raise Failure(Cause.OVERLOADED, f"more than {_PORTS_MAX} undeclared ports are in use")
            state = self._undeclared[port] = PortState(port, self._client.watch_port(port), self._trust_domain)
            weakref.finalize(state, self._client.forget_port, port).atexit = False
        self._recent[port] = state
        self._recent.move_to_end(port)
        if len(self._recent) > _RECENT_PORTS:
            self._recent.popitem(last=False)
        return state

    def known_port(self, port: int) -> PortState | None:
        """The state of a dialled port if its policy is known already; raises Failure(OVERLOADED)."""
        state = self._dialled_port(port)
        return state if state.authorizer is not None else None

    async def wait_port(self, port: int) -> PortState:
        """The state of a dialled port with its policy known; raises Failure(NO_POLICY) when it does not arrive in time, OVERLOADED."""
        state = self._dialled_port(port)
        if state.authorizer is None:
            with trio.move_on_after(self._wait_s) as scope:
                await state.wait_known()
            if scope.cancelled_caught:
                raise Failure(Cause.NO_POLICY, f"no policy for port {port} arrived within {self._wait_s:g} s")
        return state

    async def wait_destination(self, addr: Addr) -> DestinationState:
        """What stands behind a dialled address, known and held for the caller; raises Failure(NO_POLICY, OVERLOADED)."""
        state = self.destinations.get(addr)
        if state is None:
            if len(self.destinations) >= _DESTINATIONS_MAX and not self._evict():
                raise Failure(Cause.OVERLOADED, f"more than {_DESTINATIONS_MAX} destinations are in use")
            cell = self._client.watch_destination(str(addr))
            state = self.destinations[addr] = DestinationState(addr, cell, self._now)
        state.hold()
        if state.destination is None:
            with trio.move_on_after(self._wait_s) as scope:
                await state.wait_known()
            if scope.cancelled_caught:
                state.release(self._now())
                raise Failure(Cause.NO_POLICY, f"nothing is known about {addr} after {self._wait_s:g} s")
        return state

    def forget_unused(self, now: float) -> None:
        """Unsubscribe what no connection used for a while."""
        for state in list(self.destinations.values()):
            if not state.users and now - state.unused_since > _UNUSED_S:
                self._forget(state)

    def _evict(self) -> bool:
        """Make room: forget those that have been unused for longest. False: all are in use."""
        unused = sorted((state for state in self.destinations.values() if not state.users), key=lambda state: state.unused_since)
        for state in unused[:_EVICTED]:
            self._forget(state)
        return bool(unused)

    def _forget(self, state: DestinationState) -> None:
        del self.destinations[state.addr]
        self._client.forget_destination(str(state.addr))

    async def run(self) -> None:
        """Forget unused destinations from time to time, until cancelled."""
        while True:
            await trio.sleep(_UNUSED_S / 3)
            self.forget_unused(self._now())
