"""A process ends in order."""

from __future__ import annotations

import os
import signal

import trio

from core.runtime.drain import Drain, drain_on_signals


def test_draining_tells_every_listener_once() -> None:
    drain, told = Drain(), []
    drain.subscribe(lambda: told.append("first"))
    unsubscribe = drain.subscribe(lambda: told.append("never"))
    unsubscribe()
    assert not drain.started
    drain.start("SIGTERM")
    drain.start("again")
    drain.subscribe(lambda: told.append("late"))
    assert told == ["first", "late"]
    assert drain.started and drain.reason == "SIGTERM"


async def test_the_second_signal_hurries() -> None:
    drain = Drain()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(drain_on_signals, drain)
            os.kill(os.getpid(), signal.SIGTERM)
            await drain.wait_started()
            os.kill(os.getpid(), signal.SIGTERM)
            await drain.wait_hurried()
            nursery.cancel_scope.cancel()
    assert drain.reason == "SIGTERM"
