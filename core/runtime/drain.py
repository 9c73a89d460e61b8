"""Ending in order: who is told, and whether to hurry.

One `Drain` belongs to a process. SIGTERM (or a POST to ``/shutdown``) starts it; from then on ``/ready`` says no, acceptors stop, and
connections tell their peers (GOAWAY, ``connection: close``). How long it waits for them is the program's affair; `hurry` ends the wait.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import trio

from core.runtime import logs

_log = logs.logger("drain")


class Drain:
    """Whether this process is ending, and whether it should hurry. All methods but ``wait_*`` are synchronous and idempotent."""

    def __init__(self) -> None:
        self.reason = ""
        self._started = trio.Event()
        self._hurried = trio.Event()
        self._listeners: dict[object, Callable[[], None]] = {}

    @property
    def started(self) -> bool:
        return self._started.is_set()

    def start(self, reason: str) -> None:
        """Begin to end: wakes everybody in `wait_started`, then calls the listeners, once. reason: for the log and ``/ready``."""
        if self.started:
            return
        self.reason = reason
        self._started.set()
        _log.info("draining", reason=reason)
        for listener in tuple(self._listeners.values()):
            listener()
        self._listeners.clear()

    def hurry(self) -> None:
        """Wait no longer for open work (a second signal)."""
        self._hurried.set()

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` when draining starts, at once if it has; it must not raise. Returns the function that ends it."""
        if self.started:
            listener()
            return lambda: None
        token = object()
        self._listeners[token] = listener
        return lambda: self._drop(token)

    def _drop(self, token: object) -> None:
        self._listeners.pop(token, None)

    async def wait_started(self) -> None:
        """Return once draining has started."""
        await self._started.wait()

    async def wait_hurried(self) -> None:
        """Return once somebody asked not to wait any longer."""
        await self._hurried.wait()


async def drain_on_signals(drain: Drain, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """SIGTERM or SIGINT starts the drain, the next one makes it hurry. Runs until cancelled; call it from the main thread's trio."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            if drain.started:
                drain.hurry()
            else:
                drain.start(signal.Signals(number).name)
