"""Limits the log lines of one kind in a second: what strangers can cause must not become a flood of writes. No clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LINES_PER_S = 20
"""Of one kind of event."""


class Throttle:
    """Lets at most so many lines of one kind through in a second, and says how many it held back with the next one it lets through.

    now: seconds of any clock. Kinds are remembered: they must be few, and never what a peer sent.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._windows: dict[str, tuple[int, int, int]] = {}

    def pass_(self, kind: str) -> int | None:
        """None: hold this line back. A number: write it, and mention that so many were held back before."""
        second = int(self._now())
        window, count, held = self._windows.get(kind, (second, 0, 0))
        if window == second and count >= LINES_PER_S:
            self._windows[kind] = (window, count, held + 1)
            return None
        self._windows[kind] = (second, 1 if window != second else count + 1, 0)
        return held

    def say(self, write: Callable[..., object], kind: str, event: str, **fields: Any) -> None:
        """``write(event, **fields)`` if a line of this kind may pass, with ``held_back`` when others did not."""
        held = self.pass_(kind)
        if held is not None:
            write(event, **fields, **({"held_back": held} if held else {}))
