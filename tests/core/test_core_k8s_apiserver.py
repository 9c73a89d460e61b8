"""core.k8s.apiserver against a real HTTP server: what the source says, and what it withstands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing

from core.k8s import apiserver
from core.k8s.api import Api
from core.k8s.apiserver import ApiServerSource, Resource
from core.k8s.cluster import find_access
from core.k8s.errors import Unavailable
from core.k8s.objects import Object
from core.k8s.source import Apply, Delete, Event, Reset
from core.refs import Ref
from core.runtime.backoff import Backoff
from policy.admission import parse_object
from tests.core.fake_apiserver import FakeApiServer, running

POD = Resource("", "Pod", "pods")
SERVICE = Resource("", "Service", "services")
SERVER = Resource("policy.pillion.dev", "Server", "servers", ("v1alpha1",), "run `pillion install`")
ROUTE = Resource("gateway.networking.k8s.io", "HTTPRoute", "httproutes", ("v1", "v1beta1"), "install the Gateway API", optional=True)
ROUTES = "/apis/gateway.networking.k8s.io/v1/httproutes"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test must not wait for what is a second in life."""
    monkeypatch.setattr(apiserver, "Backoff", lambda *_: _Pause())
    monkeypatch.setattr(apiserver, "_ABSENT_S", 0.01)


class _Pause:
    def next_s(self) -> float:
        return 0.002

    def reset(self) -> None:
        pass


class Told:
    """What the source said, as a state and as a list. before_reset: runs before a list is taken."""

    def __init__(self) -> None:
        self.before_reset: Callable[[], None] = lambda: None
        self.events: list[Event] = []
        self.state: dict[Ref, Object] = {}
        self._changed = trio.lowlevel.ParkingLot()

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            self.events.append(event)
            match event:
                case Apply(object=object_):
                    self.state[object_.ref] = object_
                case Delete(ref=ref):
                    del self.state[ref]
                case Reset(group=group, kind=kind, objects=objects):
                    self.before_reset()
                    self.state = {ref: found for ref, found in self.state.items() if (ref.group, ref.kind) != (group, kind)}
                    self.state |= {object_.ref: object_ for object_ in objects}
        self._changed.unpark_all()

    async def wait_names(self, *names: str) -> None:
        while {ref.name for ref in self.state} != set(names):
            await self._changed.park()

    async def wait_events(self, count: int) -> None:
        while len(self.events) < count:
            await self._changed.park()

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@asynccontextmanager
async def followed(server: FakeApiServer, *resources: Resource, synced: bool = True) -> AsyncIterator[tuple[Told, ApiServerSource]]:
    told = Told()
    with trio.fail_after(60):
        async with running(server):
            api = Api(server.access)
            source = ApiServerSource(api, resources, parse_object)

            async def run(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                await source.run(told.take, task_status=task_status)

            try:
                async with trio.open_nursery() as nursery:
                    if synced:
                        await nursery.start(run)
                        await server.wait_watching(sum(resource_path(one) in server.kinds for one in resources))
                    else:
                        nursery.start_soon(run)
                    yield told, source
                    nursery.cancel_scope.cancel()
            finally:
                await api.close()


def resource_path(resource: Resource) -> str:
    return f"/apis/{resource.group}/{resource.versions[0]}/{resource.plural}" if resource.group else f"/api/v1/{resource.plural}"


def pod(name: str, ip: str = "10.0.0.1") -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {}, "status": {"podIP": ip}}


def server_object(name: str, port: object = 80) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop"}
    return {"apiVersion": "policy.pillion.dev/v1alpha1", "kind": "Server", "metadata": metadata, "spec": {"podSelector": {}, "port": port}}


async def test_everything_that_is_there_is_told_before_it_starts() -> None:
    server = FakeApiServer()
    server.put(pod("a"))
    server.put({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "shop"}, "spec": {}})
    async with followed(server, POD, SERVICE) as (told, source):
        assert {ref.name for ref in told.state} == {"a", "s"}
        assert source.waiting == []
        assert told.count(Reset) == 2


