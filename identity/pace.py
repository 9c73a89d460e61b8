"""How many certificates a pod gets in a minute, so that one that asks without end takes no time of others and fills no log. Pure.

Called by `service`, with the clock of its caller.
"""

from __future__ import annotations

from collections import OrderedDict

_MINUTE_S = 60.0


class Pace:
    """most: in a minute. pods: how many are remembered; beyond that the ones forgotten first are those that asked first."""

    def __init__(self, most: int, pods: int) -> None:
        self._most = most
        self._pods = pods
        self._asked: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def wait_s(self, pod: str, now: float) -> float:
        """How long it has to wait for the next one; 0 when it may have one now."""
        since, count = self._asked.get(pod, (now, 0))
        return max(0.0, since + _MINUTE_S - now) if count >= self._most else 0.0

    def had_one(self, pod: str, now: float) -> None:
        """It was given one more."""
        since, count = self._asked.get(pod, (now, 0))
        if now >= since + _MINUTE_S:
            since, count = now, 0
            self._asked.pop(pod, None)
        self._asked[pod] = since, count + 1
        while len(self._asked) > self._pods:
            self._asked.popitem(last=False)
