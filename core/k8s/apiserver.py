"""The API server as a source of API objects: one list and watch per kind, begun again whenever they end.

Decides which version of an object is in force; what an object means is for whoever parses. Says the same three things as the folder
source (core.k8s.source). Used by the policy controller; other components follow single kinds with `Follower`.

Rules. A list replaces everything (Reset); a watch continues it; a watch that ends is continued from its last version; 410 means a new list.
While the API server is away the last state stays, and pauses grow with jitter. A version that is refused changes nothing: the last good
one stays. A kind that is not served is tried in its next API version; one that may be absent then counts as empty, and is asked for
again; one that was there must be found absent twice before its objects are, because an API server that starts may say 404 for a moment.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from core.k8s.api import Api, object_path
from core.k8s.errors import ApiError, Forbidden, Gone, NotFound, Unavailable
from core.k8s.fields import InvalidObject
from core.k8s.objects import Object
from core.k8s.source import Apply, Delete, Event, Parse, Refusal, Reset, Started
from core.k8s.watch import Watch
from core.refs import Ref
from core.runtime import logs
from core.runtime.backoff import Backoff

_log = logs.logger("apiserver")

_RESYNC_S = 1800.0  # a full list this often heals whatever a watch may have missed
_SETTLED_S = 10.0  # a list and watch that lived this long makes the next pause short again
_AWAY_S = 5.0  # the longest pause while nobody answers. Asking costs nothing then, and new pods wait for us once the API server is back
_ABSENT_S = 10.0  # how often a kind that is not served is asked for
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"  # a copy of the object inside the object


@dataclass(frozen=True)
class Resource:
    """A kind and how to list it. versions: served ones, best first. install: what brings it when it is absent; "" for built-in kinds.

    optional: without it there simply are no such objects; otherwise the source is not complete until it is there.
    field_selector: only these, such as ``metadata.name=x``; RBAC by name then suffices for list and watch.
    """

    group: str
    kind: str
    plural: str
    versions: tuple[str, ...] = ("v1",)
    install: str = ""
    optional: bool = False
    field_selector: str = ""

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


@dataclass
class Counters:
    """For metrics. connected: a watch is open at this moment."""

    lists: int = 0
    events: int = 0
    failures: int = 0
    connected: bool = False


class Observer(Protocol):
    """Sees objects as they came, good or refused: what a status writer needs and the index does not."""

    def seen(self, ref: Ref, raw: dict[str, Any]) -> None:
        """The newest version of an object."""

    def gone(self, ref: Ref) -> None:
        """The object does not exist any more."""


Emit = Callable[[Sequence[Event]], None]


@dataclass
class Follower:
    """One kind, listed and watched for ever. known: what is in force. waiting: why there was no complete list yet, "" afterwards."""

    api: Api
    resource: Resource
    parse: Parse
    emit: Emit
    observer: Observer | None = None
    known: dict[Ref, Object] = field(default_factory=dict)
    refusals: dict[Ref | None, Refusal] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    waiting: str = "not listed yet"

    def __post_init__(self) -> None:
        self._version = ""  # from which a watch goes on; "" = a list is needed
        self._list_by = 0.0
        self._path = ""
        self._present: set[Ref] = set()
        self._misses = 0
        self._synced = trio.Event()

    async def wait_synced(self) -> None:
        """Until the first complete list was emitted, or it is certain that there is nothing to list."""
        await self._synced.wait()

    async def run(self) -> None:
        """For ever; never raises for what an API server does."""
        # two, so that pauses which grew while nobody answered do not delay what the first answer refuses for a moment
        backoff, away = Backoff(0.2, 30.0), Backoff(0.2, _AWAY_S)
        while True:
            started = trio.current_time()
            try:
                if not self._version or trio.current_time() >= self._list_by:
                    await self._list()
                await self._watch()
                failure: ApiError | None = None
            except ApiError as error:
                failure = error
                self.counters.failures += 1
            pause = self._pause(failure, backoff, away, trio.current_time() - started)
            await trio.sleep(pause)

    def _pause(self, failure: ApiError | None, backoff: Backoff, away: Backoff, lasted_s: float) -> float:
        """How long to wait before the next attempt, and what to say about this one."""
        unanswered = isinstance(failure, Unavailable) and not failure.status
        if not unanswered or lasted_s > _SETTLED_S:
            away.reset()
        if lasted_s > _SETTLED_S:
            backoff.reset()
            if failure is None:
                return 0.0
        if isinstance(failure, Gone):
            self._version = ""
            _log.info("too far behind, listing again", kind=str(self.resource))
            return backoff.next_s()
        if isinstance(failure, NotFound) and failure.unknown_kind:
            self._absent()
            return _ABSENT_S * (0.5 + random.random() / 2)
        pause = away.next_s() if unanswered else backoff.next_s()
        if isinstance(failure, Unavailable):
            pause = max(pause, failure.retry_after_s)
        if failure is not None:
            self._tell(failure, pause)
        return pause

    def _tell(self, failure: ApiError, pause_s: float) -> None:
        step = "; the ServiceAccount needs list and watch on it (ClusterRole)" if isinstance(failure, Forbidden) else ""
        if not self._synced.is_set():
            self.waiting = f"{failure.message}{step}"
        _log.warning("watch interrupted, what is known stays in force", kind=str(self.resource), reason=f"{failure}{step}", pause_s=pause_s)

    # --- list --------------------------------------------------------------------------------------------------------------

    async def _list(self) -> None:
        resource, missing = self.resource, None
        for version in resource.versions:
            path = object_path(resource.group, version, resource.plural)
            try:
                listing = await self.api.list(path, field_selector=resource.field_selector, each=self._listed)
            except NotFound as error:
                if not error.unknown_kind:
                    raise
                missing = error
                continue
            self._path, self._version = path, listing.resource_version
            self._replace(dict(item for item in listing.items if item is not None))
            return
        assert missing is not None
        raise missing

    def _listed(self, raw: dict[str, Any]) -> tuple[Ref, Object | None] | None:
        ref = self._ref(raw)
        return None if ref is None else (ref, self._read(ref, raw))

    def _replace(self, listed: Mapping[Ref, Object | None]) -> None:
        self.counters.lists += 1
        self._misses = 0
        for ref in self._present - listed.keys():
            self._forget(ref)
        self._present = set(listed)
        self.known = {ref: object_ for ref, object_ in listed.items() if object_ is not None}
        self.refusals.pop(None, None)
        self._list_by = trio.current_time() + _RESYNC_S * (0.8 + random.random() * 0.4)
        self._complete(tuple(self.known.values()))

    def _complete(self, objects: tuple[Object, ...]) -> None:
        self.emit([Reset(self.resource.group, self.resource.kind, objects)])
        self.waiting = ""
        self._synced.set()

    def _absent(self) -> None:
        """The API server does not serve the kind in any version."""
        resource = self.resource
        self._version, self._misses = "", self._misses + 1
        sentence = f"the API server does not serve {resource} ({', '.join(resource.versions)})" + (
            f"; {resource.install}" if resource.install else ""
        )
        if None not in self.refusals:
            _log.warning("kind not installed", kind=str(resource), next_step=resource.install)
            self.refusals[None] = Refusal(str(resource), None, sentence, kept=bool(self.known))
        if not self._synced.is_set() and not resource.optional:
            self.waiting = sentence
        elif not self._synced.is_set() or (self._misses > 1 and self._present):
            for ref in self._present:
                self._forget(ref)
            self._present, self.known = set(), {}
            self._complete(())

    # --- watch -------------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Until the server ends the watch or a resync is due."""
        watch = self.api.watch(self._path, self._version, field_selector=self.resource.field_selector)
        try:
            with trio.move_on_at(self._list_by):
                await watch.start()
                self.counters.connected = True
                await self._follow(watch)
        finally:
            self.counters.connected = False
            if self._version:
                self._version = watch.resource_version
            await watch.aclose()

    async def _follow(self, watch: Watch) -> None:
        async for change in watch:
            self.counters.events += 1
            ref = self._ref(change.object)
            if ref is None:
                continue
            if change.type == "DELETED":
                self._present.discard(ref)
                self._forget(ref)
                if self.known.pop(ref, None) is not None:
                    self.emit([Delete(ref)])
                continue
            self._present.add(ref)
            before = self.known.get(ref)
            object_ = self._read(ref, change.object)
            if object_ is not None and object_ is not before:
                self.known[ref] = object_
                self.emit([Apply(object_)])

    # --- objects -----------------------------------------------------------------------------------------------------------

    def _ref(self, raw: Mapping[str, Any]) -> Ref | None:
        metadata = raw.get("metadata")
        if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
            return None
        namespace = metadata.get("namespace")
        return Ref(self.resource.group, self.resource.kind, namespace if isinstance(namespace, str) else "", metadata["name"])

    def _read(self, ref: Ref, raw: dict[str, Any]) -> Object | None:
        """What is in force of the object now: this version, the last good one, or nothing."""
        annotations = raw["metadata"].get("annotations")
        if isinstance(annotations, dict):
            annotations.pop(_LAST_APPLIED, None)
        if self.observer is not None:
            self.observer.seen(ref, raw)
        before = self.known.get(ref)
        try:
            parsed = self.parse(raw)
        except InvalidObject as error:
            self.refusals[ref] = Refusal(f"API server, {self.resource}", ref, str(error), kept=before is not None)
            return before if before is not None else error.instead
        self.refusals.pop(ref, None)
        return before if before is not None and before == parsed else parsed

    def _forget(self, ref: Ref) -> None:
        self.refusals.pop(ref, None)
        if self.observer is not None:
            self.observer.gone(ref)