async def test_changes_follow_and_what_nobody_reads_is_no_change() -> None:
    server = FakeApiServer()
    server.put(pod("a"))
    async with followed(server, POD) as (told, _):
        server.put(pod("b"))
        await told.wait_names("a", "b")
        seen = len(told.events)
        server.put(pod("b") | {"status": {"podIP": "10.0.0.1", "hostIP": "10.9.9.9"}})
        server.remove("Pod", "shop", "a")
        await told.wait_names("b")
        assert len(told.events) == seen + 1


async def test_a_watch_that_ends_goes_on_where_it_was() -> None:
    server = FakeApiServer()
    async with followed(server, POD) as (told, _):
        server.put(pod("a"))
        await told.wait_names("a")
        server.cut_watches()
        server.put(pod("b"))
        await told.wait_names("a", "b")
        assert told.count(Reset) == 1


async def test_after_410_everything_is_listed_again_and_what_vanished_is_gone() -> None:
    server = FakeApiServer()
    server.put(pod("a"))
    server.put(pod("b"))
    async with followed(server, POD) as (told, _):
        server.cut_watches()
        server.remove("Pod", "shop", "a")
        server.compact()
        await told.wait_names("b")
        assert told.count(Reset) == 2
        await server.wait_watching(1)
        server.expire_watches()
        await told.wait_events(len(told.events) + 1)
        assert told.count(Reset) == 3


async def test_objects_that_a_new_list_repeats_are_the_same_objects() -> None:
    server = FakeApiServer()
    server.put(pod("a"))
    async with followed(server, POD) as (told, _):
        before = dict(told.state)
        server.expire_watches()
        while told.count(Reset) < 2:
            await told.wait_events(len(told.events) + 1)
        assert [told.state[ref] is before[ref] for ref in before] == [True]


async def test_an_api_server_that_is_away_changes_nothing() -> None:
    server = FakeApiServer()
    server.put(pod("a"))
    async with followed(server, POD) as (told, source):
        server.failures = [503, 0, 500, 429]
        server.cut_watches()
        server.put(pod("b"))
        await told.wait_names("a", "b")
        assert told.count(Reset) == 1 and told.count(Delete) == 0
        assert source.followers[0].counters.failures == 4


@pytest.mark.parametrize(("status", "longest"), [(0, 5), (503, 30)], ids=["nobody answers", "an overloaded one answers"])
async def test_who_does_not_answer_is_asked_again_soon(status: int, longest: float, autojump_clock: trio.testing.MockClock) -> None:
    """What is away may be back any moment, and asking it costs nothing; what says that it has too much to do is left alone longer."""
    asked: list[float] = []

    class Away(Api):
        async def list(self, *_: Any, **__: Any) -> Any:
            asked.append(trio.current_time())
            raise Unavailable("away", status)

    follower = apiserver.Follower(Away(find_access), POD, parse_object, lambda _: None)
    with trio.move_on_after(300), pytest.MonkeyPatch.context() as patch:
        patch.setattr(apiserver, "Backoff", lambda first, most: Backoff(first, most, lambda: 0.0))
        await follower.run()
    pauses = [after - before for before, after in pairwise(asked)]
    assert (max(pauses), pauses[-1]) == pytest.approx((longest, longest))


async def test_who_was_away_and_is_not_complete_yet_is_asked_again_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """An API server that starts answers 503 or 403 for a moment: not the time to wait for as long as it was away."""
    asked: list[float] = []

    class Starting(Api):
        async def list(self, *_: Any, **__: Any) -> Any:
            asked.append(trio.current_time())
            raise Unavailable("storage is (re)initializing", 503) if trio.current_time() > 120 else Unavailable("away")

    follower = apiserver.Follower(Starting(find_access), POD, parse_object, lambda _: None)
    with trio.move_on_after(130), pytest.MonkeyPatch.context() as patch:
        patch.setattr(apiserver, "Backoff", lambda first, most: Backoff(first, most, lambda: 0.0))
        await follower.run()
    answered = [when for when in asked if when > 120]
    assert answered[1] - answered[0] == pytest.approx(0.2)


