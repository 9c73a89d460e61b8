"""How many retries a rule may add to its traffic: a share of its requests, and a few a second besides.

Without a bound, retries would multiply the load of a backend that fails because of its load. The numbers are those of Linkerd's retry
budget and of the Gateway API's (GEP-3388). Pure: time is an argument.
"""

from __future__ import annotations

_SHARE = 0.2  # retries for each request
_PER_S = 10.0  # retries a second that need no requests: where few are made, the share would allow none
_MEMORY_S = 10.0  # how long what was not used is remembered


class RetryBudget:
    """The retries that one rule has left."""

    __slots__ = ("_left", "_seen")

    def __init__(self, now: float) -> None:
        self._left = _PER_S * _MEMORY_S
        self._seen = now

    def earn(self) -> None:
        """A request was made."""
        self._left += _SHARE

    def spend(self, now: float) -> bool:
        """Whether one more retry is within the budget; then it is taken from it. What is earned beyond the bound is lost here."""
        self._left = min(self._left + (now - self._seen) * _PER_S, _PER_S * _MEMORY_S)
        self._seen = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
