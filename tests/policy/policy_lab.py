"""API objects for policy tests, as short dicts, and an index filled from them."""

from __future__ import annotations

from typing import Any

from core.k8s.objects import Object
from core.names import WorkloadId
from policy.admission import parse_object
from policy.index import Index, IndexSettings, IpKey, Key, PodKey

POLICY = "policy.pillion.dev"
GATEWAY = "gateway.networking.k8s.io"
CART = WorkloadId("cluster.local", "shop", "cart")
CART_POD: Key = PodKey("shop", "cart-0")
CART_IP: Key = IpKey("10.0.0.5")
CART_VIP: Key = IpKey("10.96.0.1")

Raw = dict[str, Any]


def _object(version: str, kind: str, name: str, namespace: str, meta: Raw | None = None, **fields: Any) -> Raw:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace, **(meta or {})}, **fields}


def namespace(name: str = "shop", **annotations: str) -> Raw:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": dotted(annotations)}}


def dotted(annotations: dict[str, str]) -> dict[str, str]:
    """``opaque_ports`` stands for ``config.pillion.dev/opaque-ports``."""
    return {f"config.pillion.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}


def pod(
    name: str = "cart-0",
    ip: str = "10.0.0.5",
    *,
    in_namespace: str = "shop",
    account: str = "cart",
    meshed: bool = True,
    ports: dict[str, int] | None = None,
    labels: dict[str, str] | None = None,
    created: str | None = None,
    phase: str = "Running",
    host_network: bool = False,
    **annotations: str,
) -> Raw:
    status = {"pillion.dev/status": "injected"} if meshed else {}
    meta = {"labels": labels or {"app": "cart"}, "annotations": {**status, **dotted(annotations)}, "creationTimestamp": created}
    listed = [{"name": key, "containerPort": port} for key, port in (ports or {"http": 8080}).items()]
    spec = {"serviceAccountName": account, "containers": [{"name": "app", "ports": listed}], "hostNetwork": host_network}
    return _object("v1", "Pod", name, in_namespace, meta, spec=spec, status={"phase": phase, "podIPs": [{"ip": ip}] if ip else []})


def service(name: str = "cart", vip: str = "10.96.0.1", *, port: int = 80, app_protocol: str | None = None, **annotations: str) -> Raw:
    ports = [{"name": "web", "port": port, "targetPort": "http", "appProtocol": app_protocol}]
    return _object("v1", "Service", name, "shop", {"annotations": dotted(annotations)}, spec={"clusterIP": vip, "ports": ports})


def endpoints(*pods: str, name: str = "cart-1", of: str = "cart", ready: bool | None = True, port: int = 8080, **ips: str) -> Raw:
    """A slice with ``pods`` at 10.0.0.5, .6, ... or ``pod="ip"``."""
    listed = {pod: f"10.0.0.{5 + number}" for number, pod in enumerate(pods)} | {key.replace("_", "-"): ip for key, ip in ips.items()}
    entries = [
        {"addresses": [ip], "conditions": {"ready": ready}, "targetRef": {"kind": "Pod", "name": pod, "namespace": "shop"}}
        for pod, ip in listed.items()
    ]
    family = "IPv6" if any(":" in ip for ip in listed.values()) else "IPv4"
    meta = {"labels": {"kubernetes.io/service-name": of}}
    fields = {"addressType": family, "endpoints": entries, "ports": [{"name": "web", "port": port}]}
    return _object("discovery.k8s.io/v1", "EndpointSlice", name, "shop", meta, **fields)


def server(name: str = "cart", *, port: int | str = 8080, created: str | None = None, selector: Raw | None = None, **spec: Any) -> Raw:
    spec = {"podSelector": {"matchLabels": {"app": "cart"}} if selector is None else selector, "port": port, **spec}
    return _object(f"{POLICY}/v1alpha1", "Server", name, "shop", {"creationTimestamp": created}, spec=spec)


def target(kind: str, name: str) -> Raw:
    group = {"Server": POLICY, "Namespace": ""}.get(kind, GATEWAY)
    return {"group": group, "kind": kind, "name": name}


def ref(kind: str, name: str, in_namespace: str | None = None) -> Raw:
    found = {"group": "" if kind == "ServiceAccount" else POLICY, "kind": kind, "name": name}
    return found | ({"namespace": in_namespace} if in_namespace else {})


def policy(name: str = "allow", *required: Raw, at: Raw | None = None, inherit: bool | None = None, created: str | None = None) -> Raw:
    spec: Raw = {"targetRef": at or target("Server", "cart"), "requiredAuthenticationRefs": list(required)}
    if inherit is not None:
        spec["inherit"] = inherit
    return _object(f"{POLICY}/v1alpha1", "AuthorizationPolicy", name, "shop", {"creationTimestamp": created}, spec=spec)


def mesh_tls(name: str = "friends", *identities: str, in_namespace: str = "shop", refs: list[Raw] | None = None) -> Raw:
    spec: Raw = {"identityRefs": refs} if refs is not None else {"identities": list(identities)}
    return _object(f"{POLICY}/v1alpha1", "MeshTLSAuthentication", name, in_namespace, spec=spec)


def networks(name: str = "office", *cidrs: str, excluded: tuple[str, ...] = (), in_namespace: str = "shop") -> Raw:
    spec = {"networks": [{"cidr": cidr, "except": list(excluded)} for cidr in cidrs]}
    return _object(f"{POLICY}/v1alpha1", "NetworkAuthentication", name, in_namespace, spec=spec)


def route(
    name: str = "web", *, kind: str = "HTTPRoute", path: str = "/", parent: Raw | None = None, created: str | None = None, **rule: Any
) -> Raw:
    parent = parent or {"group": POLICY, "kind": "Server", "name": "cart"}
    if kind == "HTTPRoute":
        rule = {"matches": [{"path": {"type": "PathPrefix", "value": path}}], **rule}
    spec = {"parentRefs": [parent], "rules": [rule]}
    return _object(f"{GATEWAY}/v1", kind, name, "shop", {"creationTimestamp": created}, spec=spec)


def parsed(raw: Raw) -> Object:
    found = parse_object(raw)
    assert found is not None
    return found


def indexed(*raws: Raw, settings: IndexSettings | None = None) -> Index:
    index = Index(settings)
    for raw in raws:
        index.apply(parsed(raw))
    return index
