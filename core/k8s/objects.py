"""Typed views of the core Kubernetes objects: only the fields that somebody here reads, everything else is skipped. Pure.

Field names and defaults are those of the core/v1 and discovery.k8s.io/v1 API reference. Constructed by `read_core_object`
from untrusted dicts; read by policy.index, the injector and the local runner.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, ClassVar, Protocol, TypeVar

import msgspec

from core.k8s import fields
from core.k8s.fields import InvalidObject, Raw
from core.refs import Ref


class View(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """Base of all views: immutable, compared by value, camelCase outside; a tree, so the cycle collector need not look at it."""


class ObjectMeta(View, frozen=True):
    """metadata of any object. creation_timestamp: None in a manifest that no API server has stored yet; such an object is the oldest."""

    name: str
    namespace: str = ""
    uid: str = ""
    creation_timestamp: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    deletion_timestamp: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}

    @property
    def age_key(self) -> tuple[float, str, str]:
        """Sorts oldest first, then by namespace and name: the order that settles every conflict between objects."""
        created = self.creation_timestamp.timestamp() if self.creation_timestamp else float("-inf")
        return created, self.namespace, self.name


class Object(Protocol):
    """What every view and every policy object offers."""

    @property
    def metadata(self) -> ObjectMeta:
        """Name, namespace, age, labels and annotations."""

    @property
    def ref(self) -> Ref:
        """Which object this is."""


class Namespace(View, frozen=True):
    """core/v1 Namespace."""

    metadata: ObjectMeta

    @property
    def ref(self) -> Ref:
        """group ""/Namespace."""
        return Ref("", "Namespace", "", self.metadata.name)


class NodeSpec(View, frozen=True):
    """Node.spec."""

    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: tuple[str, ...] = msgspec.field(default=(), name="podCIDRs")


class Node(View, frozen=True):
    """core/v1 Node."""

    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()

    @property
    def ref(self) -> Ref:
        """group ""/Node."""
        return Ref("", "Node", "", self.metadata.name)

    @property
    def pod_networks(self) -> tuple[str, ...]:
        """Networks from which its pods get addresses, as far as the Node says so: some network plug-ins do not use these."""
        return self.spec.pod_cidrs or ((self.spec.pod_cidr,) if self.spec.pod_cidr else ())


class ServiceAccount(View, frozen=True):
    """core/v1 ServiceAccount."""

    metadata: ObjectMeta

    @property
    def ref(self) -> Ref:
        """group ""/ServiceAccount."""
        return Ref("", "ServiceAccount", self.metadata.namespace, self.metadata.name)


class ContainerPort(View, frozen=True):
    """Pod.spec.containers[].ports[]."""

    container_port: int
    name: str = ""
    protocol: str = "TCP"


class Container(View, frozen=True):
    """Pod.spec.containers[] and initContainers[]."""

    name: str = ""
    ports: tuple[ContainerPort, ...] = ()


class PodSpec(View, frozen=True):
    """Pod.spec."""

    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()
    service_account_name: str = "default"
    host_network: bool = False


class PodIP(View, frozen=True):
    """Pod.status.podIPs[]."""

    ip: str = ""


class Condition(View, frozen=True):
    """Pod.status.conditions[]; status is "True", "False" or "Unknown"."""

    type: str
    status: str = "Unknown"


class PodStatus(View, frozen=True):
    """Pod.status."""

    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: tuple[PodIP, ...] = msgspec.field(default=(), name="podIPs")
    conditions: tuple[Condition, ...] = ()


class Pod(View, frozen=True):
    """core/v1 Pod."""

    metadata: ObjectMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def ref(self) -> Ref:
        """group ""/Pod."""
        return Ref("", "Pod", self.metadata.namespace, self.metadata.name)

    @property
    def ips(self) -> tuple[str, ...]:
        """status.podIPs (or podIP) in canonical text, first one first."""
        listed = tuple(entry.ip for entry in self.status.pod_ips) or (self.status.pod_ip,)
        return tuple(dict.fromkeys(ip for ip in map(canonical_address, listed) if ip))

    @property
    def finished(self) -> bool:
        """The pod has ended for good: its addresses may belong to somebody else by now."""
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def ports(self) -> tuple[ContainerPort, ...]:
        """Declared TCP ports of all containers, native sidecars included."""
        containers = self.spec.containers + self.spec.init_containers
        return tuple(port for container in containers for port in container.ports if port.protocol == "TCP")


class ServicePort(View, frozen=True):
    """Service.spec.ports[]."""

    port: int
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str | None = None
    app_protocol: str = ""


class ServiceSpec(View, frozen=True):
    """Service.spec."""

    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: tuple[str, ...] = msgspec.field(default=(), name="clusterIPs")
    ports: tuple[ServicePort, ...] = ()
    selector: dict[str, str] = {}
    type: str = "ClusterIP"


class Service(View, frozen=True):
    """core/v1 Service."""

    metadata: ObjectMeta
    spec: ServiceSpec = ServiceSpec()

    @property
    def ref(self) -> Ref:
        """group ""/Service."""
        return Ref("", "Service", self.metadata.namespace, self.metadata.name)

    @property
    def vips(self) -> tuple[str, ...]:
        """Virtual addresses in canonical text; none for a headless or ExternalName Service."""
        return tuple(dict.fromkeys(ip for ip in map(canonical_address, (*self.spec.cluster_ips, self.spec.cluster_ip)) if ip))


class EndpointConditions(View, frozen=True):
    """EndpointSlice.endpoints[].conditions; ``ready`` null or absent counts as ready (discovery.k8s.io/v1)."""

    ready: bool | None = None


class TargetRef(View, frozen=True):
    """EndpointSlice.endpoints[].targetRef."""

    kind: str = ""
    name: str = ""
    namespace: str = ""


class SliceEndpoint(View, frozen=True):
    """EndpointSlice.endpoints[]; the addresses are interchangeable, consumers use the first."""

    addresses: tuple[str, ...]
    conditions: EndpointConditions = EndpointConditions()
    target_ref: TargetRef | None = None


class SlicePort(View, frozen=True):
    """EndpointSlice.ports[]; ``name`` is the Service port's, ``port`` absent means every port."""

    name: str = ""
    port: int | None = None
    protocol: str = "TCP"


