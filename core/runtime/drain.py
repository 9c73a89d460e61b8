"""Ending in order: who is told first, what is waited for, and for how long.

One `Drain` belongs to a process. SIGTERM (or a POST to ``/shutdown``) starts it; from then on ``/ready`` says no, acceptors stop, and
connections tell their peers (GOAWAY, ``connection: close``). The process ends when no work is left or the grace time is over.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from core.runtime import logs

_log = logs.logger("drain")


class Drain:
    """Whether this process is ending, and how much work is left. All methods but ``wait_*`` are synchronous and idempotent.

    work: what must be finished before the process may go (a connection, usually).
    """

    def __init__(self) -> None:
        self.reason = ""
        self.open_work = 0
        self._started = trio.Event()
        self._hurried = trio.Event()
        self._idle = trio.Event()
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
        _log.info("draining", reason=reason, open_work=self.open_work)
        for listener in tuple(self._listeners.values()):
            listener()
        self._listeners.clear()
        self._note_idle()

    def hurry(self) -> None:
        """Wait no longer for open work (a second signal)."""
        self._hurried.set()
        self._idle.set()

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

    def begin_work(self) -> None:
        """Count a piece of work; it must be ended by exactly one `end_work`."""
        self.open_work += 1

    def end_work(self) -> None:
        """The piece of work is done."""
        self.open_work -= 1
        self._note_idle()

    @contextmanager
    def work(self) -> Iterator[None]:
        """`begin_work` and `end_work` around a block."""
        self.begin_work()
        try:
            yield
        finally:
            self.end_work()

    def _note_idle(self) -> None:
        if self.open_work <= 0 and self.started:
            self._idle.set()

    async def wait_started(self) -> None:
        """Return once draining has started."""
        await self._started.wait()

    async def wait_hurried(self) -> None:
        """Return once somebody asked not to wait any longer."""
        await self._hurried.wait()

    async def wait_idle(self, grace_s: float) -> int:
        """Once started, wait until no work is left, at most ``grace_s`` seconds or until `hurry`; returns how much is left."""
        await self._started.wait()
        with trio.move_on_after(grace_s):
            while self.open_work > 0 and not self._hurried.is_set():
                self._idle = trio.Event()
                await self._idle.wait()
        if self.open_work:
            _log.warning("work left when the grace time was over", open_work=self.open_work, grace_s=grace_s)
        return self.open_work


async def drain_on_signals(drain: Drain, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """SIGTERM or SIGINT starts the drain, the next one makes it hurry. Runs until cancelled; call it from the main thread's trio."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            if drain.started:
                drain.hurry()
            else:
                drain.start(signal.Signals(number).name)
