"""The API objects that describe a bench stage to Pillion's policy controller: pods, the service, and the rules as routes.

Pure: a `Setup` in, plain JSON objects out. Called by `bench.contestants.pillion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.certs import NAMESPACE
from bench.contestants.base import AppProtocol, Rule, Setup
from bench.stage import APP_PORT, CLIENT_IP, SERVICE_IP, SERVICE_PORT

POLICY = "policy.pillion.dev/v1alpha1"
GATEWAY = "gateway.networking.k8s.io/v1"
_PROTOCOLS: dict[AppProtocol, str] = {"http1": "HTTP/1", "http2": "HTTP/2", "opaque": "opaque"}

Object = dict[str, Any]


def objects(setup: Setup, endpoints: Sequence[str]) -> list[Object]:
    """Everything the controller should know. endpoints: addresses of the server pod, a pod object for each."""
    found = [_object("v1", "Namespace", NAMESPACE, namespace=None)]
    found += [_object("v1", "ServiceAccount", account) for account in ("client", "server")]
    found.append(pod("client-0", "client", CLIENT_IP))
    found += [pod(f"server-{index}", "server", ip) for index, ip in enumerate(endpoints)]
    found += [_service(), _slice(endpoints)]
    server = {
        "podSelector": {"matchLabels": {"app": "server"}},
        "port": APP_PORT,
        "proxyProtocol": _PROTOCOLS[setup.app],
        "accessPolicy": "deny",
    }
    found.append(_object(POLICY, "Server", "app", spec=server))
    identities = {"identityRefs": [{"kind": "ServiceAccount", "name": "client"}]}
    found.append(_object(POLICY, "MeshTLSAuthentication", "client", spec=identities))
    if setup.app == "opaque":
        found.append(_allow("app", "policy.pillion.dev", "Server"))
    else:
        for index, rule in enumerate(setup.rules):
            found += [_route(f"route-{index:04}", rule), _allow(f"route-{index:04}", "gateway.networking.k8s.io", "HTTPRoute")]
    return found


def pod(name: str, account: str, ip: str) -> Object:
    """A running, ready pod with a sidecar."""
    meta = {"annotations": {"pillion.dev/status": "injected"}, "labels": {"app": account}, "uid": f"uid-{name}"}
    ports = [{"name": "app", "containerPort": APP_PORT}] if account == "server" else []
    spec = {"serviceAccountName": account, "containers": [{"name": "app", "ports": ports}]}
    status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}]}
    return _object("v1", "Pod", name, meta=meta, spec=spec) | {"status": status}


def _object(
    version: str, kind: str, name: str, *, namespace: str | None = NAMESPACE, meta: Object | None = None, spec: Any = None
) -> Object:
    metadata = {
        "name": name,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        **({"namespace": namespace} if namespace else {}),
        **(meta or {}),
    }
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **({"spec": spec} if spec is not None else {})}


def _service() -> Object:
    ports = [{"name": "app", "port": SERVICE_PORT, "targetPort": APP_PORT, "protocol": "TCP"}]
    spec = {"clusterIP": SERVICE_IP, "clusterIPs": [SERVICE_IP], "selector": {"app": "server"}, "ports": ports}
    return _object("v1", "Service", "service", spec=spec)


def _slice(endpoints: Sequence[str]) -> Object:
    meta = {"labels": {"kubernetes.io/service-name": "service"}}
    return _object("discovery.k8s.io/v1", "EndpointSlice", "service-ipv4-0", meta=meta) | {
        "addressType": "IPv4",
        "ports": [{"name": "app", "port": APP_PORT, "protocol": "TCP"}],
        "endpoints": [
            {
                "addresses": [ip],
                "conditions": {"ready": True, "serving": True},
                "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": f"server-{index}"},
            }
            for index, ip in enumerate(endpoints)
        ],
    }


def _route(name: str, rule: Rule) -> Object:
    parent = {"group": "policy.pillion.dev", "kind": "Server", "name": "app"}
    match = {"method": rule.method, "path": {"type": "PathPrefix", "value": rule.prefix}}
    return _object(GATEWAY, "HTTPRoute", name, spec={"parentRefs": [parent], "rules": [{"matches": [match]}]})


def _allow(name: str, group: str, kind: str) -> Object:
    required = [{"group": "policy.pillion.dev", "kind": "MeshTLSAuthentication", "name": "client"}]
    spec = {"targetRef": {"group": group, "kind": kind, "name": name}, "requiredAuthenticationRefs": required}
    return _object(POLICY, "AuthorizationPolicy", name, spec=spec)