class EndpointSlice(View, frozen=True):
    """discovery.k8s.io/v1 EndpointSlice."""

    SERVICE_LABEL: ClassVar[str] = "kubernetes.io/service-name"

    metadata: ObjectMeta
    address_type: str = "IPv4"
    endpoints: tuple[SliceEndpoint, ...] = ()
    ports: tuple[SlicePort, ...] = ()

    @property
    def ref(self) -> Ref:
        """group discovery.k8s.io/EndpointSlice."""
        return Ref("discovery.k8s.io", "EndpointSlice", self.metadata.namespace, self.metadata.name)

    @property
    def service(self) -> str:
        """Name of the Service (of the same namespace) this slice belongs to, "" when of none."""
        return self.metadata.labels.get(self.SERVICE_LABEL, "")


def canonical_address(text: str) -> str:
    """The address as the sidecars spell it, "" for what is none ("None" of a headless Service)."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return ""
    return str(getattr(ip, "ipv4_mapped", None) or ip)


V = TypeVar("V", Namespace, Node, ServiceAccount, Pod, Service, EndpointSlice)
CoreObject = Namespace | Node | ServiceAccount | Pod | Service | EndpointSlice

_VIEWS: Mapping[tuple[str, str], type[CoreObject]] = {
    ("", "Namespace"): Namespace,
    ("", "Node"): Node,
    ("", "ServiceAccount"): ServiceAccount,
    ("", "Pod"): Pod,
    ("", "Service"): Service,
    ("discovery.k8s.io", "EndpointSlice"): EndpointSlice,
}


def read_core_object(raw: Raw) -> CoreObject | None:
    """The view of a core object, None for a kind that nobody here reads; raises InvalidObject."""
    group, kind = group_kind(raw)
    view = _VIEWS.get((group, kind))
    if view is None:
        return None
    if view in (Namespace, Node):
        cluster_wide = dict(raw, metadata=fields.read(raw.get("metadata"), dict, "metadata") | {"namespace": ""})
        parsed = fields.read(cluster_wide, view)
        fields.object_name("metadata.name", parsed.metadata.name)
        return parsed
    return fields.read(namespaced(raw), view)


def read_meta(raw: Raw) -> ObjectMeta:
    """metadata of a namespaced object; no namespace means ``default``, as kubectl has it."""
    if raw.get("metadata") is None:
        raise InvalidObject("metadata", "a value", "nothing")
    meta = fields.read(raw["metadata"], ObjectMeta, "metadata")
    fields.object_name("metadata.name", meta.name)
    if not meta.namespace:
        return msgspec.structs.replace(meta, namespace="default")
    fields.object_name("metadata.namespace", meta.namespace)
    return meta


def namespaced(raw: Raw) -> Raw:
    """``raw`` with checked metadata and its default namespace filled in."""
    meta = read_meta(raw)
    return dict(raw, metadata=dict(raw["metadata"], namespace=meta.namespace))


def group_kind(raw: Raw) -> tuple[str, str]:
    """API group ("" for core) and kind of any object; raises InvalidObject when they are missing."""
    version, kind = raw.get("apiVersion"), raw.get("kind")
    if not isinstance(version, str) or not version:
        raise InvalidObject("apiVersion", "GROUP/VERSION", fields.shown(version) if version is not None else "nothing")
    if not isinstance(kind, str) or not kind:
        raise InvalidObject("kind", "the kind of the object", fields.shown(kind) if kind is not None else "nothing")
    group, slash, _ = version.rpartition("/")
    return (group if slash else ""), kind
