"""The policy controller: a source feeds the index, the index's changes wake the server. The only module here that constructs everything.

Decides nothing. Subscribers are accepted only once the source has shown its first complete state: before that every Service would look
like an address outside the mesh. Called by policy.__main__, and by tests with a source and credentials of their own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from core.credentials import Credentials
from core.k8s.source import Apply, Delete, Event, Refusal, Reset, Source
from core.runtime import logs
from core.runtime.admin import AdminServer, standard_routes
from core.runtime.drain import Drain, drain_on_signals
from core.runtime.listen import listen, trio_listener
from core.runtime.memory import settle
from core.runtime.process import most_files, most_memory
from core.runtime.watch import Cell
from policy.config import Config
from policy.diagnostics import exposition, listen_unix, routes
from policy.index import Index, IndexSettings, Key
from policy.index.report import Problem, problems_by_parts
from policy.limits import Limits
from policy.server import PolicyServer

_log = logs.logger("controller")

LAME_S = 1.0
_REPORT_EVERY_S = 5.0  # looking for conflicts is one pass over everything, so not at every change


class Listener(Protocol):
    """Hears what the controller took and found: whoever writes statuses."""

    def changed(self, events: Sequence[Event]) -> None:
        """The index has taken these events."""

    def problems(self, problems: Sequence[Problem]) -> None:
        """What the last look at everything found."""


class Controller:
    """index and server are there for diagnostics and tests."""

    def __init__(self, source: Source, settings: IndexSettings | None = None, limits: Limits | None = None) -> None:
        self.index = Index(settings)
        self.listener: Listener | None = None
        self.server = PolicyServer(self.index, limits)
        self.source = source
        self._synced = trio.Event()
        self._refused: set[str] = set()
        self._conflicts: set[str] = set()
        self._changed = False

    @property
    def synced(self) -> bool:
        """Has the source shown its first complete state?"""
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        """Until it has."""
        await self._synced.wait()

    def receive(self, events: Sequence[Event]) -> None:
        """Take a batch of events; subscribers hear of all its changes at once."""
        changed: set[Key] = set()
        for event in events:
            match event:
                case Apply(object=object_):
                    changed |= self.index.apply(object_)
                case Delete(ref=ref):
                    changed |= self.index.delete(ref)
                case Reset(group=group, kind=kind, objects=objects):
                    changed |= self.index.reset(group, kind, objects)
        self.server.changed(changed)
        self._changed = True
        if self.listener is not None:
            self.listener.changed(events)

    async def follow(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the source for ever; started with its first complete state."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._run_source)
            settle()
            self._synced.set()
            _log.info("synced", objects=len(self.index.store.objects))
            nursery.start_soon(self._report)
            task_status.started()

    async def _run_source(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self.source.run(self.receive, task_status=task_status)

    async def _report(self) -> None:
        while True:
            await trio.sleep(_REPORT_EVERY_S)
            await self.report()

    async def report(self) -> None:
        """Log every refusal and, when something changed, every conflict that was not there the last time."""
        refused = {str(refusal) for refusal in self.refusals()}
        for sentence in sorted(refused - self._refused):
            _log.error("manifest refused", detail=sentence)
        self._refused = refused
        if self._changed:
            self._changed = False
            known: set[Problem] = set()
            for few in problems_by_parts(self.index):
                known.update(few)
                await trio.lowlevel.checkpoint()
            if self.listener is not None:
                self.listener.problems(sorted(known))
            found = {f"{problem.ref}: {problem.message}" for problem in known}
            for sentence in sorted(found - self._conflicts):
                _log.warning("object without the effect it was meant to have", detail=sentence)
            self._conflicts = found

    def refusals(self) -> Sequence[Refusal]:
        """What the source refuses at present."""
        return self.source.refusals


KeepCertified = Callable[[Cell[Credentials | None]], Awaitable[None]]
"""Keeps the cell filled with our newest credentials, for ever."""


class Companion(Protocol):
    """What runs beside the controller where there is an API server: webhook, leader election, statuses."""

    def attach(self, controller: Controller) -> None:
        """Before the source runs."""

    async def run(self, controller: Controller) -> None:
        """For ever."""

    def not_ready(self) -> list[str]:
        """Why it does not do its work yet, a sentence each."""

    def exposition(self) -> bytes:
        """Its metrics."""


async def run(config: Config, source: Source, keep_certified: KeepCertified, companion: Companion | None = None) -> None:
    """Serve until SIGTERM. Raises CannotListen and OSError when a socket cannot be had."""
    controller = Controller(source, config.index, Limits.of_process(most_memory(), most_files()))
    if companion is not None:
        companion.attach(controller)
    credentials: Cell[Credentials | None] = Cell(None)
    drain = Drain()

    def not_ready() -> list[str]:
        reasons = [f"draining: {drain.reason}"] if drain.started else []
        reasons += [] if credentials.value else ["no certificate yet"]
        reasons += [] if controller.synced else ["the first complete state of the source is missing", *source.waiting]
        return reasons + (companion.not_ready() if companion else [])

    def metrics() -> bytes:
        own = exposition(controller.index, controller.server.counters, controller.refusals())
        return own + (companion.exposition() if companion else b"")

    public = standard_routes(not_ready=not_ready, metrics=metrics, shutdown=drain.start)
    policy_socket, admin_socket = listen(config.listen), listen(config.admin_listen)
    async with trio.open_nursery() as nursery:
        await nursery.start(drain_on_signals, drain)
        await nursery.start(AdminServer(public).serve, [trio_listener(admin_socket)])
        if config.diagnostics_socket:
            private = AdminServer({**public, **routes(controller.index, controller.refusals)})
            await nursery.start(private.serve, [listen_unix(config.diagnostics_socket)])
        nursery.start_soon(keep_certified, credentials)
        if companion is not None:
            nursery.start_soon(companion.run, controller)
        await nursery.start(_until_drained, controller, credentials, drain, nursery.cancel_scope, LAME_S if companion else 0.0)
        _log.info("serving", listen=str(config.listen), identity=config.identity.uri)
        await controller.server.serve([trio_listener(policy_socket)], credentials)


async def _until_drained(
    controller: Controller,
    credentials: Cell[Credentials | None],
    drain: Drain,
    scope: trio.CancelScope,
    lame_s: float,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Started when there is something to serve; a drain ends the process at once, because sidecars keep what they know.

    lame_s: but for this long, because an API server still has our webhook's address for a moment after we said that we are not ready.
    """
    async with trio.open_nursery() as nursery:

        async def wait_drain() -> None:
            await drain.wait_started()
            with trio.move_on_after(lame_s):
                await drain.wait_hurried()
            scope.cancel()

        nursery.start_soon(wait_drain)
        await nursery.start(controller.follow)
        await credentials.wait_for(lambda value: value is not None)
        task_status.started()
