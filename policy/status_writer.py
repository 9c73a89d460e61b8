"""Keeps the status of routes and of our own kinds equal to what the controller does with them; of several replicas only the leader writes.

Moves what policy.status wants. A write names the version it is based on: when somebody else was faster, the newer version arrives by
the watch and is looked at again, so nobody's entry is ever overwritten unseen. Called by policy.cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import trio

from core.k8s.api import Api, object_path
from core.k8s.errors import ApiError, Conflict, NotFound
from core.k8s.source import Apply, Delete, Event, Reset
from core.refs import Ref
from core.runtime import logs
from core.runtime.backoff import Backoff
from core.runtime.watch import Cell
from policy.index import Index
from policy.index.report import Problem
from policy.model import GATEWAY_GROUP, GROUP
from policy.status import Stored, read_stored, wanted

_log = logs.logger("status")

_GATHER_S = 0.5  # changes come in bursts: one look for all of them
_PLURALS = {
    "Server": "servers",
    "AuthorizationPolicy": "authorizationpolicies",
    "MeshTLSAuthentication": "meshtlsauthentications",
    "NetworkAuthentication": "networkauthentications",
    "HTTPRoute": "httproutes",
    "GRPCRoute": "grpcroutes",
}


class StatusWriter:
    """An Observer of the source (core.k8s.apiserver). refusals: by object, why its newest version was not understood."""

    def __init__(
        self,
        api: Api,
        index: Index,
        refusals: Callable[[], Mapping[Ref, str]],
        leads: Callable[[], bool],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.written = 0
        self.failed = 0
        self._api = api
        self._index = index
        self._refusals = refusals
        self._leads = leads
        self._clock = clock
        self._stored: dict[Ref, Stored] = {}
        self._due: dict[Ref, None] = {}
        self._problems: dict[Ref, list[Problem]] = {}
        self._wake = trio.Event()

    def seen(self, ref: Ref, raw: dict[str, Any]) -> None:
        """The newest version of an object of any kind; others than ours are passed over."""
        if ref.kind in _PLURALS and ref.group in (GROUP, GATEWAY_GROUP):
            self._stored[ref] = read_stored(ref, raw)
            self._mark((ref,))

    def gone(self, ref: Ref) -> None:
        """The object does not exist any more."""
        self._stored.pop(ref, None)
        self._due.pop(ref, None)

    def changed(self, events: Iterable[Event]) -> None:
        """The index has taken these: look at every object whose status may speak of them."""
        for event in events:
            match event:
                case Apply(object=object_):
                    self._mark(self._related(object_.ref))
                case Delete(ref=ref):
                    self._mark(self._related(ref))
                case Reset(group=group, kind=kind):
                    if kind == "Service" or group in (GROUP, GATEWAY_GROUP):
                        self._mark(self._stored)

    def _related(self, ref: Ref) -> Iterable[Ref]:
        if ref.kind in ("MeshTLSAuthentication", "NetworkAuthentication"):
            return list(self._index.store.policies_by_required.get(ref, ()))
        if ref.kind in ("Server", "HTTPRoute", "GRPCRoute"):
            return [other for other in self._stored if other.namespace == ref.namespace]
        if (ref.group, ref.kind) == ("", "Service"):
            return [other for other in self._stored if other.group == GATEWAY_GROUP]
        return ()

    def problems(self, problems: Iterable[Problem]) -> None:
        """What the controller found in its last look at everything."""
        found: dict[Ref, list[Problem]] = {}
        for problem in problems:
            found.setdefault(problem.ref, []).append(problem)
        changed = {ref for ref in found.keys() | self._problems.keys() if found.get(ref) != self._problems.get(ref)}
        self._problems = found
        self._mark(ref for ref in changed if ref in self._stored)

    def _mark(self, refs: Iterable[Ref]) -> None:
        self._due.update(dict.fromkeys(refs))
        if self._due:
            self._wake.set()

    async def run(self, leader: Cell[bool]) -> None:
        """For ever: write while we lead; a new leader looks at everything."""
        backoff = Backoff(0.5, 60.0)
        while True:
            await leader.wait_for(bool)
            self._mark(self._stored)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, backoff)
                await leader.wait_for(lambda leads: not leads)
                nursery.cancel_scope.cancel()

    async def _write(self, backoff: Backoff) -> None:
        while True:
            await self._wake.wait()
            await trio.sleep(_GATHER_S)
            self._wake = trio.Event()
            due, self._due = self._due, {}
            refusals = self._refusals()
            for number, ref in enumerate(due):
                if number % 50 == 49:
                    await trio.lowlevel.checkpoint()
                try:
                    await self._write_one(ref, refusals.get(ref, ""))
                    backoff.reset()
                except ApiError as error:
                    self.failed += 1
                    pause_s = backoff.next_s()
                    _log.warning("status not written", object=str(ref), reason=str(error), pause_s=round(pause_s, 1))
                    self._mark((ref,))
                    await trio.sleep(pause_s)

    async def _write_one(self, ref: Ref, refused: str) -> None:
        stored = self._stored.get(ref)
        if stored is None or not self._leads():
            return
        now = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        status = wanted(self._index, stored, refused, self._problems.get(ref, ()), now)
        if status is None:
            return
        path = object_path(ref.group, stored.api_version.rpartition("/")[2], _PLURALS[ref.kind], ref.namespace, ref.name, "status")
        try:
            await self._api.patch(path, {"metadata": {"resourceVersion": stored.resource_version}, "status": status})
        except (Conflict, NotFound):
            return  # the newer version, or the deletion, is on its way to us
        self.written += 1
        _log.debug("status written", object=str(ref))
