"""Slots for connections, shared fairly: when all are taken, the client that holds most loses its oldest connection to a newcomer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Full(Exception):
    """There is no room, and no client holds so many connections that one of them is cut."""


class Rooms:
    """most: connections in all. When they are reached, the oldest connection of the client that holds most is cut, unless that client has
    no more than ``few``: a crowd of honest clients must not cut each other. most_of_one: of one client, whose oldest is cut for its next.
    """

    def __init__(self, most: int, most_of_one: int, few: int = 0) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._few = few
        self._opened = 0
        self._open: dict[int, tuple[str, trio.CancelScope]] = {}
        self._held: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def one(self, ip: str) -> Iterator[trio.CancelScope]:
        """Room for a connection of this client. Its scope, and so the block, is cancelled when it must leave. Raises Full."""
        if self._held[ip] >= self._most_of_one:
            self._cut_oldest(ip)
        elif len(self._open) >= self._most:
            greedy = max(self._held, key=self._held.__getitem__)
            if self._held[greedy] <= self._few:
                raise Full
            self._cut_oldest(greedy)
        self._opened += 1
        number = self._opened
        with trio.CancelScope() as scope:
            self._open[number] = ip, scope
            self._held[ip] += 1
            try:
                yield scope
            finally:
                if number in self._open:
                    self._forget(number)

    def _cut_oldest(self, ip: str) -> None:
        oldest = next(number for number, (holder, _) in self._open.items() if holder == ip)
        self._forget(oldest).cancel()

    def _forget(self, number: int) -> trio.CancelScope:
        ip, scope = self._open.pop(number)
        self._held[ip] -= 1
        if not self._held[ip]:
            del self._held[ip]
        return scope
