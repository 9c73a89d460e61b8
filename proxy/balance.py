"""Which endpoint gets the next request: power of two choices over peak-EWMA latency times requests in flight.

Two endpoints are drawn at random and the one with the smaller cost wins (linkerd2-proxy's default balancer). The latency average
jumps up at once with a slow answer and decays over time, so that a stalled endpoint loses its traffic within one answer and gets
another chance later. Pure: randomness and time are arguments.

Of very many endpoints only some are drawn from at a time: the aperture, as Finagle calls it. Without one a sidecar would keep a connection
to each of a thousand pods, which costs memory at both ends, and each connection would be cold in every cache when its turn comes. The
load decides how wide the aperture is: it grows by one when its endpoints have two requests each in flight, and shrinks when they have
fewer. A narrow aperture is cheap, but loads some pods and leaves others idle. So there is a minimum width, the aperture moves on by one
endpoint a second, and each balancer has a random order of its own, which spreads many sidecars over all pods. When the endpoints of the
aperture are slow or failing, the balancer draws from all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import exp

from policy.wire import Endpoint

DEFAULT_RTT_S = 0.030  # Linkerd's default_rtt: what an endpoint is assumed to cost before it answered once
DECAY_S = 10.0  # Linkerd's decay: an average loses 63 % of its distance to newer samples in this time
APERTURE_MIN = 16  # endpoints; with no more than these, there is no aperture
EXCHANGES_EACH = 2  # in flight at each endpoint of the aperture, on average, from which on it grows
ROTATE_S = 1.0  # after this time the aperture moves on by one endpoint
COST_LIMIT_S = 1.0  # when the better of two in the aperture costs this much, all endpoints are drawn from
FAILURE_COST_S = 5.0  # what a failed connection counts as, so that the next picks go elsewhere


class Tally:
    """The exchanges in flight at several endpoints together."""

    __slots__ = ("exchanges",)

    def __init__(self) -> None:
        self.exchanges = 0


class EndpointLoad:
    """One endpoint and what it costs to use it now."""

    __slots__ = ("_active", "_cost_s", "_stamp", "_tally", "endpoint", "gone")

    def __init__(self, endpoint: Endpoint, now: float) -> None:
        self.endpoint = endpoint
        self.gone = False
        self._active = 0
        self._tally: Tally | None = None
        self._cost_s = DEFAULT_RTT_S
        self._stamp = now

    @property
    def active(self) -> int:
        """Exchanges in flight."""
        return self._active

    @active.setter
    def active(self, count: int) -> None:
        if self._tally is not None:
            self._tally.exchanges += count - self._active
        self._active = count

    def count_in(self, tally: Tally | None) -> None:
        """Count its exchanges in this tally from now on, and in no other; None: in none."""
        if self._tally is not None:
            self._tally.exchanges -= self._active
        if tally is not None:
            tally.exchanges += self._active
        self._tally = tally

    def cost(self, now: float) -> float:
        """Expected wait: the decayed peak latency times what is in flight already, plus this one."""
        return self._cost_s * exp((self._stamp - now) / DECAY_S) * (self._active + 1)

    def observe(self, rtt_s: float, now: float) -> None:
        """An answer took this long: rise to it at once, or move towards it by what time allows."""
        if rtt_s >= self._cost_s:
            self._cost_s = rtt_s
        else:
            weight = exp((self._stamp - now) / DECAY_S)
            self._cost_s = self._cost_s * weight + rtt_s * (1.0 - weight)
        self._stamp = now

    def failed(self, now: float) -> None:
        """It could not be reached."""
        self.observe(max(FAILURE_COST_S, self._cost_s), now)


class Balancer:
    """The ready endpoints of one destination. A replaced list keeps the averages of the endpoints that stay."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._loads: list[EndpointLoad] = []
        self._start = 0  # of the aperture, an index into `_loads`
        self._width = APERTURE_MIN  # of the aperture
        self._rotated_at = 0.0
        self._tally = Tally()

    @property
    def in_flight(self) -> int:
        """Exchanges at the endpoints of the aperture. Kept as a counter: adding them up for each request would cost most under load."""
        return self._tally.exchanges

    def aperture(self) -> list[EndpointLoad]:
        """The endpoints that requests choose from as long as these cost less than `COST_LIMIT_S`, in the order in which they leave."""
        loads = self._loads
        return [loads[(self._start + at) % len(loads)] for at in range(min(self._width, len(loads)))]

    def __len__(self) -> int:
        return len(self._loads)

    def replace(self, endpoints: Iterable[Endpoint], now: float) -> None:
        """From now on choose among these. An endpoint whose identity changed is another endpoint."""
        self._count(self.aperture(), None)
        known = {load.endpoint: load for load in self._loads}
        wanted = dict.fromkeys(endpoints)
        if len(wanted) <= APERTURE_MIN:
            self._loads = [known.get(endpoint) or EndpointLoad(endpoint, now) for endpoint in wanted]
        else:
            self._loads = self._mixed(wanted, known, now)
        self._count(self.aperture(), self._tally)
        for endpoint, load in known.items():
            load.gone = endpoint not in wanted

    def _mixed(self, wanted: dict[Endpoint, None], known: dict[Endpoint, EndpointLoad], now: float) -> list[EndpointLoad]:
        """New endpoints at random places among those that stay, whose order does not change; the aperture stays where it is."""
        old = self._loads
        loads = [load for load in old if load.endpoint in wanted]
        for endpoint in wanted:
            if endpoint not in known:
                loads.insert(int(self._random() * (len(loads) + 1)), EndpointLoad(endpoint, now))
        first = next((load for load in old[self._start :] if load.endpoint in wanted), loads[0])
        self._start = loads.index(first)
        return loads

    def choose(self, now: float, *, avoid: frozenset[str] = frozenset()) -> EndpointLoad | None:
        """The endpoint for the next exchange, None when there is none. avoid: addresses that just failed this exchange."""
        loads = self._loads
        if avoid:
            loads = [load for load in loads if load.endpoint.addr not in avoid]
        count = len(loads)
        if count < 2:
            return loads[0] if loads else None
        if count > APERTURE_MIN and not avoid:
            if now - self._rotated_at >= ROTATE_S:
                self._rotate(now)
            chosen = self._better(loads, self._start, min(self._width, count), now)
            if chosen.cost(now) < COST_LIMIT_S:
                return chosen if chosen.active <= EXCHANGES_EACH else self._grown(chosen, now)
        return self._better(loads, 0, count, now)

    def _rotate(self, now: float) -> None:
        """Move the aperture on by one endpoint for each `ROTATE_S` that has passed, and shrink it by as many if its load allows."""
        steps = int((now - self._rotated_at) / ROTATE_S)
        self._rotated_at = now
        self._set_aperture((self._start + steps) % len(self._loads), self._width)
        if self._width > APERTURE_MIN:
            needed = self.in_flight // EXCHANGES_EACH + 1
            self._set_aperture(self._start, max(APERTURE_MIN, min(self._width, max(needed, self._width - steps))))

    def _set_aperture(self, start: int, width: int) -> None:
        self._count(self.aperture(), None)
        self._start, self._width = start, width
        self._count(self.aperture(), self._tally)

    def _count(self, loads: list[EndpointLoad], tally: Tally | None) -> None:
        for load in loads:
            load.count_in(tally)

    def _grown(self, chosen: EndpointLoad, now: float) -> EndpointLoad:
        """Grow the aperture if all of it is busy, not only the endpoint that was chosen. Returns the one to use: the newcomer if any."""
        width, count = self._width, len(self._loads)
        if width >= count or self.in_flight < EXCHANGES_EACH * width:
            return chosen
        self._width = width + 1
        next_one = self._loads[(self._start + width) % count]
        next_one.count_in(self._tally)
        return next_one if next_one.cost(now) < COST_LIMIT_S else chosen

    def _better(self, loads: list[EndpointLoad], start: int, count: int, now: float) -> EndpointLoad:
        """Of two among ``count`` endpoints from ``start`` on, around the end of the list."""
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        if second >= first:
            second += 1
        a, b = loads[(start + first) % len(loads)], loads[(start + second) % len(loads)]
        return a if a.cost(now) <= b.cost(now) else b