class ApiServerSource:
    """Satisfies core.k8s.source.Source with one Follower a kind."""

    def __init__(self, api: Api, resources: Sequence[Resource], parse: Parse, observer: Observer | None = None) -> None:
        self._emit: Emit | None = None
        self.followers = [Follower(api, resource, parse, self._forward, observer) for resource in resources]

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What is refused at present, kinds that are not installed among it."""
        return [refusal for follower in self.followers for refusal in follower.refusals.values()]

    @property
    def waiting(self) -> Sequence[str]:
        """Why the first complete state is not there yet: a sentence for each kind, none afterwards."""
        return [f"{follower.resource}: {follower.waiting}" for follower in self.followers if follower.waiting]

    def metrics(self) -> Iterator[tuple[str, Counters]]:
        """Counters by the name of the kind."""
        for follower in self.followers:
            yield follower.resource.plural, follower.counters

    async def run(self, emit: Emit, *, task_status: Started) -> None:
        """Follow every kind for ever; started when each of them was complete once."""
        self._emit = emit
        async with trio.open_nursery() as nursery:
            for follower in self.followers:
                nursery.start_soon(follower.run)
            for follower in self.followers:
                await follower.wait_synced()
            task_status.started()

    def _forward(self, events: Sequence[Event]) -> None:
        assert self._emit is not None, "run first"
        self._emit(events)
