"""Pauses between attempts at what must not be given up: following the API server, the policy controller, a status to write."""

from __future__ import annotations

import random
from collections.abc import Callable


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
