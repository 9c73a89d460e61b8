"""Which pods exist in the cluster, for a rotation: listed when it is asked, never watched, because rotations are rare."""

from __future__ import annotations

from typing import Any

from core.k8s.api import Api, Object, object_path
from core.names import WorkloadId
from identity.cluster.census import PodFact
from identity.wire import AUDIENCE

_NOT_ENDED = "status.phase!=Succeeded,status.phase!=Failed"


async def list_pods(api: Api, ours: WorkloadId) -> list[PodFact]:
    """Every pod that has not ended and is no replica of ours, read from the API server's store and not from its cache. Raises ApiError."""
    listing = await api.list("/api/v1/pods", field_selector=_NOT_ENDED, each=lambda pod: None if is_replica(pod, ours) else pod_fact(pod))
    return [fact for fact in listing.items if fact is not None]


async def list_replicas(api: Api, ours: WorkloadId) -> list[tuple[str, str]]:
    """(name, IP) of every pod that serves as ``ours``, or may: those that end are among them, those without an address are not."""
    path = object_path("", "v1", "pods", ours.namespace)
    listing = await api.list(path, field_selector=_NOT_ENDED, each=lambda pod: _address(pod) if is_replica(pod, ours) else None)
    return [found for found in listing.items if found is not None]


def is_replica(pod: Object, ours: WorkloadId) -> bool:
    """Whether the pod runs as our own service account."""
    metadata, spec = _mapping(pod.get("metadata")), _mapping(pod.get("spec"))
    return (metadata.get("namespace"), spec.get("serviceAccountName")) == (ours.namespace, ours.service_account)


def _address(pod: Object) -> tuple[str, str] | None:
    fact, ip = pod_fact(pod), _mapping(pod.get("status")).get("podIP")
    return (str(_mapping(pod.get("metadata")).get("name")), str(ip)) if fact is not None and ip else None


def pod_fact(pod: Object) -> PodFact | None:
    """What is kept of a pod; None of one that has ended."""
    metadata, status = _mapping(pod.get("metadata")), _mapping(pod.get("status"))
    phase = str(status.get("phase", ""))
    if phase in ("Succeeded", "Failed"):
        return None
    name = f"{metadata.get('namespace', '')}/{metadata.get('name', '')}"
    return PodFact(str(metadata.get("uid", "")), name, _asks_us(_mapping(pod.get("spec"))), phase == "Running")


def _asks_us(spec: dict[str, Any]) -> bool:
    """Whether a token for the identity service is mounted: true of everything injected and of the control plane."""
    for volume in spec.get("volumes") or ():
        for source in _mapping(_mapping(volume).get("projected")).get("sources") or ():
            if _mapping(_mapping(source).get("serviceAccountToken")).get("audience") == AUDIENCE:
                return True
    return False


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
