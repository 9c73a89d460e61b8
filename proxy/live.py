"""The connections that are open now, so that drain can end them in order and shutdown can wait for the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

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
        self._draining = False
        self._changed = trio.Event()

    def __len__(self) -> int:
        return len(self._links)

    def add(self, link: Link, engine: Drainable | None, closed: Callable[[], object]) -> None:
        """Count a connection until its socket is closed, then call ``closed``. engine None: nothing to tell it at drain."""
        self._links[link] = engine

        def gone() -> None:
            del self._links[link]
            self._changed.set()
            closed()

        link.on_gone = gone
        if self._draining and engine is not None:
            self._relay.later(engine.drain)

    def drain(self) -> None:
        """Tell every engine to come to an end."""
        self._draining = True
        with self._relay.batch():
            for engine in list(self._links.values()):
                if engine is not None:
                    engine.drain()

    async def wait_none(self) -> None:
        """Return when the last connection is gone. The caller bounds the time."""
        while self._links:
            self._changed = trio.Event()
            await self._changed.wait()