async def test_a_refused_version_leaves_the_last_good_one_in_force() -> None:
    server = FakeApiServer()
    server.put(server_object("web"))
    async with followed(server, SERVER) as (told, source):
        seen = len(told.events)
        server.put(server_object("web", port=0))
        server.put(server_object("later"))
        await told.wait_names("web", "later")
        assert len(told.events) == seen + 1
        assert [(refusal.ref.name if refusal.ref else "", refusal.kept) for refusal in source.refusals] == [("web", True)]
        server.expire_watches()  # a list must not lose it either
        while told.count(Reset) < 2:
            await told.wait_events(len(told.events) + 1)
        assert {ref.name for ref in told.state} == {"web", "later"}
        server.put(server_object("web", port=81))
        await told.wait_events(len(told.events) + 1)
        assert source.refusals == []


async def test_a_kind_that_may_be_absent_is_empty_and_comes_when_it_is_installed() -> None:
    server = FakeApiServer()
    del server.kinds[ROUTES]
    async with followed(server, POD, ROUTE) as (told, source):
        assert [str(refusal) for refusal in source.refusals] == [
            "httproutes.gateway.networking.k8s.io: the API server does not serve httproutes.gateway.networking.k8s.io (v1, v1beta1); "
            "install the Gateway API; it is ignored"
        ]
        server.kinds[ROUTES] = "HTTPRoute"
        metadata = {"name": "web", "namespace": "shop"}
        server.put({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": metadata, "spec": {}})
        await told.wait_names("web")
        assert source.refusals == []


async def test_an_older_version_does_when_the_best_is_not_served() -> None:
    server = FakeApiServer()
    del server.kinds[ROUTES]
    server.kinds["/apis/gateway.networking.k8s.io/v1beta1/httproutes"] = "HTTPRoute"
    metadata = {"name": "web", "namespace": "shop"}
    server.put({"apiVersion": "gateway.networking.k8s.io/v1beta1", "kind": "HTTPRoute", "metadata": metadata, "spec": {}})
    async with followed(server, ROUTE) as (told, source):
        assert {ref.name for ref in told.state} == {"web"} and source.refusals == []


async def test_nothing_is_complete_without_a_kind_that_must_be_there() -> None:
    server = FakeApiServer()
    path = resource_path(SERVER)
    del server.kinds[path]
    async with followed(server, POD, SERVER, synced=False) as (told, source):
        await server.wait_watching(1)  # of pods
        await server.wait_requests(f"GET {path}", 3)
        assert len(source.waiting) == 1 and "run `pillion install`" in source.waiting[0]
        server.kinds[path] = "Server"
        server.put(server_object("web"))
        await told.wait_names("web")
        assert source.waiting == []


async def test_a_kind_that_vanished_is_believed_only_when_it_is_absent_twice() -> None:
    server = FakeApiServer()
    server.put(server_object("web"))
    async with followed(server, SERVER) as (told, source):
        told.before_reset = lambda: missing.append(server.requests.count(f"GET {resource_path(SERVER)}"))
        missing: list[int] = []
        del server.kinds[resource_path(SERVER)]
        server.cut_watches()
        await told.wait_names()
        # the watch was the first to be told 404; the first list was the second
        assert missing == [2] and source.refusals[0].kept


async def test_what_we_may_not_read_is_said_with_the_next_step() -> None:
    server = FakeApiServer(failures=[403] * 10_000)
    async with followed(server, POD, synced=False) as (_, source):
        await server.wait_requests("GET /api/v1/pods", 2)
        assert "GET /api/v1/pods: failure 403 of the test" in source.waiting[0]
