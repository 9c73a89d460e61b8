"""The timeouts and retries of one request, as its rule has them: in all, and for each attempt (GEP-1742, GEP-1731)."""

from __future__ import annotations

from collections.abc import Callable

from proxy.outbound.deadlines import Deadline, Deadlines
from proxy.routing import RuleLimits

_LONGEST_BACKOFF = 10  # the longest pause, as a multiple of the rule's backoff; each pause is twice the one before
_JITTER = 0.5  # up to this share of a pause is added at random, so that requests that failed together are not retried together


class Attempts:
    """The deadlines of one request and the retries it has left. late: called when a deadline has passed; not after `end`.

    sent_at: when it was sent to a backend for the last time; before that, when it came.
    """

    __slots__ = ("_attempt", "_deadlines", "_late", "_limits", "_retries", "_whole", "sent_at")

    def __init__(self, limits: RuleLimits, deadlines: Deadlines, late: Callable[[], None], now: float) -> None:
        self._limits = limits
        self._deadlines = deadlines
        self._late = late
        self._retries = 0
        self._attempt: Deadline | None = None
        timeouts = limits.timeouts
        self._whole = deadlines.after(timeouts.request_s, self._over) if timeouts.request_s else None
        self.sent_at = now
        if limits.retry is not None:
            self._retries = limits.retry.attempts
            limits.budget.earn()

    def sent(self, now: float) -> None:
        """It is on its way to a backend from now on."""
        self.sent_at = now
        self._drop_attempt()
        if self._limits.timeouts.attempt_s:
            self._attempt = self._deadlines.after(self._limits.timeouts.attempt_s, self._late)

    def pause_s(self, now: float) -> float | None:
        """The last attempt failed: how long to wait before the next one, None when there is none. Takes one retry from the budget."""
        retry, budget = self._limits.retry, self._limits.budget
        if retry is None or self._retries < 1 or not budget.spend(now):
            return None
        self._drop_attempt()
        grown = min(1 << (retry.attempts - self._retries), _LONGEST_BACKOFF)
        self._retries -= 1
        return retry.backoff_s * grown * (1 + _JITTER * self._limits.random())

    def end(self) -> None:
        """It is over."""
        self._drop_attempt()
        if self._whole is not None:
            self._whole.drop()

    def _over(self) -> None:
        self._retries = 0
        self._late()

    def _drop_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.drop()
