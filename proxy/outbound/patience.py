"""How long a request may take by the rule that sent it on its way: in all, and for each time it is sent to a backend."""

from __future__ import annotations

from collections.abc import Callable

from policy.wire import Timeouts
from proxy.outbound.deadlines import Deadline, Deadlines


class Patience:
    """The deadlines of one request. late: called when one of them has passed; not after `end`."""

    __slots__ = ("_attempt", "_deadlines", "_late", "_timeouts", "_whole")

    def __init__(self, timeouts: Timeouts, deadlines: Deadlines, late: Callable[[], None]) -> None:
        self._timeouts = timeouts
        self._deadlines = deadlines
        self._late = late
        self._attempt: Deadline | None = None
        self._whole = deadlines.after(timeouts.request_s, late) if timeouts.request_s else None

    def sent(self) -> None:
        """It is on its way to a backend from now on."""
        if self._attempt is not None:
            self._attempt.drop()
        if self._timeouts.attempt_s:
            self._attempt = self._deadlines.after(self._timeouts.attempt_s, self._late)

    def end(self) -> None:
        """It is over."""
        for deadline in (self._whole, self._attempt):
            if deadline is not None:
                deadline.drop()
