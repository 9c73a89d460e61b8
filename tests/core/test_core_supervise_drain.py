"""Long-lived tasks come back after a failure; a process ends in order."""

from __future__ import annotations

import os
import signal

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from core.runtime.drain import Drain, drain_on_signals
from core.runtime.supervise import Backoff, keep_running


def test_pauses_double_up_to_the_longest_and_are_cut_by_at_most_half() -> None:
    whole = Backoff(1, 5, draw=lambda: 0.0)
    assert [whole.next_s() for _ in range(4)] == [1, 2, 4, 5]
    whole.reset()
    assert whole.next_s() == 1
    assert Backoff(1, 5, draw=lambda: 0.999).next_s() == pytest.approx(0.5, abs=0.01)


async def test_a_failing_task_is_run_again_after_growing_pauses(autojump_clock: MockClock) -> None:
    starts: list[float] = []
    begin = trio.current_time()

    async def run() -> None:
        starts.append(trio.current_time() - begin)
        if len(starts) < 4:
            raise ExceptionGroup("nursery", [OSError("gone")])

    await keep_running("policy", run, Backoff(1, 30, draw=lambda: 0.0))
    assert starts == pytest.approx([0, 1, 3, 7])


async def test_a_long_run_resets_the_pause(autojump_clock: MockClock) -> None:
    starts: list[float] = []

    async def run() -> None:
        starts.append(trio.current_time())
        if len(starts) == 3:
            await trio.sleep(100)
        if len(starts) < 5:
            raise OSError("gone")

    await keep_running("policy", run, Backoff(1, 30, draw=lambda: 0.0))
    assert starts[3] - starts[2] == pytest.approx(101)


async def test_what_is_no_exception_ends_the_supervision() -> None:
    async def run() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await keep_running("policy", run)


async def test_cancelling_ends_the_task_at_once() -> None:
    with trio.move_on_after(0) as scope:
        await keep_running("policy", trio.sleep_forever)
    assert scope.cancelled_caught


async def test_draining_tells_listeners_once_and_waits_for_work(autojump_clock: MockClock) -> None:
    drain, told = Drain(), []
    drain.subscribe(lambda: told.append("first"))
    unsubscribe = drain.subscribe(lambda: told.append("never"))
    unsubscribe()
    drain.begin_work()

    async def finish_later() -> None:
        await drain.wait_started()
        drain.subscribe(lambda: told.append("late"))
        await trio.sleep(3)
        drain.end_work()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish_later)
        await wait_all_tasks_blocked()
        drain.start("SIGTERM")
        drain.start("again")
        began = trio.current_time()
        assert await drain.wait_idle(30) == 0
    assert trio.current_time() - began == pytest.approx(3)
    assert told == ["first", "late"]
    assert drain.reason == "SIGTERM"


async def test_the_grace_time_is_one_deadline_however_work_comes_and_goes(autojump_clock: MockClock) -> None:
    drain = Drain()
    drain.begin_work()
    drain.start("test")

    async def flapping() -> None:
        for _ in range(20):
            await trio.sleep(1)
            drain.end_work()
            drain.begin_work()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flapping)
        began = trio.current_time()
        assert await drain.wait_idle(5) == 1
        assert trio.current_time() - began == pytest.approx(5)
        nursery.cancel_scope.cancel()


async def test_without_work_draining_ends_at_once() -> None:
    drain = Drain()
    with drain.work():
        assert drain.open_work == 1
    drain.start("test")
    assert await drain.wait_idle(1000) == 0


async def test_the_second_signal_hurries() -> None:
    drain = Drain()
    drain.begin_work()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(drain_on_signals, drain)
            os.kill(os.getpid(), signal.SIGTERM)
            await drain.wait_started()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await drain.wait_idle(1000) == 1
            nursery.cancel_scope.cancel()
