"""The trust bundle in every namespace: a ConfigMap that pods mount to believe the identity service by when they start.

`missing` decides which namespaces lack the bundle in force; the rest keeps lists of namespaces and ConfigMaps by watching, and writes
with server-side apply, so that a new namespace gets its bundle at once, an edited one is repaired and a deleted one comes back. Only the
leader runs this. It must not decide what the bundle is (`shared`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from core.k8s.api import Api, object_path
from core.k8s.apiserver import Follower, Resource
from core.k8s.errors import ApiError, NotFound
from core.k8s.fields import Raw
from core.k8s.objects import ObjectMeta, read_meta
from core.k8s.source import Event
from core.refs import Ref
from core.runtime import logs
from core.runtime.watch import Cell

CONFIG_MAP = "pillion-trust-anchors"
KEY = "ca-bundle.crt"
_MANAGER = "pillion-identity"
_AT_ONCE = 8
_RETRY_FIRST_S, _RETRY_MOST_S = 1.0, 60.0
_CALM_S = 60.0  # a namespace that was left alone this long is repaired at once again

log = logs.logger("identity")


@dataclass(frozen=True)
class Place:
    """A namespace, or the ConfigMap of one, as far as it matters here. bundle: what the ConfigMap holds; ending: is being deleted."""

    metadata: ObjectMeta
    kind: str
    bundle: str | None = None

    @property
    def ref(self) -> Ref:
        """Of the core group."""
        return Ref("", self.kind, self.metadata.namespace, self.metadata.name)

    @property
    def ending(self) -> bool:
        """In such a namespace nothing can be created any more."""
        return self.metadata.deletion_timestamp is not None


def parse_place(raw: Raw) -> Place | None:
    """Namespaces and our ConfigMaps; raises InvalidObject."""
    kind = str(raw.get("kind", ""))
    meta = read_meta(raw)
    if kind == "Namespace":
        return Place(ObjectMeta(meta.name, deletion_timestamp=meta.deletion_timestamp), kind)
    if kind != "ConfigMap" or meta.name != CONFIG_MAP:
        return None
    data = raw.get("data")
    value = data.get(KEY) if isinstance(data, dict) else None
    return Place(ObjectMeta(meta.name, meta.namespace), kind, value if isinstance(value, str) else None)


def missing(namespaces: Mapping[str, Place], bundles: Mapping[str, str | None], wanted: str) -> list[str]:
    """Namespaces to write to, in order. bundles: content of the ConfigMap by namespace."""
    return sorted(name for name, place in namespaces.items() if not place.ending and bundles.get(name) != wanted)


class Publisher:
    """Keeps every namespace's bundle equal to ``bundle``. written, failed: counters for metrics."""

    def __init__(self, api: Api, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._wanted = ""
        self._news = Cell(0)
        namespaces = Resource("", "Namespace", "namespaces")
        config_maps = Resource("", "ConfigMap", "configmaps", field_selector=f"metadata.name={CONFIG_MAP}")
        self._namespaces = Follower(api, namespaces, parse_place, self._changed)
        self._bundles = Follower(api, config_maps, parse_place, self._changed)
        self._again_at: dict[str, float] = {}
        self._pause: dict[str, float] = {}
        self.written = 0
        self.failed = 0

    def want(self, bundle_pem: bytes) -> None:
        """This is the bundle from now on."""
        self._wanted = bundle_pem.decode()
        self._again_at.clear()
        self._news.set(self._news.value + 1)

    @property
    def synced(self) -> bool:
        """Both lists were read once."""
        return not self._namespaces.waiting and not self._bundles.waiting

    def unpublished(self) -> Sequence[str]:
        """Namespaces that lack the bundle in force; one entry in words when the namespaces are not known yet."""
        if not self.synced:
            return ("(all: they are not listed yet)",)
        return self._missing()

    async def run(self) -> None:
        """For ever, while we lead."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._namespaces.run)
            nursery.start_soon(self._bundles.run)
            await self._namespaces.wait_synced()
            await self._bundles.wait_synced()
            self._news.set(self._news.value + 1)
            while True:
                version = self._news.version
                now = self._clock()
                due = [name for name in self._missing() if self._again_at.get(name, 0.0) <= now] if self._wanted else []
                await self._write_all(due)
                later = [at for name, at in self._again_at.items() if at > now]
                with trio.move_on_after(max(0.05, min(later) - self._clock()) if later else float("inf")):
                    await self._news.wait_newer(version)

    def _missing(self) -> list[str]:
        namespaces = {place.metadata.name: place for place in self._namespaces.known.values() if isinstance(place, Place)}
        bundles = {place.metadata.namespace: place.bundle for place in self._bundles.known.values() if isinstance(place, Place)}
        for name in self._again_at.keys() - namespaces.keys():
            del self._again_at[name]
            self._pause.pop(name, None)
        return missing(namespaces, bundles, self._wanted)

    def _changed(self, _: Sequence[Event]) -> None:
        self._news.set(self._news.value + 1)

    async def _write_all(self, names: Sequence[str]) -> None:
        limit = trio.CapacityLimiter(_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(self._write, name, limit)

    async def _write(self, namespace: str, limit: trio.CapacityLimiter) -> None:
        path = object_path("", "v1", "configmaps", namespace, CONFIG_MAP)
        try:
            async with limit:
                with trio.fail_after(10):
                    await self._api.patch(path, self._object(namespace), "apply", fieldManager=_MANAGER, force="true")
        except NotFound:
            self._later(namespace)  # the namespace is gone, its watch will say so
        except (ApiError, trio.TooSlowError) as error:
            self.failed += 1
            log.warning("trust bundle not written", namespace=namespace, reason=str(error) or "no answer", retry_s=self._later(namespace))
        else:
            self.written += 1
            self._later(namespace)

    def _later(self, namespace: str) -> float:
        """Whatever came of it, this namespace is not written again at once: the watch has to see it, and somebody may fight with us."""
        now = self._clock()
        calm = now - self._again_at.get(namespace, float("-inf")) > _CALM_S
        pause = _RETRY_FIRST_S if calm else min(_RETRY_MOST_S, self._pause.get(namespace, _RETRY_FIRST_S / 2) * 2)
        self._pause[namespace], self._again_at[namespace] = pause, now + pause
        return pause

    def _object(self, namespace: str) -> dict[str, object]:
        labels = {"app.kubernetes.io/part-of": "pillion", "app.kubernetes.io/component": "identity"}
        metadata = {"name": CONFIG_MAP, "namespace": namespace, "labels": labels}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {KEY: self._wanted}}
