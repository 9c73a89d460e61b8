"""Of any number of candidates at most one leads at any moment, whatever the API server and the clocks do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from core.k8s.fields import Raw
from core.k8s.lease import LEASE_S, RENEW_WITHIN_S, Election, Elector, Wait, Write

UTC_NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class FakeLeases:
    """One Lease as the API server keeps it: resourceVersion checked on replace. away: calls hang, deaf: done, but the answer is lost."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.away: set[str] = set()
        self.deaf: set[str] = set()

    def for_one(self, who: str) -> OneView:
        return OneView(self, who)

    def store(self, lease: dict[str, Any], create: bool) -> Raw | None:
        if create != (self.lease is None):
            return None
        if self.lease is not None and lease["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            return None
        self.version += 1
        self.lease = copy.deepcopy(lease)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(self.lease)


class OneView:
    """The API server as one candidate reaches it."""

    def __init__(self, shared: FakeLeases, who: str) -> None:
        self.shared = shared
        self.who = who

    async def read(self, namespace: str, name: str) -> Raw | None:
        await trio.lowlevel.checkpoint()
        if self.who in self.shared.away:
            await trio.sleep_forever()
        return copy.deepcopy(self.shared.lease)

    async def write(self, lease: dict[str, Any], *, create: bool) -> Raw | None:
        await trio.lowlevel.checkpoint()
        if self.who in self.shared.away:
            await trio.sleep_forever()
        stored = self.shared.store(lease, create)
        if self.who in self.shared.deaf:
            raise OSError("the connection was reset")
        return stored


def candidate(who: str) -> Election:
    return Election("pillion", "identity", who)


def test_the_first_candidate_creates_the_lease_and_leads_from_the_moment_it_asked() -> None:
    one, leases = candidate("one"), FakeLeases()
    one.observed(None, 100.0)
    decision = one.decide(100.0, UTC_NOW)
    assert isinstance(decision, Write)
    assert decision.create
    assert decision.lease["spec"] == {
        "holderIdentity": "one",
        "leaseDurationSeconds": 15,
        "acquireTime": "2026-01-02T03:04:05.000000Z",
        "renewTime": "2026-01-02T03:04:05.000000Z",
        "leaseTransitions": 0,
    }
    stored = leases.store(decision.lease, create=True)
    assert stored is not None
    one.accepted(stored, asked_at=100.0, now=104.0)
    assert one.leads(104.0)
    assert not one.leads(100.0 + RENEW_WITHIN_S)


def test_another_candidate_waits_for_a_whole_duration_of_silence_by_its_own_clock() -> None:
    one, two, leases = candidate("one"), candidate("two"), FakeLeases()
    one.observed(None, 0.0)
    first = one.decide(0.0, UTC_NOW)
    assert isinstance(first, Write)
    stored = leases.store(first.lease, create=True)
    two.observed(stored, 7_000_000.0)  # clocks have nothing in common
    assert isinstance(two.decide(7_000_000.0, UTC_NOW), Wait)
    two.observed(stored, 7_000_014.9)
    assert isinstance(two.decide(7_000_014.9, UTC_NOW), Wait)
    taken = two.decide(7_000_015.0, UTC_NOW)
    assert isinstance(taken, Write)
    assert (taken.lease["spec"]["holderIdentity"], taken.lease["spec"]["leaseTransitions"]) == ("two", 1)


def test_a_renewal_that_another_sees_starts_its_wait_anew() -> None:
    two = candidate("two")
    for at, version in ((0.0, "1"), (14.0, "2"), (28.0, "3")):
        two.observed({"metadata": {"resourceVersion": version}, "spec": {"holderIdentity": "one", "leaseDurationSeconds": 15}}, at)
        assert isinstance(two.decide(at, UTC_NOW), Wait)


def test_a_leader_that_sees_another_holder_stops_at_once() -> None:
    one = candidate("one")
    one.accepted({"metadata": {"resourceVersion": "1"}, "spec": {"holderIdentity": "one"}}, 0.0, 0.0)
    assert one.leads(1.0)
    one.observed({"metadata": {"resourceVersion": "2"}, "spec": {"holderIdentity": "two"}}, 1.0)
    assert not one.leads(1.0)


def test_a_lease_that_was_handed_back_is_taken_at_once() -> None:
    one, two, leases = candidate("one"), candidate("two"), FakeLeases()
    one.observed(None, 0.0)
    first = one.decide(0.0, UTC_NOW)
    assert isinstance(first, Write)
    stored = leases.store(first.lease, create=True)
    assert stored is not None
    one.accepted(stored, 0.0, 0.0)
    released = one.release(UTC_NOW)
    assert released is not None
    assert not one.leads(0.0)
    two.observed(leases.store(released.lease, create=False), 5.0)
    assert isinstance(two.decide(5.0, UTC_NOW), Write)
    assert two.release(UTC_NOW) is None


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.dictionaries(
            st.sampled_from(["metadata", "spec", "resourceVersion", "holderIdentity", "leaseDurationSeconds", "leaseTransitions"]),
            inner,
            max_size=4,
        ),
    )
)
def test_whatever_somebody_wrote_into_the_lease_there_is_a_decision(content: object) -> None:
    one = candidate("one")
    one.observed(content if isinstance(content, dict) else {}, 0.0)
    assert isinstance(one.decide(0.0, UTC_NOW), Write | Wait)


