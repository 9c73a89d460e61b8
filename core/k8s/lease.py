"""Leader election on a coordination.k8s.io/v1 Lease: of several replicas one leads, and stops before another may begin.

`Election` decides, from the Lease as it was last seen and a clock, whether to take, renew, leave or wait; `Elector` is the short driver
that moves its decisions to the API server. What a leader does is for the caller, who reads the cell `Elector.leader`. Used by the
identity service and the policy controller.

Theory of operation (as client-go's leaderelection, same numbers). Clocks of different machines are never compared: a Lease is stale when
*we* have seen the same version of it for its whole duration. A leader counts from the moment it *asked* for its last renewal and gives up
after ``renew_within_s``, which is shorter than the ``lease_s`` that others wait, so the two never overlap. Writes name the
resourceVersion they are based on: of two that take the Lease at once, the API server lets one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import trio

from core.k8s.api import Api, object_path
from core.k8s.errors import Conflict, NotFound
from core.k8s.fields import Raw
from core.runtime import logs
from core.runtime.watch import Cell

LEASE_S = 15.0  # client-go: LeaseDuration
RENEW_WITHIN_S = 10.0  # client-go: RenewDeadline
RETRY_S = 2.0  # client-go: RetryPeriod
_CALL_TIMEOUT_S = 5.0
_HOLDER_MAX = 253
_DURATION_MAX_S = 300.0  # whatever somebody wrote into the Lease, a dead leader is not waited for longer

log = logs.logger("lease")


@dataclass(frozen=True)
class Write:
    """Store this Lease: POST when ``create``, else PUT."""

    lease: dict[str, Any]
    create: bool


@dataclass(frozen=True)
class Wait:
    """Nothing to do; look again after this many seconds."""

    seconds: float


class Election:
    """The decision, without I/O. Times are of one monotonic clock, seconds; ``utc`` only labels what is written, for people.

    me: unique among the candidates, e.g. the pod's name.
    """

    def __init__(
        self,
        namespace: str,
        name: str,
        me: str,
        *,
        lease_s: float = LEASE_S,
        renew_within_s: float = RENEW_WITHIN_S,
        retry_s: float = RETRY_S,
    ) -> None:
        assert retry_s < renew_within_s < lease_s, "a leader must give up before others may begin, and try more than once"
        assert 1 <= len(me) <= _HOLDER_MAX
        self.namespace, self.name, self.me = namespace, name, me
        self.lease_s, self.renew_within_s, self.retry_s = lease_s, renew_within_s, retry_s
        self.holder = ""
        """Who holds the Lease as far as we have seen; empty for nobody."""
        self._lease: Raw | None = None
        self._looked = False
        self._version = ""
        self._since = 0.0
        self._holds_until = float("-inf")

    def observed(self, lease: Raw | None, now: float) -> None:
        """What the API server has; None when there is no such Lease."""
        version = str(_of(lease, "metadata", "resourceVersion") or "")
        if not self._looked or version != self._version:
            self._since = now
        self._looked, self._lease, self._version = True, lease, version
        self.holder = str(_of(lease, "spec", "holderIdentity") or "")
        if self.holder != self.me:
            self._holds_until = float("-inf")

    def accepted(self, lease: Raw, asked_at: float, now: float) -> None:
        """The API server stored what `decide` wanted, asked at ``asked_at``, and answered with this."""
        self.observed(lease, now)
        if self.holder == self.me:
            self._holds_until = asked_at + self.renew_within_s

    def leads(self, now: float) -> bool:
        """Whether we may act as the leader at this moment."""
        return now < self._holds_until

    @property
    def holds_until(self) -> float:
        """When leadership ends unless it is renewed; minus infinity when we do not lead."""
        return self._holds_until

    def decide(self, now: float, utc: datetime) -> Write | Wait:
        """Call after `observed`."""
        assert self._looked, "look before you decide"
        if self._lease is None:
            return Write(self._written(utc, taking=True, transitions=0), create=True)
        transitions = _number(_of(self._lease, "spec", "leaseTransitions"))
        if self.holder == self.me:
            return Write(self._written(utc, taking=False, transitions=transitions), create=False)
        duration = min(float(_number(_of(self._lease, "spec", "leaseDurationSeconds")) or self.lease_s), _DURATION_MAX_S)
        if not self.holder or now - self._since >= duration:
            return Write(self._written(utc, taking=True, transitions=transitions + 1), create=False)
        return Wait(min(self.retry_s, max(0.0, self._since + duration - now)))

    def release(self, utc: datetime) -> Write | None:
        """What hands a Lease that we hold to whoever asks next; None when we do not hold it. `leads` is false from here on."""
        self._holds_until = float("-inf")
        if self.holder != self.me or self._lease is None:
            return None
        transitions = _number(_of(self._lease, "spec", "leaseTransitions"))
        lease = self._written(utc, taking=False, transitions=transitions)
        lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
        return Write(lease, create=False)

    def _written(self, utc: datetime, *, taking: bool, transitions: int) -> dict[str, Any]:
        stamp = utc.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        kept = _of(self._lease, "spec", "acquireTime")
        metadata = _of(self._lease, "metadata")
        metadata = metadata if isinstance(metadata, dict) else {"name": self.name, "namespace": self.namespace}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": self.me,
                "leaseDurationSeconds": max(1, int(self.lease_s)),
                "acquireTime": stamp if taking or not kept else kept,
                "renewTime": stamp,
                "leaseTransitions": transitions,
            },
        }


class LeaseApi(Protocol):
    """What the driver needs of the API server. Any exception means that it is not known whether it was done."""

    async def read(self, namespace: str, name: str) -> Raw | None:
        """The Lease, None when there is none."""
        ...

    async def write(self, lease: dict[str, Any], *, create: bool) -> Raw | None:
        """Create or replace; the stored Lease, None when somebody else was faster (409, or 404 for a replace)."""
        ...


class Leases:
    """The API server's. RBAC: leases of coordination.k8s.io, get and update by name, create."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def read(self, namespace: str, name: str) -> Raw | None:
        """See LeaseApi; raises ApiError."""
        try:
            return await self._api.get(_path(namespace, name))
        except NotFound:
            return None

    async def write(self, lease: dict[str, Any], *, create: bool) -> Raw | None:
        """See LeaseApi; raises ApiError."""
        namespace, name = lease["metadata"]["namespace"], lease["metadata"]["name"]
        try:
            if create:
                return await self._api.post(_path(namespace), lease)
            return await self._api.put(_path(namespace, name), lease)
        except (Conflict, NotFound):
            return None


