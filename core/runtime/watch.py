"""A cell that holds the latest value of something and lets any number of trio tasks wait for the next one.

Values are replaced, never mutated. A slow reader misses intermediate values and sees the newest: that is the point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Cell(Generic[T]):
    """The latest value of something. Reading is synchronous and free; `wait_newer` parks until the value was replaced."""

    def __init__(self, value: T) -> None:
        self.value = value
        self.version = 0
        self._parked = trio.lowlevel.ParkingLot()
        self._listeners: list[Callable[[T], None]] = []

    def set(self, value: T) -> None:
        """Replace the value and wake everybody, even when the new value equals the old one."""
        self.value = value
        self.version += 1
        for listener in tuple(self._listeners):
            listener(value)
        self._parked.unpark_all()

    def subscribe(self, listener: Callable[[T], None]) -> Callable[[], None]:
        """Call ``listener`` synchronously at every `set`; returns the function that ends it. For code that runs outside tasks."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def wait_newer(self, version: int) -> int:
        """Return the current version as soon as it differs from ``version`` (at once if it already does)."""
        while self.version == version:
            await self._parked.park()
        return self.version

    async def wait_for(self, accepts: Callable[[T], bool]) -> T:
        """Return the first value, the present one included, for which ``accepts`` is true."""
        while not accepts(self.value):
            await self._parked.park()
        return self.value
