"""An installation in memory, and what `pillion check` says of it."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import trio

from cli.check.catalogue import CONTROL_PLANE, DATA_PLANE
from cli.check.cluster import Cluster
from cli.check.model import Result
from cli.check.run import run_checks
from core.k8s.api import Listing, object_path
from core.k8s.errors import Forbidden, NotFound, Unavailable
from policy.admission import admit

NOW = datetime(2026, 6, 1, tzinfo=UTC).timestamp()
PLURALS = {"NetworkPolicy": "networkpolicies", "GRPCRoute": "grpcroutes", "HTTPRoute": "httproutes"}


def plural(kind: str) -> str:
    return PLURALS.get(kind) or (kind.lower().removesuffix("y") + "ies" if kind.endswith("y") else kind.lower() + "s")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class FakeApi:
    """Objects by path; who asks for what is not there gets NotFound. denied: reviews that are answered with no."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, str] = {}
        self.denied: Callable[[Mapping[str, Any]], bool] = lambda spec: (
            "exec" in str(spec)
            or (
                spec["resourceAttributes"].get("name") is None
                and (
                    spec["resourceAttributes"]["resource"] in ("secrets", "clusterrolebindings", "serviceaccounts")
                    or (spec["resourceAttributes"]["resource"], spec["resourceAttributes"]["verb"]) == ("pods", "create")
                )
            )
        )
        self.injects = self.validates = True
        self.down = False

    def put(self, item: Mapping[str, Any]) -> dict[str, Any]:
        item = copy.deepcopy(dict(item))
        group, _, version = item["apiVersion"].rpartition("/")
        meta = item["metadata"]
        self.objects[object_path(group, version, plural(item["kind"]), meta.get("namespace", ""), meta["name"])] = item
        return item

    def find(self, kind: str, name: str) -> dict[str, Any]:
        return next(item for item in self.objects.values() if item["kind"] == kind and item["metadata"]["name"] == name)

    def drop(self, kind: str, name: str) -> None:
        self.objects = {path: item for path, item in self.objects.items() if (item["kind"], item["metadata"]["name"]) != (kind, name)}

    async def get(self, path: str, **query: str) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if self.down:
            raise Unavailable("GET: no answer")
        if path == "/version":
            return {"major": "1", "minor": "34+", "gitVersion": "v1.34.4"}
        if path not in self.objects:
            raise NotFound(f"GET {path}: not found", 404)
        return self.objects[path]

    async def text(self, path: str, **query: str) -> str:
        await trio.lowlevel.checkpoint()
        return self.texts[path]

    async def list(self, path: str, *, label_selector: str = "", field_selector: str = "") -> Listing[dict[str, Any]]:
        await trio.lowlevel.checkpoint()
        prefix, _, resource = path.rpartition("/")
        found = [item for key, item in self.objects.items() if key.startswith(f"{prefix}/") and key.split("/")[-2] == resource]
        return Listing(found, "1")

    async def post(self, path: str, body: Mapping[str, Any], **query: str) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if path.endswith("accessreviews"):
            return {"status": {"allowed": not self.denied(body["spec"])}}
        assert query == {"dryRun": "All"}, "check changes nothing"
        made = copy.deepcopy(dict(body))
        if path.endswith("/pods") and self.injects:
            made["spec"]["initContainers"] = [{"name": "pillion-proxy"}]
        if path.endswith("/meshtlsauthentications") and self.validates:
            raise Forbidden(f'admission webhook "policy.pillion.dev" denied the request: {admit(made)}', 403)
        made["metadata"]["creationTimestamp"] = datetime.fromtimestamp(NOW, UTC).isoformat()
        return made


def pod(name: str, namespace: str = "shop", labels: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
        "spec": {"nodeName": "node1", "containers": [{"name": "app", "image": "app:1"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.9", "podIPs": [{"ip": "10.0.0.9"}]},
    }


def meshed_pod(name: str, *, ready: bool = True, image: str = "pillion:0.1.0") -> dict[str, Any]:
    made = pod(name)
    made["spec"]["initContainers"] = [{"name": "pillion-proxy", "image": image, "restartPolicy": "Always"}]
    made["status"]["initContainerStatuses"] = [{"name": "pillion-proxy", "ready": ready}]
    made["metadata"]["annotations"] = {"pillion.dev/status": "injected"}
    return made


async def results_of(api: FakeApi, categories: Any = (*CONTROL_PLANE, *DATA_PLANE), only: str = "", wait_s: float = 0.0) -> list[Result]:
    cluster = Cluster(api, "0.1.0", only, clock=lambda: NOW)
    return await run_checks(categories, cluster, wait_s, lambda *_: None, lambda _: None)


async def wrong(api: FakeApi, **more: Any) -> dict[str, str]:
    """id -> text of what is not as it should be."""
    return {found.check.id: found.text for found in await results_of(api, **more) if found.outcome in ("error", "warning")}
