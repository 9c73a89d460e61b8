"""The connections that are open now, so that drain can end them in order and shutdown can wait for the last one.

A connection counts from accept on, while its first bytes, its handshake and its policy may still be on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from proxy.rescue import Cause, Failure
from proxy.transport.link import Link
from proxy.transport.relay import Relay


class Drainable(Protocol):
    """An engine that can finish what is under way and take nothing new."""

    def drain(self) -> None:
        """GOAWAY, or ``connection: close`` on the answer under way; idle connections close at once."""
        ...


class Live:
    """Client connections by link. Upstream connections end with them."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._links: dict[Link, Drainable | None] = {}
        self._arriving = 0
        self._silent: set[trio.CancelScope] = set()
        self._draining = False
        self._changed = trio.Event()

    @property
    def arriving(self) -> int:
        """Accepted, and neither added nor over yet."""
        return self._arriving

    def __len__(self) -> int:
        return len(self._links) + self._arriving

    def arrived(self) -> None:
        """A connection was accepted; `settled` must follow."""
        self._arriving += 1

    def settled(self) -> None:
        """It was added, or is over."""
        self._arriving -= 1
        self._changed.set()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """While a connection waits for anybody's first word. A drain ends it by Failure(DRAINING): nothing was said that could be lost."""
        with trio.CancelScope() as scope:
            self._silent.add(scope)
            if self._draining:
                scope.cancel()
            try:
                yield
            finally:
                self._silent.discard(scope)
        if scope.cancelled_caught:
            raise Failure(Cause.DRAINING, "nobody had said anything when this sidecar was told to end")

    def add(self, link: Link, engine: Drainable | None, closed: Callable[[], object]) -> None:
        """Count a connection until its socket is closed, then call ``closed``. engine None: nothing to tell it at drain.

        It may be closed already: a first write, such as of HTTP/2's settings, fails where the peer has left.
        """
        self._links[link] = engine

        def gone() -> None:
            del self._links[link]
            self._changed.set()
            closed()

        link.on_gone = gone
        if link.dead:
            self._relay.later(gone)
        if self._draining and engine is not None:
            self._relay.later(engine.drain)

    def drain(self) -> None:
        """Tell every engine to come to an end."""
        self._draining = True
        for scope in list(self._silent):
            scope.cancel()
        with self._relay.batch():
            for engine in list(self._links.values()):
                if engine is not None:
                    engine.drain()

    async def wait_none(self) -> None:
        """Return when the last connection is gone. The caller bounds the time."""
        while self._links or self._arriving:
            self._changed = trio.Event()
            await self._changed.wait()
