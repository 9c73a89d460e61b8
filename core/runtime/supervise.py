"""Keeping long-lived tasks alive: a task that fails is logged and started again, after a pause that grows.

For tasks whose failure must not end the process (following policy, renewing certificates). A task whose failure must end it is started
in a nursery as usual. Programs call this from their app module.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import trio

from core.runtime import logs

_log = logs.logger("supervise")


class Backoff:
    """Pauses that double from ``first_s`` to ``most_s``, each cut by up to half at random so that a fleet does not return at once.

    draw: returns a number in [0, 1).
    """

    def __init__(self, first_s: float = 0.1, most_s: float = 30.0, draw: Callable[[], float] = random.random) -> None:
        self.first_s = first_s
        self.most_s = most_s
        self._draw = draw
        self._next_s = first_s

    def next_s(self) -> float:
        """The pause to make now, in seconds."""
        pause = self._next_s
        self._next_s = min(pause * 2, self.most_s)
        return pause * (1 - self._draw() / 2)

    def reset(self) -> None:
        """Things went well: begin with ``first_s`` again."""
        self._next_s = self.first_s


async def keep_running(name: str, run: Callable[[], Awaitable[object]], backoff: Backoff | None = None) -> None:
    """Run ``run`` until it returns; when it raises an Exception, log it and run it again after a pause.

    A run that lasted longer than the longest pause counts as success and resets the pause. Cancellation passes, at once, and leaves
    nothing behind. An ExceptionGroup restarts too; one that holds more than Exceptions (KeyboardInterrupt) passes.
    """
    pauses = backoff or Backoff()
    while True:
        started = trio.current_time()
        try:
            await run()
            return
        except Exception as error:
            if trio.current_time() - started > pauses.most_s:
                pauses.reset()
            pause_s = pauses.next_s()
            _log.error("task failed, will be started again", task=name, pause_s=round(pause_s, 3), error=_told(error), exc_info=error)
        await trio.sleep(pause_s)


def _told(error: BaseException) -> str:
    """The first cause: an ExceptionGroup's own text says only how many there are."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
