"""From workload objects to the pods that should exist: names, owners, replicas. Pure; called by local.mesh in every round.

A pod's name follows from its owner, its template and its number, so that comparing what should run with what runs is comparing names.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from core.k8s.fields import InvalidObject, shown
from core.k8s.kinds import kind_meant
from core.refs import Ref
from local.objects import Manifest, pod_template

_NAMED = 10  # workloads that an error lists
MAX_REPLICAS = 200  # a mistyped number must not take the machine down
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # Kubernetes' own for generated names: spells no words


@dataclass(frozen=True)
class PodPlan:
    """A pod that should exist. raw: the whole Pod object before injection. digest: changes when the pod must be replaced.

    backoff_limit: how often a Job's pod is started again, None for every other owner.
    """

    ref: Ref
    owner: Ref
    raw: Mapping[str, Any]
    digest: str
    backoff_limit: int | None = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The pod's metadata."""
        meta: Mapping[str, Any] = self.raw["metadata"]
        return meta


def digest_of(value: object) -> str:
    """Ten letters that change with the value."""
    number = int.from_bytes(hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()[:8], "big")
    letters = ""
    for _ in range(10):
        number, digit = divmod(number, len(_ALPHABET))
        letters += _ALPHABET[digit]
    return letters


def pods_of(manifest: Manifest) -> list[PodPlan]:
    """The pods of one workload object, empty for any other kind; raises InvalidObject for a wrong replica count."""
    kind = manifest.ref.kind
    spec = manifest.raw.get("spec") or {}
    name = manifest.ref.name
    if kind == "Pod":
        return [_pod(manifest, name, manifest.raw, digest_of([manifest.raw.get("spec"), manifest.raw["metadata"]]))]
    if kind not in ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job"):
        return []
    template = pod_template(kind, manifest.raw)
    digest = digest_of(template)
    count = 1 if kind == "DaemonSet" else replica_count(spec, "completions" if kind == "Job" else "replicas")
    pods = []
    for number in range(count):
        pod_name = f"{name}-{number}" if kind == "StatefulSet" else f"{name}-{digest}-{number}"
        pods.append(_pod(manifest, pod_name, template, digest, number))
    return pods


def replica_count(spec: Mapping[str, Any], field: str) -> int:
    """spec.replicas (or completions): default 1, bounded."""
    count = spec.get(field, 1)
    if count is None:
        return 1
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_REPLICAS:
        raise InvalidObject(f"spec.{field}", f"a number from 0 to {MAX_REPLICAS}", shown(count))
    return count


def _pod(manifest: Manifest, name: str, template: Mapping[str, Any], digest: str, number: int = 0) -> PodPlan:
    kind, spec = manifest.ref.kind, manifest.raw.get("spec") or {}
    meta = template.get("metadata") or {}
    labels = dict(meta.get("labels") or {})
    pod_spec = copy.deepcopy(dict(template["spec"]))
    if kind in ("Deployment", "ReplicaSet"):
        labels["pod-template-hash"] = digest
    elif kind == "StatefulSet":
        labels |= {"statefulset.kubernetes.io/pod-name": name, "apps.kubernetes.io/pod-index": str(number)}
        pod_spec.setdefault("hostname", name)
        if service := spec.get("serviceName"):
            pod_spec.setdefault("subdomain", service)
        _claims_as_volumes(pod_spec, spec.get("volumeClaimTemplates") or [])
    elif kind == "Job":
        labels["batch.kubernetes.io/job-name"] = labels["job-name"] = manifest.ref.name
    raw: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": manifest.ref.namespace,
            "labels": labels,
            "annotations": dict(meta.get("annotations") or {}),
        },
        "spec": pod_spec,
    }
    if kind != "Pod":
        version = manifest.raw["apiVersion"]
        raw["metadata"]["ownerReferences"] = [{"apiVersion": version, "kind": kind, "name": manifest.ref.name, "controller": True}]
    limit = spec.get("backoffLimit", 6) if kind == "Job" else None
    return PodPlan(Ref("", "Pod", manifest.ref.namespace, name), manifest.ref, raw, digest, limit)


def _claims_as_volumes(pod_spec: dict[str, Any], claims: list[Any]) -> None:
    """A claimed volume lives as long as the pod here: there is no storage class on one machine."""
    volumes = pod_spec.setdefault("volumes", [])
    volumes += [{"name": claim["metadata"]["name"], "emptyDir": {}} for claim in claims]


def match_workload(pods: Iterable[PodPlan], namespace: str, name: str) -> list[PodPlan]:
    """What ``POD`` on a command line means: the pod of that name, else the pods of the workload of that name."""
    mine = [pod for pod in pods if pod.ref.namespace == namespace]
    kind, slash, short = name.partition("/")
    if slash:
        kind, name = kind_meant(kind), short
        mine = [pod for pod in mine if pod.owner.kind.lower() == kind or kind == "pod"]
    exact = [pod for pod in mine if pod.ref.name == name]
    return exact or sorted((pod for pod in mine if pod.owner.name == name), key=lambda pod: pod.ref.name)


def who_else(workloads: Iterable[tuple[str, str]], namespace: str, name: str) -> str:
    """What may have been meant by a name that nothing in the namespace has. workloads: (namespace, name) of all there are."""
    known = sorted(set(workloads))
    if elsewhere := [of for of, other in known if other == name.rpartition("/")[2] and of != namespace]:
        return " or ".join(f"-n {of}" for of in elsewhere)
    near = [f"{of}/{other}" for of, other in known if of == namespace] or [f"{of}/{other}" for of, other in known]
    further = f" and {len(near) - _NAMED} more" if len(near) > _NAMED else ""
    return f"one of: {', '.join(near[:_NAMED])}{further}; see -n" if near else "pillion local status; no pod is there yet"


def service_account_of(raw: Mapping[str, Any]) -> str:
    """Pod.spec.serviceAccountName, ``default`` when absent."""
    spec = raw.get("spec") or {}
    return spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