def _path(namespace: str, name: str = "") -> str:
    return object_path("coordination.k8s.io", "v1", "leases", namespace, name)


class Elector:
    """Takes part in one election for as long as `run` runs. leader: true while we lead."""

    def __init__(self, api: LeaseApi, election: Election, *, chance: Callable[[], float] = random.random) -> None:
        self._api = api
        self._election = election
        self._chance = chance
        self._failing = False
        self.leader = Cell(False)

    @property
    def holder(self) -> str:
        """Who holds the Lease as far as we know, for readiness texts and dumps; empty for nobody."""
        return self._election.holder

    def leads(self) -> bool:
        """Whether we may act as the leader at this moment; stricter than the cell, which follows within an instant."""
        return self._election.leads(trio.current_time())

    async def run(self) -> None:
        """For ever; on cancellation the Lease is handed back, so that the next leader need not wait it out."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_in_time)
                while True:  # noqa: ASYNC110 - the pause is until the next look, not for an event of this process
                    await trio.sleep(await self._turn())
        finally:
            self._set()
            with trio.move_on_after(1.0) as closing:
                closing.shield = True
                await self._release()

    async def _turn(self) -> float:
        """One look and what follows from it; returns seconds until the next."""
        election, asked_at = self._election, trio.current_time()
        pause = election.retry_s * (1 + 0.2 * self._chance())  # candidates spread
        try:
            with trio.fail_after(min(_CALL_TIMEOUT_S, election.renew_within_s / 2)):
                election.observed(await self._api.read(election.namespace, election.name), trio.current_time())
                decision = election.decide(trio.current_time(), datetime.now(UTC))
                if isinstance(decision, Wait):
                    self._failing = False
                    self._set()
                    return min(pause, decision.seconds + 0.1)
                asked_at = trio.current_time()
                stored = await self._api.write(decision.lease, create=decision.create)
        except Exception as error:  # whatever it was: we do not lead by it, and look again
            if not self._failing:  # once an outage, which may last
                log.warning("lease not renewed or read, tried again", lease=election.name, reason=f"{type(error).__name__}: {error}")
            self._failing = True
            self._set()
            return pause
        self._failing = False
        if stored is not None:
            election.accepted(stored, asked_at, trio.current_time())
        self._set()
        return pause

    async def _end_in_time(self) -> None:
        """Turns the cell off the moment that leadership runs out, whatever a call is waiting for."""
        while True:
            await self.leader.wait_for(bool)
            await trio.sleep_until(self._election.holds_until)
            self._set()

    async def _release(self) -> None:
        decision = self._election.release(datetime.now(UTC))
        self._set()
        if decision is None:
            return
        try:
            await self._api.write(decision.lease, create=False)
        except Exception as error:
            log.info("lease not handed back, it will run out", lease=self._election.name, reason=f"{type(error).__name__}: {error}")

    def _set(self) -> None:
        leads = self.leads()
        if leads != self.leader.value:
            log.info("leading" if leads else "not leading", lease=self._election.name, holder=self._election.holder)
            self.leader.set(leads)


def _of(value: object, *path: str) -> Any:
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _number(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 31 else 0