class Hall:
    """Electors on one Lease, and a watch that no two lead at once."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.leases = FakeLeases()
        self.electors: dict[str, Elector] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self.nursery = nursery
        self.most_at_once = 0

    def enter(self, who: str) -> Elector:
        elector = Elector(self.leases.for_one(who), candidate(who), chance=lambda: 0.5)
        self.electors[who] = elector
        self.scopes[who] = trio.CancelScope()
        elector.leader.subscribe(lambda _: self.count())
        self.nursery.start_soon(self._run, who)
        return elector

    async def _run(self, who: str) -> None:
        with self.scopes[who]:
            await self.electors[who].run()

    def count(self) -> None:
        self.most_at_once = max(self.most_at_once, sum(elector.leader.value for elector in self.electors.values()))

    def leader(self) -> str:
        return ",".join(who for who, elector in self.electors.items() if elector.leader.value)


async def until(condition: Callable[[], bool], within_s: float) -> float:
    started = trio.current_time()
    while not condition():
        assert trio.current_time() - started < within_s
        await trio.sleep(0.05)
    return trio.current_time() - started


async def test_a_leader_cut_off_from_the_api_server_stops_before_the_next_one_starts(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        hall = Hall(nursery)
        hall.enter("one")
        await until(lambda: hall.leader() == "one", 1)
        hall.enter("two")
        await trio.sleep(60)
        assert hall.leader() == "one"
        hall.leases.away.add("one")
        assert await until(lambda: hall.leader() == "", RENEW_WITHIN_S + 0.1) > 0
        await until(lambda: hall.leader() == "two", LEASE_S + 3)
        hall.leases.away.clear()
        await trio.sleep(60)
        assert hall.leader() == "two"
        assert hall.most_at_once == 1
        nursery.cancel_scope.cancel()


async def test_a_leader_that_ends_hands_over_within_one_look(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        hall = Hall(nursery)
        hall.enter("one")
        await until(lambda: hall.leader() == "one", 1)
        hall.enter("two")
        await trio.sleep(5)
        hall.scopes["one"].cancel()
        await until(lambda: hall.leader() == "two", 3)
        assert hall.most_at_once == 1
        nursery.cancel_scope.cancel()


async def test_a_leader_whose_answers_are_lost_does_not_lead_on(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        hall = Hall(nursery)
        hall.leases.deaf.add("one")
        hall.enter("one")
        await trio.sleep(30)
        assert hall.leader() == ""
        assert hall.leases.lease is not None
        hall.leases.deaf.clear()
        await until(lambda: hall.leader() == "one", 5)
        nursery.cancel_scope.cancel()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["one", "two", "three"]), st.booleans(), st.floats(0.1, 20)), max_size=12))
def test_however_the_network_comes_and_goes_no_two_lead_at_once(outages: list[tuple[str, bool, float]]) -> None:
    async def play() -> None:
        async with trio.open_nursery() as nursery:
            hall = Hall(nursery)
            for who in ("one", "two", "three"):
                hall.enter(who)
            for who, away, pause in outages:
                (hall.leases.away.add if away else hall.leases.away.discard)(who)
                await trio.sleep(pause)
            hall.leases.away.clear()
            await until(lambda: bool(hall.leader()), 60)
            assert hall.most_at_once == 1
            nursery.cancel_scope.cancel()

    trio.run(play, clock=trio.testing.MockClock(autojump_threshold=0))


def test_numbers_that_would_let_two_lead_are_refused() -> None:
    with pytest.raises(AssertionError):
        Election("pillion", "identity", "one", lease_s=10, renew_within_s=10)
