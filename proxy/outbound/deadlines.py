"""Deadlines of requests: calls that are due at a time, and nearly always dropped before then, because the request has ended.

Theory of operation. Few durations are in use, one or two for each rule that has a timeout, and deadlines of one duration come due in the
order in which they were set. So there is a queue for each duration, and setting and dropping a deadline are one dictionary operation
each. One task sleeps until the earliest is due. It is woken only for a deadline before that, which under load there is not: what was set
and dropped in between left the task asleep.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import trio

from proxy.transport.relay import Relay


class Deadline:
    """One call that is due at a time."""

    __slots__ = ("_call", "_queue", "at")

    def __init__(self, at: float, call: Callable[[], None], queue: dict[Deadline, None]) -> None:
        self.at = at
        self._call = call
        self._queue = queue
        queue[self] = None

    def drop(self) -> None:
        """It is not needed any more: the call is not made, even if it is due in this very pass. Idempotent."""
        self._queue.pop(self, None)
        self._call = _nothing

    def run(self) -> None:
        """It is due."""
        self._call()


class Deadlines:
    """All deadlines of a process. Due calls run as a batch of the relay's, so they may call engines."""

    def __init__(self, relay: Relay, nursery: trio.Nursery, now: Callable[[], float]) -> None:
        self._relay = relay
        self._nursery = nursery
        self._now = now
        self._queues: dict[float, dict[Deadline, None]] = {}
        self._until: float | None = None  # when the task looks again; None: there is no task yet
        self._earlier = trio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def after(self, seconds: float, call: Callable[[], None]) -> Deadline:
        """Run ``call`` so many seconds from now."""
        queue = self._queues.get(seconds)
        if queue is None:
            queue = self._queues[seconds] = {}
        deadline = Deadline(self._now() + seconds, call, queue)
        if self._until is None:
            self._until = deadline.at
            self._nursery.start_soon(self._keep)
        elif deadline.at < self._until:
            self._earlier.set()
        return deadline

    async def _keep(self) -> None:
        while True:
            self._until = self._run_due()
            self._earlier = trio.Event()
            with trio.move_on_after(max(self._until - self._now(), 0)):
                await self._earlier.wait()

    def _run_due(self) -> float:
        """Run what is due; returns when the next one is."""
        now = self._now()
        with self._relay.batch():
            for seconds, queue in list(self._queues.items()):
                while queue:
                    first = next(iter(queue))
                    if first.at > now:
                        break
                    del queue[first]
                    self._relay.later(first.run)
                if not queue:
                    del self._queues[seconds]
        return min((next(iter(queue)).at for queue in self._queues.values()), default=inf)


def _nothing() -> None: ...
