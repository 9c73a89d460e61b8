"""core.k8s.api against a real HTTP server: objects, pages, watches and every way in which they end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from core.k8s.api import Api, object_path
from core.k8s.errors import AlreadyExists, Conflict, Forbidden, Gone, NotFound, Unauthorized, Unavailable
from core.k8s.http import Access
from core.k8s.watch import Watch
from tests.core.fake_apiserver import FakeApiServer, running

PODS = "/api/v1/pods"


def pod(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": labels}, "spec": {}}


@asynccontextmanager
async def connected(server: FakeApiServer | None = None) -> AsyncIterator[tuple[FakeApiServer, Api]]:
    with trio.fail_after(60):
        async with running(server) as server:
            api = Api(server.access)
            yield server, api
            await api.close()


async def next_names(watch: Watch, count: int) -> list[str]:
    return [(await anext(watch)).object["metadata"]["name"] for _ in range(count)]


async def test_objects_come_without_managed_fields() -> None:
    async with connected() as (server, api):
        server.put(pod("a"))
        assert "managedFields" not in (await api.get(f"{PODS[:7]}/namespaces/shop/pods/a"))["metadata"]


async def test_a_list_is_read_in_pages_of_one_moment_and_names_kind_and_version() -> None:
    async with connected(FakeApiServer(page=2)) as (server, api):
        for name in "abcde":
            server.put(pod(name))
        listing = await api.list(PODS, each=lambda item: (item["kind"], item["apiVersion"], item["metadata"]["name"]))
        assert listing.items == [("Pod", "v1", name) for name in "abcde"]
        assert listing.resource_version == str(server.version)
        assert server.requests.count(f"GET {PODS}") == 3


async def test_a_page_that_is_compacted_away_starts_the_list_again_in_one_piece() -> None:
    async with connected(FakeApiServer(page=2)) as (server, api):
        for name in "abc":
            server.put(pod(name))

        def each(item: dict[str, Any]) -> str:
            if item["metadata"]["name"] == "b" and server.requests.count(f"GET {PODS}") == 1:
                server.compact()
            return str(item["metadata"]["name"])

        assert (await api.list(PODS, each=each)).items == ["a", "b", "c"]
        assert server.requests.count(f"GET {PODS}") == 3


async def test_a_watch_tells_what_happened_since_its_version_and_then_what_happens() -> None:
    async with connected() as (server, api):
        version = (await api.list(PODS)).resource_version
        server.put(pod("a"))
        watch = api.watch(PODS, version)
        event = await anext(watch)
        assert (event.type, event.object["metadata"]["name"]) == ("ADDED", "a")
        server.put(pod("a", tier="front"))
        server.remove("Pod", "shop", "a")
        assert [(await anext(watch)).type for _ in range(2)] == ["MODIFIED", "DELETED"]


async def test_a_bookmark_moves_the_version_and_is_no_event() -> None:
    async with connected() as (server, api):
        watch = api.watch(PODS, str(server.version))
        await watch.start()
        server.bookmark()
        bookmarked = server.version
        server.put(pod("a"))
        assert await next_names(watch, 1) == ["a"]
        server.bookmark()
        server.cut_watches()
        assert [event async for event in watch] == []
        assert int(watch.resource_version) == bookmarked + 2


async def test_a_watch_ends_when_the_server_ends_it() -> None:
    async with connected() as (server, api):
        watch = api.watch(PODS, str(server.version))
        await watch.start()
        server.put(pod("a"))
        server.cut_watches()
        assert [event.object["metadata"]["name"] async for event in watch] == ["a"]


async def test_a_version_that_is_too_old_is_gone_at_the_start_and_inside_the_stream() -> None:
    async with connected() as (server, api):
        server.compact()
        with pytest.raises(Gone):
            await anext(api.watch(PODS, "1"))
        watch = api.watch(PODS, str(server.version))
        await watch.start()
        server.expire_watches()
        with pytest.raises(Gone):
            await anext(watch)


async def test_a_watch_can_be_cancelled_and_leaves_no_connection() -> None:
    async with connected() as (server, api):
        watch = api.watch(PODS, str(server.version))
        await watch.start()
        assert server.watching == 1
        with trio.move_on_after(0.01):
            await anext(watch)
        server.put(pod("a"))  # the server notices when it sends
        server.put(pod("b"))
        await server.wait_watching(0)


async def test_closing_the_api_closes_abandoned_watches() -> None:
    async with connected() as (server, api):
        server.put(pod("a"))
        async for _ in api.watch(PODS, "100"):
            break
        await api.close()
        server.put(pod("b"))
        server.put(pod("c"))
        await server.wait_watching(0)


@pytest.mark.parametrize(
    ("code", "error"), [(401, Unauthorized), (403, Forbidden), (409, Conflict), (410, Gone), (429, Unavailable), (503, Unavailable)]
)
async def test_refusals_have_types(code: int, error: type[Exception]) -> None:
    async with connected() as (server, api):
        server.failures = [code, code]
        with pytest.raises(error, match=rf"GET /api/v1/pods: failure {code} of the test"):
            await api.get(PODS)


async def test_a_missing_object_is_told_from_a_missing_kind() -> None:
    async with connected() as (server, api):
        del server.kinds["/apis/gateway.networking.k8s.io/v1/httproutes"]
        with pytest.raises(NotFound) as missing:
            await api.get("/api/v1/namespaces/shop/pods/a")
        assert not missing.value.unknown_kind
        with pytest.raises(NotFound) as unknown:
            await api.list("/apis/gateway.networking.k8s.io/v1/httproutes")
        assert unknown.value.unknown_kind


async def test_create_replace_patch_delete() -> None:
    async with connected() as (server, api):
        created = await api.post("/api/v1/namespaces/shop/pods", pod("a"))
        with pytest.raises(AlreadyExists):
            await api.post("/api/v1/namespaces/shop/pods", pod("a"))
        path = object_path("", "v1", "pods", "shop", "a")
        patched = await api.patch(path, {"metadata": {"labels": {"tier": "front"}}})
        assert patched["metadata"]["labels"] == {"tier": "front"}
        with pytest.raises(Conflict):
            await api.put(path, created)
        await api.delete(path)
        assert not server.objects


async def test_status_is_a_subresource() -> None:
    async with connected() as (server, api):
        server.put(pod("a"))
        await api.patch(object_path("", "v1", "pods", "shop", "a", "status"), {"status": {"phase": "Running"}, "spec": {"x": 1}})
        assert server.get("Pod", "shop", "a")["status"] == {"phase": "Running"}
        assert server.get("Pod", "shop", "a")["spec"] == {}


async def test_connections_are_used_again_and_a_dead_one_costs_a_get_nothing() -> None:
    async with connected() as (server, api):
        server.put(pod("a"))
        await api.list(PODS)
        server.failures = [0]
        assert len((await api.list(PODS)).items) == 1
        server.failures = [0]
        with pytest.raises(Unavailable):  # it may have been carried out
            await api.post("/api/v1/namespaces/shop/pods", pod("b"))


async def test_a_token_that_was_replaced_is_read_again_after_401() -> None:
    async with connected(FakeApiServer(token="new")) as (server, _):
        tokens = iter(["old", "new"])

        def load() -> Access:
            token = next(tokens)
            return server.access(token)

        api = Api(load)
        assert (await api.list(PODS)).items == []
        assert server.authorizations == ["Bearer old", "Bearer new"]
        await api.close()


async def test_no_server_is_unavailable_and_says_where() -> None:
    api = Api(lambda: Access("127.0.0.1", 1))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await api.get(PODS)
    with pytest.raises(Unavailable, match=r"watch /api/v1/pods"):
        await anext(api.watch(PODS, "1"))
    await api.close()


def test_paths() -> None:
    assert object_path("", "v1", "pods") == "/api/v1/pods"
    assert object_path("apps", "v1", "deployments", "shop", "a/b", "status") == "/apis/apps/v1/namespaces/shop/deployments/a%2Fb/status"
    assert object_path("", "v1", "namespaces", "", "/../secrets?a\r\n") == "/api/v1/namespaces/%2F..%2Fsecrets%3Fa%0D%0A"
    for name in (".", ".."):
        with pytest.raises(ValueError, match="no path"):
            object_path("", "v1", "namespaces", "", name)
