"""The objects of the index with the ways to find them; knows who refers to whom, and nothing of what that means. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from core.k8s.objects import EndpointSlice, Namespace, Object, Pod, Service, canonical_address
from core.refs import Ref
from policy.gateway import InboundRoute
from policy.model import AuthorizationPolicy, MeshTLSAuthentication, NetworkAuthentication, Server

Named = tuple[str, str]  # namespace, name

_NOTHING: Mapping[str, str] = {}


class Store:
    """Every map is from a name to whole objects; an entry that becomes empty is removed, so nothing grows for ever."""

    def __init__(self) -> None:
        self.objects: dict[Ref, Object] = {}
        self.namespaces: dict[str, Namespace] = {}
        self.pods: dict[str, dict[str, Pod]] = {}
        self.pods_by_ip: dict[str, dict[Named, Pod]] = {}
        self.services: dict[str, dict[str, Service]] = {}
        self.services_by_ip: dict[str, dict[Named, Service]] = {}
        self.slices: dict[Named, dict[str, EndpointSlice]] = {}
        self.slices_of_pod: dict[Named, dict[Ref, Named]] = {}
        self.slices_of_ip: dict[str, dict[Ref, Named]] = {}
        self.servers: dict[str, dict[str, Server]] = {}
        self.policies: dict[str, dict[str, AuthorizationPolicy]] = {}
        self.policies_by_required: dict[Ref, dict[Ref, AuthorizationPolicy]] = {}
        self.routes: dict[str, dict[Ref, InboundRoute]] = {}
        self.routes_by_service: dict[Named, dict[Ref, InboundRoute]] = {}
        self.routes_by_backend: dict[Named, dict[Ref, InboundRoute]] = {}
        self.authentications: dict[Ref, MeshTLSAuthentication | NetworkAuthentication] = {}

    def put(self, object_: Object) -> None:
        """Add an object whose older version is not (or no longer) here."""
        self.objects[object_.ref] = object_
        for index, outer, inner, value in self._places(object_):
            index.setdefault(outer, {})[inner] = value
        if isinstance(object_, Namespace):
            self.namespaces[object_.metadata.name] = object_
        elif isinstance(object_, MeshTLSAuthentication | NetworkAuthentication):
            self.authentications[object_.ref] = object_

    def drop(self, object_: Object) -> None:
        """Remove exactly what `put` added."""
        del self.objects[object_.ref]
        for index, outer, inner, _ in self._places(object_):
            entries = index.get(outer, {})
            entries.pop(inner, None)
            if not entries:
                index.pop(outer, None)
        if isinstance(object_, Namespace):
            self.namespaces.pop(object_.metadata.name, None)
        elif isinstance(object_, MeshTLSAuthentication | NetworkAuthentication):
            self.authentications.pop(object_.ref, None)

    def _places(self, object_: Object) -> Iterator[tuple[dict[Any, Any], object, object, object]]:
        """(map, outer key, inner key, value) of every entry that ``object_`` has in the maps of maps."""
        namespace, name = object_.metadata.namespace, object_.metadata.name
        if isinstance(object_, Pod):
            yield self.pods, namespace, name, object_
            for ip in object_.ips:
                yield self.pods_by_ip, ip, (namespace, name), object_
        elif isinstance(object_, Service):
            yield self.services, namespace, name, object_
            for ip in object_.vips:
                yield self.services_by_ip, ip, (namespace, name), object_
        elif isinstance(object_, EndpointSlice):
            if object_.service:
                yield self.slices, (namespace, object_.service), name, object_
            for pod in pods_of(object_):
                yield self.slices_of_pod, pod, object_.ref, (namespace, object_.service)
            for ip in unnamed_ips_of(object_):
                yield self.slices_of_ip, ip, object_.ref, (namespace, object_.service)
        elif isinstance(object_, Server):
            yield self.servers, namespace, name, object_
        elif isinstance(object_, AuthorizationPolicy):
            yield self.policies, namespace, name, object_
            for required in object_.required:
                yield self.policies_by_required, required, object_.ref, object_
        elif isinstance(object_, InboundRoute):
            yield from self._places_of_route(object_)

    def _places_of_route(self, route: InboundRoute) -> Iterator[tuple[dict[Any, Any], object, object, object]]:
        if route.servers or route.unattachable:
            yield self.routes, route.metadata.namespace, route.ref, route
        if route.forwarding is not None:
            for parent in {(parent.namespace, parent.name) for parent in route.forwarding.parents}:
                yield self.routes_by_service, parent, route.ref, route
            references = (reference for rule in route.forwarding.rules for reference in rule.references)
            for backend in {(reference.namespace, reference.name) for reference in references}:
                yield self.routes_by_backend, backend, route.ref, route

    def namespace_annotations(self, namespace: str) -> Mapping[str, str]:
        """Annotations of a namespace; none for one that is not known (yet)."""
        found = self.namespaces.get(namespace)
        return found.metadata.annotations if found else _NOTHING

    def pod_at(self, ip: str) -> Pod | None:
        """The pod that owns an address: not one that ended or that shares the node's; of several the youngest."""
        owners = [pod for pod in self.pods_by_ip.get(ip, {}).values() if not pod.finished and not pod.spec.host_network]
        return max(owners, key=lambda pod: pod.metadata.age_key, default=None)

    def service_at(self, ip: str) -> Service | None:
        """The Service a virtual address belongs to; of several the oldest."""
        return min(self.services_by_ip.get(ip, {}).values(), key=lambda service: service.metadata.age_key, default=None)

    def services_of(self, pod: Pod) -> Iterator[Service]:
        """Services that have the pod among their endpoints, ready or not."""
        found = set(self.slices_of_pod.get((pod.metadata.namespace, pod.metadata.name), {}).values())
        for ip in pod.ips:
            found.update(self.slices_of_ip.get(ip, {}).values())
        for namespace, name in found:
            service = self.services.get(namespace, {}).get(name)
            if service is not None:
                yield service


def pods_of(slice_: EndpointSlice) -> set[Named]:
    """Pods that an EndpointSlice names as targets."""
    refs = (endpoint.target_ref for endpoint in slice_.endpoints)
    return {(ref.namespace or slice_.metadata.namespace, ref.name) for ref in refs if ref is not None and ref.kind == "Pod"}


def unnamed_ips_of(slice_: EndpointSlice) -> set[str]:
    """Addresses of endpoints that name no pod, as somebody writes them by hand: they may be some pod's all the same."""
    return {
        canonical_address(endpoint.addresses[0])
        for endpoint in slice_.endpoints
        if endpoint.addresses and (endpoint.target_ref is None or endpoint.target_ref.kind != "Pod")
    }
