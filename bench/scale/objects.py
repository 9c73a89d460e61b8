"""The simulated cluster as API objects: pods as large as real ones, in as many namespaces, Services and policies as asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Raw = dict[str, Any]
POLICY = "policy.pillion.dev/v1alpha1"
PORT = 8080
POPULAR = "10.96.0.10:80"
"""A Service that every sidecar uses, as everybody uses the cluster's DNS or its login."""


@dataclass(frozen=True)
class Size:
    """Objects of each sort, spread evenly over the namespaces."""

    pods: int = 10_000
    services: int = 1_000
    policies: int = 1_000
    sidecars: int = 2_000
    namespaces: int = 100

    @property
    def services_each(self) -> int:
        return self.services // self.namespaces

    @property
    def pods_each(self) -> int:
        """Of one Service."""
        return self.pods // self.services


def namespace_of(number: int) -> str:
    return f"team-{number:03}"


def ip_of(number: int) -> str:
    """Addresses of loopback, so that a simulated sidecar can speak from its own."""
    return f"127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}"


def vip_of(service: int) -> str:
    return f"10.97.{service // 250}.{1 + service % 250}"


def pod_number(size: Size, service: int, member: int) -> int:
    return service * size.pods_each + member


def everything(size: Size) -> Iterator[Raw]:
    """All objects of the cluster."""
    for number in range(size.namespaces):
        yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace_of(number)}}
        yield _object(
            POLICY, "MeshTLSAuthentication", "friends", number, {"identityRefs": [{"kind": "Namespace", "name": namespace_of(number)}]}
        )
    yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shared"}}
    for service in range(size.services):
        yield service_object(size, service)
        yield slice_object(size, service)
        for member in range(size.pods_each):
            yield pod_object(size, service, member)
    for number in range(size.policies):
        yield server_object(size, number % size.services)
        yield policy_object(size, number % size.services)
    yield _popular_service()
    yield popular_slice()


def pod_object(size: Size, service: int, member: int, generation: int = 0) -> Raw:
    """Some 6 KB, as a pod with two containers and a sidecar has."""
    number = pod_number(size, service, member)
    name = f"svc-{service}-{generation}-{member}"
    environment = [{"name": f"SETTING_{index}", "value": f"value-{index}-of-{name}"} for index in range(25)]
    containers = [
        {
            "name": container,
            "image": f"registry.example/{container}:1.2.3",
            "env": environment,
            "ports": [{"name": "http", "containerPort": PORT}] if container == "app" else [],
            "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
            "volumeMounts": [{"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}],
        }
        for container in ("app", "pillion-proxy")
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace_of(service // size.services_each),
            "uid": f"00000000-0000-0000-0000-{number:012}",
            "labels": {"app": f"svc-{service}", "pod-template-hash": "5f5d989b47", "app.kubernetes.io/part-of": "bench"},
            "annotations": {"pillion.dev/status": "injected", "example.com/note": "x" * 500},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"svc-{service}", "uid": "1", "controller": True}],
        },
        "spec": {"serviceAccountName": "app", "nodeName": f"node-{number % 100}", "containers": containers},
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": ip_of(number)}],
            "podIP": ip_of(number),
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
            "containerStatuses": [{"name": "app", "ready": True, "restartCount": 0, "imageID": "sha256:" + "0" * 64}],
        },
    }


def service_object(size: Size, service: int) -> Raw:
    spec = {
        "clusterIP": vip_of(service),
        "selector": {"app": f"svc-{service}"},
        "ports": [{"name": "http", "port": 80, "targetPort": PORT}],
    }
    return _object("v1", "Service", f"svc-{service}", service // size.services_each, spec)


def slice_object(size: Size, service: int, unready: int = -1, generation: int = 0) -> Raw:
    """unready: the member that is not, -1 for none."""
    namespace = namespace_of(service // size.services_each)
    endpoints = [
        {
            "addresses": [ip_of(pod_number(size, service, member))],
            "conditions": {"ready": member != unready},
            "targetRef": {"kind": "Pod", "namespace": namespace, "name": f"svc-{service}-{generation}-{member}"},
        }
        for member in range(size.pods_each)
    ]
    return _slice(f"svc-{service}", namespace, endpoints)


def _popular_service() -> Raw:
    spec = {"clusterIP": POPULAR.partition(":")[0], "ports": [{"name": "http", "port": 80, "targetPort": PORT}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "popular", "namespace": "shared"}, "spec": spec}


def popular_slice(last: int = 99) -> Raw:
    endpoints = [{"addresses": [f"10.200.0.{1 + member}"], "conditions": {"ready": member != last}} for member in range(100)]
    return _slice("popular", "shared", endpoints)


def _slice(service: str, namespace: str, endpoints: list[Raw]) -> Raw:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{service}-x", "namespace": namespace, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
    }


def server_object(size: Size, service: int, access: str = "deny") -> Raw:
    spec = {"podSelector": {"matchLabels": {"app": f"svc-{service}"}}, "port": PORT, "accessPolicy": access}
    return _object(POLICY, "Server", f"svc-{service}", service // size.services_each, spec)


def policy_object(size: Size, service: int, account: str = "") -> Raw:
    """account: who is let in instead of the namespace's friends."""
    ref = {"group": "policy.pillion.dev", "kind": "MeshTLSAuthentication", "name": "friends"}
    target = {"group": "policy.pillion.dev", "kind": "Server", "name": f"svc-{service}"}
    required = [{"kind": "ServiceAccount", "name": account}] if account else [ref]
    spec = {"targetRef": target, "requiredAuthenticationRefs": required}
    return _object(POLICY, "AuthorizationPolicy", f"svc-{service}", service // size.services_each, spec)


def friends_object(number: int, other: str) -> Raw:
    """The authentication that all policies of a namespace name, with one more namespace in it."""
    refs = [{"kind": "Namespace", "name": name} for name in (namespace_of(number), other)]
    return _object(POLICY, "MeshTLSAuthentication", "friends", number, {"identityRefs": refs})


def _object(version: str, kind: str, name: str, namespace: int, spec: Raw) -> Raw:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace_of(namespace)}, "spec": spec}
