"""Kubernetes Events (events.k8s.io/v1) about what happened to an object, so that ``kubectl describe`` shows it to its owner.

`Series` decides what is sent and when: an equal Event repeated within six minutes becomes a count on the first one, and there is a bound
on everything, because whoever causes Events must not be able to fill the API server with them. `EventRecorder` is the short driver. An
Event is a courtesy: losing one is counted, and never holds up or fails what it tells about.

RBAC: ``events`` of ``events.k8s.io``, create and patch.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import trio

from core.k8s.api import Api, object_path
from core.k8s.errors import ApiError, NotFound, Unavailable
from core.runtime import logs

SERIES_S = 360.0  # client-go tools/events: finishTime of a series
REPEAT_EVERY_S = 30.0  # how often the count of a running series is brought up to date
BURST, PER_S = 50, 0.5  # new Events of this process: 50 at once, then one every two seconds
_SERIES_MAX = 1000
_TRIES_FOR_S = 120.0
_NOTE_MAX = 1024  # events.k8s.io/v1: note
_NAME_MAX = 253
_FIRST_LOOK_S = 0.2  # what happens together is sent together

log = logs.logger("events")

Type = Literal["Normal", "Warning"]


@dataclass(frozen=True)
class About:
    """The object that an Event regards. uid: without it ``kubectl describe`` does not find the Event."""

    kind: str
    namespace: str
    name: str
    uid: str = ""
    api_version: str = "v1"


@dataclass(frozen=True)
class What:
    """What happened. reason and action: CamelCase words of a fixed set; note: a sentence."""

    about: About
    type: Type
    reason: str
    action: str
    note: str = field(compare=False)
    """Of a series, the first one is kept: the API does not let it change."""


@dataclass
class _Run:
    """One series. count: how often it happened; sent: how often the API server knows of; name: of the Event there, empty before."""

    what: What
    at: datetime
    last: datetime
    last_seen: float
    next_at: float
    name: str = ""
    count: int = 1
    sent: int = 0
    failing_since: float | None = None


class Series:
    """The decision, without I/O. Times are of one monotonic clock, seconds; ``utc`` is what is written."""

    def __init__(self) -> None:
        self._runs: OrderedDict[What, _Run] = OrderedDict()
        self._tokens = float(BURST)
        self._filled_at = 0.0
        self.dropped = 0
        """Occurrences that no Event tells about."""

    def happened(self, what: What, now: float, utc: datetime) -> None:
        """Once more."""
        run = self._runs.get(what)
        if run is not None and now - run.last_seen < SERIES_S:
            run.count, run.last, run.last_seen = run.count + 1, utc, now
            self._runs.move_to_end(what)
            return
        self._runs.pop(what, None)
        if not self._spend(now):
            self.dropped += 1
            return
        self._runs[what] = _Run(what, utc, utc, now, now)
        while len(self._runs) > _SERIES_MAX:
            _, oldest = self._runs.popitem(last=False)
            self.dropped += oldest.count - oldest.sent

    def due(self, now: float) -> list[_Run]:
        """What to send now. Forgets series that are over."""
        over = [what for what, run in self._runs.items() if run.sent == run.count and now - run.last_seen >= SERIES_S]
        for what in over:
            del self._runs[what]
        return [run for run in self._runs.values() if run.sent < run.count and now >= run.next_at]

    def next_at(self) -> float | None:
        """When something will be due, None when nothing is left to send."""
        return min((run.next_at for run in self._runs.values() if run.sent < run.count), default=None)

    def stored(self, run: _Run, name: str, count: int, now: float) -> None:
        """The API server has ``count`` occurrences in the Event ``name``."""
        run.name, run.sent, run.next_at, run.failing_since = name, count, now + REPEAT_EVERY_S, None

    def vanished(self, run: _Run, now: float) -> None:
        """The Event is not there any more (they live an hour): the series begins anew."""
        run.name, run.count, run.sent, run.at, run.next_at = "", max(1, run.count - run.sent), 0, run.last, now

    def failed(self, run: _Run, now: float, *, again: bool) -> None:
        """It could not be sent; again: it may work later."""
        run.failing_since = run.failing_since if run.failing_since is not None else now
        run.next_at = now + REPEAT_EVERY_S / 3
        if not again or now - run.failing_since > _TRIES_FOR_S:
            self.dropped += run.count - run.sent
            self._runs.pop(run.what, None)

    def _spend(self, now: float) -> bool:
        self._tokens = min(BURST, self._tokens + (now - self._filled_at) * PER_S)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class EventRecorder:
    """Sends Events of one component. controller: ``pillion.dev/identity``; instance: the pod's name."""

    def __init__(self, api: Api, controller: str, instance: str, *, fresh: Callable[[], str] = lambda: secrets.token_hex(8)) -> None:
        self._api = api
        self._controller = controller
        self._instance = instance
        self._fresh = fresh
        self._series = Series()
        self._news = trio.Event()

    @property
    def dropped(self) -> int:
        """How many occurrences no Event tells about."""
        return self._series.dropped

    def record(self, about: About, type_: Type, reason: str, action: str, note: str) -> None:
        """Returns at once; the Event follows when `run` runs."""
        text = note if len(note) <= _NOTE_MAX else note[: _NOTE_MAX - 3] + "..."
        self._series.happened(What(about, type_, reason, action, text), trio.current_time(), datetime.now(UTC))
        self._news.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            at = self._series.next_at()
            with trio.move_on_at(float("inf") if at is None else at):
                await self._news.wait()
            self._news = trio.Event()
            await trio.sleep(_FIRST_LOOK_S)
            for run in self._series.due(trio.current_time()):
                await self._send(run)

    async def _send(self, run: _Run) -> None:
        namespace, count = run.what.about.namespace or "default", run.count
        try:
            with trio.fail_after(10):
                if run.name:
                    series = {"series": {"count": count, "lastObservedTime": _stamp(run.last)}}
                    await self._api.patch(object_path("events.k8s.io", "v1", "events", namespace, run.name), series)
                    name = run.name
                else:
                    name = f"{run.what.about.name[: _NAME_MAX - 17]}.{self._fresh()}"
                    await self._api.post(object_path("events.k8s.io", "v1", "events", namespace), self._event(run, name, namespace))
                    count = 1
        except NotFound as error:
            if run.name:
                self._series.vanished(run, trio.current_time())
            else:
                self._failed(run, error, again=False)  # the namespace is gone
        except (ApiError, trio.TooSlowError) as error:
            self._failed(run, error, again=isinstance(error, Unavailable | trio.TooSlowError))
        else:
            self._series.stored(run, name, count, trio.current_time())

    def _failed(self, run: _Run, error: Exception, *, again: bool) -> None:
        log.info("event not sent", reason=run.what.reason, about=run.what.about.name, error=str(error), again=again)
        self._series.failed(run, trio.current_time(), again=again)

    def _event(self, run: _Run, name: str, namespace: str) -> dict[str, Any]:
        about = run.what.about
        regarding = {"apiVersion": about.api_version, "kind": about.kind, "name": about.name}
        regarding |= {"namespace": about.namespace} if about.namespace else {}
        regarding |= {"uid": about.uid} if about.uid else {}
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": _stamp(run.at),
            "reportingController": self._controller,
            "reportingInstance": self._instance[:128],
            "type": run.what.type,
            "reason": run.what.reason,
            "action": run.what.action,
            "regarding": regarding,
            "note": run.what.note,
        }


def _stamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
