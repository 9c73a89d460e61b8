"""What checks ask of a cluster: each list and object is read once a round. Reads; what it creates is a dry run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from core.k8s.api import Listing, object_path
from core.k8s.errors import NotFound

Object = dict[str, Any]
NAMESPACE = "pillion"
PART_OF = "app.kubernetes.io/part-of"
COMPONENT = "app.kubernetes.io/component"
VERSION = "app.kubernetes.io/version"


class Api(Protocol):
    """As much of `core.k8s.api.Api` as checks need."""

    async def get(self, path: str, **query: str) -> Object:
        """One object; raises ApiError."""
        ...

    async def text(self, path: str, **query: str) -> str:
        """What is no object; raises ApiError."""
        ...

    async def list(self, path: str, *, label_selector: str = "", field_selector: str = "") -> Listing[Object]:
        """All objects of a collection; raises ApiError."""
        ...

    async def post(self, path: str, body: Mapping[str, Any], **query: str) -> Object:
        """Create; raises ApiError."""
        ...


@dataclass
class Cluster:
    """One cluster. version: of this command. only: the namespace that questions about workloads are limited to, empty for all."""

    api: Api
    version: str
    only: str = ""
    clock: Any = time.time
    _read: dict[str, Any] = field(default_factory=dict)

    def forget(self) -> None:
        """Before a question is asked again."""
        self._read.clear()

    async def find(self, group: str, version: str, plural: str, name: str, namespace: str = "") -> Object | None:
        """One object, None when there is none; raises ApiError."""
        path = object_path(group, version, plural, namespace, name)
        if path not in self._read:
            try:
                self._read[path] = await self.api.get(path)
            except NotFound:
                self._read[path] = None
        found: Object | None = self._read[path]
        return found

    async def objects(self, group: str, version: str, plural: str, namespace: str = "") -> list[Object]:
        """Every object of a kind, none when there is no such kind; raises ApiError."""
        path = object_path(group, version, plural, namespace)
        if path not in self._read:
            try:
                self._read[path] = (await self.api.list(path)).items
            except NotFound:
                self._read[path] = []
        found: list[Object] = self._read[path]
        return found

    async def pods(self) -> list[Object]:
        """Pods of workloads: everywhere or in the namespace asked for, without ours, and without those that have ended or are about to."""
        found = await self.objects("", "v1", "pods", self.only)
        return [
            pod
            for pod in found
            if pod["metadata"].get("namespace") != NAMESPACE
            and not pod["metadata"].get("deletionTimestamp")
            and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        ]

    async def ours(self, plural: str, group: str = "apps") -> dict[str, Object]:
        """What is installed in our namespace, by name."""
        found = await self.objects(group, "v1", plural, NAMESPACE)
        return {item["metadata"]["name"]: item for item in found if (item["metadata"].get("labels") or {}).get(PART_OF) == "pillion"}

    async def raw(self, path: str) -> Any:
        """Any GET, for ``/version`` and the like."""
        return await self.api.get(path)

    async def text(self, path: str) -> str:
        """What a pod's own HTTP server says, through the API server."""
        return await self.api.text(path)


def name_of(item: Mapping[str, Any]) -> str:
    """``namespace/name``, or the name."""
    meta = item.get("metadata") or {}
    return f"{meta['namespace']}/{meta['name']}" if meta.get("namespace") else str(meta.get("name"))


def condition(item: Object, type_: str) -> bool:
    """Whether a condition in the object's status is True."""
    return any(found["type"] == type_ and found["status"] == "True" for found in (item.get("status") or {}).get("conditions") or [])


def some(names: list[str], most: int = 5) -> str:
    """At most a few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
