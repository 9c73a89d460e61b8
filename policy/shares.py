"""What each pod's connections and subscriptions take of the controller's memory, and who must leave when all of it is taken. Pure.

A pod that asks for little is never touched because others ask for much. Beyond that whoever holds most leaves for one that holds less than
half as much, so that no number of pods keeps the others out, and no two of them take turns in driving each other out. Called by
policy.subscriptions.
"""

from __future__ import annotations

from policy.index import PodKey

_CONNECTION_BYTES = 80 * 1024  # measured: 48 KB, 73 KB with the first subscriptions and their answers
_INCLUDED = 16  # subscriptions; an ordinary sidecar has fewer
_SUBSCRIPTION_BYTES = 2048  # measured: 0.2 to 1.7 KB with its answer
_LITTLE_BYTES = 256 * 1024


def bytes_of(subscriptions: int) -> int:
    """What a connection with so many of them takes."""
    return _CONNECTION_BYTES + max(0, subscriptions - _INCLUDED) * _SUBSCRIPTION_BYTES


class Shares:
    """most: bytes that all together may take. taken: that they take now."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._of: dict[PodKey, int] = {}
        self._with_much: set[PodKey] = set()

    def change(self, pod: PodKey, by: int) -> None:
        """The pod takes so many bytes more, or fewer."""
        self.taken += by
        now = self._of.get(pod, 0) + by
        if now:
            self._of[pod] = now
        else:
            self._of.pop(pod, None)
        if now > _LITTLE_BYTES:
            self._with_much.add(pod)
        else:
            self._with_much.discard(pod)

    def who_leaves(self, pod: PodKey, more: int) -> PodKey | None:
        """Of whom a connection must be closed so that ``pod`` can have ``more`` bytes; None when it cannot."""
        most = max(self._with_much, key=self._of.__getitem__, default=None)
        return most if most is not None and self._of[most] >= 2 * (self._of.get(pod, 0) + more) else None

    def fits(self, more: int) -> bool:
        """Is there room without anybody leaving?"""
        return self.taken + more <= self.most
