"""Events tell what happened once and then by a count, and whoever causes them cannot flood the API server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import trio

from core.k8s import events
from core.k8s.api import Api
from core.k8s.events import BURST, PER_S, REPEAT_EVERY_S, SERIES_S, About, EventRecorder, Series, What
from tests.core.fake_apiserver import KINDS, FakeApiServer, running

UTC_NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CART = About("Pod", "shop", "cart-0", "uid-1")


def what(pod: str = "cart-0", note: str = "a sentence") -> What:
    return What(About("Pod", "shop", pod, "uid"), "Warning", "IssuanceFailed", "Certify", note)


def sent(series: Series, now: float) -> list[tuple[str, int]]:
    """Everything due is stored; (pod, count) of each."""
    found = []
    for run in series.due(now):
        found.append((run.what.about.name, run.count))
        series.stored(run, run.name or "event", run.count, now)
    return found


def test_repetitions_become_a_count_that_is_told_every_half_minute() -> None:
    series = Series()
    series.happened(what(), 0, UTC_NOW)
    assert sent(series, 0) == [("cart-0", 1)]
    for at in range(1, 11):
        series.happened(what(note=f"sentence {at}"), at, UTC_NOW)
    assert sent(series, 11) == []
    assert series.next_at() == REPEAT_EVERY_S
    assert sent(series, REPEAT_EVERY_S) == [("cart-0", 11)]
    assert series.next_at() is None


def test_after_six_quiet_minutes_it_is_a_new_event() -> None:
    series = Series()
    series.happened(what(), 0, UTC_NOW)
    sent(series, 0)
    series.happened(what(), SERIES_S, UTC_NOW)
    [run] = series.due(SERIES_S)
    assert (run.name, run.count) == ("", 1)


def test_new_events_are_bounded_and_the_rest_is_counted() -> None:
    series = Series()
    for number in range(BURST + 10):
        series.happened(what(f"pod-{number}"), 0, UTC_NOW)
    assert len(sent(series, 0)) == BURST
    assert series.dropped == 10
    series.happened(what("late"), 1 / PER_S, UTC_NOW)
    assert sent(series, 1 / PER_S) == [("late", 1)]


def test_what_cannot_be_sent_is_tried_again_for_two_minutes_and_then_dropped() -> None:
    series = Series()
    series.happened(what(), 0, UTC_NOW)
    now = 0.0
    while runs := series.due(now):
        series.failed(runs[0], now, again=True)
        upcoming = series.next_at()
        if upcoming is None:
            break
        now = upcoming
    assert 120 < now < 150
    assert series.dropped == 1


def test_series_of_a_thousand_objects_are_remembered_at_most() -> None:
    series = Series()
    for number in range(3000):
        series.happened(what(f"pod-{number}"), number / PER_S, UTC_NOW)
    assert len(series.due(3000 / PER_S)) == events._SERIES_MAX
    assert series.dropped == 2000


@asynccontextmanager
async def recording() -> AsyncIterator[tuple[FakeApiServer, EventRecorder]]:
    kinds = KINDS | {"/apis/events.k8s.io/v1/events": "Event"}
    del kinds["/api/v1/events"]
    with trio.fail_after(30):
        async with running(FakeApiServer(kinds=kinds)) as server:
            api = Api(server.access)
            recorder = EventRecorder(api, "pillion.dev/identity", "identity-0")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(recorder.run)
                yield server, recorder
                nursery.cancel_scope.cancel()
            await api.close()  # when the recorder has ended: an answer that is on its way to it would leave its connection open


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - a condition of another task
        await trio.sleep(0.01)


def found(server: FakeApiServer) -> list[dict[str, Any]]:
    return [object_ for (collection, *_), object_ in server.objects.items() if collection.endswith("/events")]


async def test_an_event_says_about_whom_why_and_from_whom() -> None:
    async with recording() as (server, recorder):
        recorder.record(CART, "Warning", "IssuanceFailed", "Certify", "x" * 2000)
        await until(lambda: bool(found(server)))
        [event] = found(server)
    assert event["metadata"]["namespace"] == "shop"
    assert event["regarding"] == {"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "cart-0", "uid": "uid-1"}
    assert (event["reason"], event["action"], event["type"]) == ("IssuanceFailed", "Certify", "Warning")
    assert (event["reportingController"], event["reportingInstance"]) == ("pillion.dev/identity", "identity-0")
    assert len(event["note"]) == 1024
    assert datetime.fromisoformat(event["eventTime"]).tzinfo is not None


async def test_a_repetition_patches_the_count_into_the_event(monkeypatch: Any) -> None:
    monkeypatch.setattr(events, "REPEAT_EVERY_S", 0.05)
    async with recording() as (server, recorder):
        recorder.record(CART, "Warning", "IssuanceFailed", "Certify", "one")
        await until(lambda: bool(found(server)))
        recorder.record(CART, "Warning", "IssuanceFailed", "Certify", "two")
        recorder.record(CART, "Warning", "IssuanceFailed", "Certify", "three")
        await until(lambda: "series" in found(server)[0])
        [event] = found(server)
        assert (event["note"], event["series"]["count"]) == ("one", 3)
        server.objects.clear()  # its hour is over
        recorder.record(CART, "Warning", "IssuanceFailed", "Certify", "four")
        await until(lambda: bool(found(server)))
        assert found(server)[0]["note"] == "one"


async def test_a_namespace_that_is_gone_and_an_api_server_that_is_away_hurt_nobody() -> None:
    async with recording() as (server, recorder):
        server.failures[:] = [404, 403, 500]
        for pod in ("a", "b", "c"):
            recorder.record(About("Pod", "shop", pod), "Warning", "IssuanceFailed", "Certify", "s")
        await until(lambda: not server.failures)
        recorder.record(CART, "Warning", "IssuanceFailed", "Certify", "s")
        await until(lambda: bool(found(server)))
        assert recorder.dropped == 2  # the third is tried again
