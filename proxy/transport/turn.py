"""When the relay gets its turn: where trio would sleep.

Theory of operation. The relay has an epoll of its own. Watched by a trio task, every wake-up costs two more system calls (trio's
epoll_wait, and epoll_ctl to arm its one-shot watch again) and a pass through the scheduler; with one busy connection that is most of
what the relay does. So the roles are swapped: trio's epoll becomes one more descriptor in the relay's, and the relay waits in the moment
in which trio is about to wait, through trio's public instrument hook ``before_io_wait(timeout)``. It carries connections until trio
itself has something to do: its epoll is readable, the timeout is over, or a call into an engine made a task runnable. Then it returns
and trio goes on as always. Tasks never wait longer than one pass, and the relay never waits for a task that does not exist.

Two things are not public in trio: its epoll's descriptor, and whether a task is runnable. Where they cannot be found (another
trio, another poller), `turns` says so and the relay is watched by a task instead: same behaviour, more system calls.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import trio

Events = list[tuple[int, int]]


class Turn(trio.abc.Instrument):
    """Carries connections while trio would sleep. An exception in ``carry`` ends the turns and is handed to ``failed``, once."""

    def __init__(self, epoll: select.epoll, carry: Callable[[Events], None], most: int, failed: Callable[[BaseException], None]) -> None:
        self._epoll = epoll
        self._carry = carry
        self._most = most
        self._failed = failed
        self._token = trio.lowlevel.current_trio_token()
        self._trio_fd, self._runnable, self._waiting_for_idle = _internals()
        epoll.register(self._trio_fd, select.EPOLLIN)
        trio.lowlevel.add_instrument(self)

    def close(self) -> None:
        """No more turns."""
        trio.lowlevel.remove_instrument(self)
        _taken.set(False)

    def before_io_wait(self, timeout: float) -> None:
        """See trio.abc.Instrument."""
        try:
            self._take_turn(timeout)
        except BaseException as error:  # trio would only log it and go on without us: nothing would carry the connections
            self._token.run_sync_soon(self._failed, error)

    def _take_turn(self, timeout: float) -> None:
        poll, carry, runnable, trio_fd, most = self._epoll.poll, self._carry, self._runnable, self._trio_fd, self._most
        if timeout <= 0 or self._waiting_for_idle:
            carry([event for event in poll(0, most) if event[0] != trio_fd])
            return
        end = time.monotonic() + timeout
        remaining = timeout
        while True:
            events = poll(min(remaining, _POLL_MAX_S), most)
            for event in events:
                if event[0] == trio_fd:
                    events.remove(event)
                    carry(events)
                    return
            carry(events)
            remaining = end - time.monotonic()
            if runnable or remaining <= 0:
                # trio had decided to sleep before it called us. Without this it would, although there is a task to run or a deadline.
                self._token.run_sync_soon(_nothing)
                return


_POLL_MAX_S = 3600.0  # epoll takes milliseconds in an int


def _nothing() -> None: ...


def _internals() -> tuple[int, deque[Any], Any]:
    """trio's epoll descriptor, its queue of runnable tasks, and the tasks that wait until all others are blocked.

    The last are tests with a virtual clock, which we must not disturb by waking trio. Raises LookupError when this trio has no such
    things.
    """
    try:
        runner: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        fd, runnable, waiting = runner.io_manager._epoll.fileno(), runner.runq, runner.waiting_for_idle
    except AttributeError as error:
        raise LookupError(f"trio keeps its poller elsewhere: {error}") from None
    if not isinstance(fd, int) or not isinstance(runnable, deque):
        raise LookupError("trio's poller is not what it was")
    return fd, runnable, waiting


_taken: trio.lowlevel.RunVar[bool] = trio.lowlevel.RunVar("a relay takes turns", False)


def turns(epoll: select.epoll, carry: Callable[[Events], None], most: int, failed: Callable[[BaseException], None]) -> Turn | None:
    """Take turns from now on, or None where this trio does not allow it.

    One relay of a trio run takes turns: while it waits for its own connections and for trio, it does not see those of another relay (two
    sidecars in one process, in tests), which is therefore watched by trio.
    """
    if _taken.get():
        return None
    try:
        turn = Turn(epoll, carry, most, failed)
    except LookupError:
        return None
    _taken.set(True)
    return turn
