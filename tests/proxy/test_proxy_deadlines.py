"""proxy.outbound.deadlines: calls come due in time and in order, and what was dropped never runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from policy.wire import Retry, Timeouts
from proxy.budget import RetryBudget
from proxy.outbound.attempts import Attempts
from proxy.outbound.deadlines import Deadlines
from proxy.routing import RuleLimits
from proxy.transport.relay import Relay


@asynccontextmanager
async def deadlines() -> AsyncIterator[Deadlines]:
    def raise_again(error: BaseException) -> None:
        raise error

    relay = Relay(raise_again, trio.current_time, take_turns=False)
    async with trio.open_nursery() as nursery:
        yield Deadlines(relay, nursery, trio.current_time)
        nursery.cancel_scope.cancel()
    relay.epoll.close()


class Seen(list[tuple[str, float]]):
    """Which calls ran, and when."""

    def call(self, name: str) -> Callable[[], None]:
        return lambda: self.append((name, trio.current_time()))


@pytest.fixture
def seen() -> Seen:
    return Seen()


async def test_calls_run_when_they_are_due_whatever_the_order_in_which_they_were_set(autojump_clock: trio.testing.MockClock, seen: Seen):
    async with deadlines() as due:
        begun = trio.current_time()
        for name, seconds in (("a", 5.0), ("b", 1.0), ("c", 5.0), ("d", 0.5)):
            due.after(seconds, seen.call(name))
        await trio.sleep(0.7)
        due.after(0.1, seen.call("e"))
        await trio.sleep(10)
        assert [(name, round(at - begun, 6)) for name, at in seen] == [("d", 0.5), ("e", 0.8), ("b", 1.0), ("a", 5.0), ("c", 5.0)]
        assert len(due) == 0


async def test_what_was_dropped_never_runs_and_takes_no_memory(autojump_clock: trio.testing.MockClock, seen: Seen):
    async with deadlines() as due:
        for number in range(1000):
            due.after(1.0, seen.call(str(number))).drop()
        last = due.after(1.0, seen.call("last"))
        last.drop()
        last.drop()
        assert len(due) == 0
        await trio.sleep(2)
        assert seen == []


async def test_one_that_is_due_may_drop_another_that_is_due_at_the_same_time(autojump_clock: trio.testing.MockClock, seen: Seen):
    async with deadlines() as due:
        later = due.after(1.0, lambda: first.drop() or seen.append(("second", 0.0)))
        first = due.after(1.0, seen.call("first"))
        await trio.sleep(2)
        assert seen == [("second", 0.0)]
        later.drop()


async def test_a_call_may_set_the_next_deadline(autojump_clock: trio.testing.MockClock, seen: Seen):
    async with deadlines() as due:
        begun = trio.current_time()
        due.after(1.0, lambda: (due.after(0.25, seen.call("next")), None)[1])
        await trio.sleep(5)
        assert [(name, at - begun) for name, at in seen] == [("next", 1.25)]


def attempts_of(timeouts: Timeouts, due: Deadlines, late: Callable[[], None], retry: Retry | None = None) -> Attempts:
    limits = RuleLimits(timeouts, retry, RetryBudget(trio.current_time()), lambda: 0.0)
    return Attempts(limits, due, late, trio.current_time())


async def test_time_is_limited_for_the_whole_request_and_for_each_attempt(autojump_clock: trio.testing.MockClock, seen: Seen):
    async with deadlines() as due:
        begun = trio.current_time()
        attempts = attempts_of(Timeouts(5.0, 2.0), due, seen.call("late"))
        await trio.sleep(1.5)
        attempts.sent(trio.current_time())
        await trio.sleep(1.5)
        attempts.sent(trio.current_time())
        await trio.sleep(10)
        assert [at - begun for _, at in seen] == [5.0, 5.0]
        ended = attempts_of(Timeouts(5.0, 2.0), due, seen.call("never"))
        ended.sent(trio.current_time())
        ended.end()
        await trio.sleep(10)
        assert len(seen) == 2 and len(due) == 0


async def test_without_a_duration_there_is_no_deadline(autojump_clock: trio.testing.MockClock, seen: Seen):
    async with deadlines() as due:
        attempts = attempts_of(Timeouts(0.0, 1.0), due, seen.call("late"))
        assert len(due) == 0
        attempts.sent(trio.current_time())
        assert len(due) == 1
        attempts.end()
        whole = attempts_of(Timeouts(1.0, 0.0), due, seen.call("late"))
        whole.sent(trio.current_time())
        assert len(due) == 1
        whole.end()


async def test_pauses_grow_and_end_with_the_attempts(autojump_clock: trio.testing.MockClock, seen: Seen):
    async with deadlines() as due:
        attempts = attempts_of(Timeouts(0.0, 1.0), due, seen.call("late"), Retry((), 6, 0.1))
        pauses = []
        while (pause_s := attempts.pause_s(trio.current_time())) is not None:
            pauses.append(pause_s)
        assert pauses == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


async def test_no_attempt_is_late_while_it_pauses_and_none_follows_the_end_of_all_time(autojump_clock: trio.testing.MockClock, seen: Seen):
    async with deadlines() as due:
        attempts = attempts_of(Timeouts(5.0, 1.0), due, seen.call("late"), Retry((), 9))
        attempts.sent(trio.current_time())
        assert attempts.pause_s(trio.current_time()) is not None
        await trio.sleep(4)
        assert seen == []
        await trio.sleep(4)
        assert len(seen) == 1
        assert attempts.pause_s(trio.current_time()) is None
