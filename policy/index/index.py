"""The index: apply, delete and reset change it and say which subjects changed; inbound policies and destinations are asked of it. Pure.

A verb costs what it touches: an EndpointSlice its Service's addresses, a pod itself and the Services it stands behind, a Server the pods
it selects, everything else about policy the pods of one namespace. Answers are computed when asked; those of a Server are remembered until
something of its namespace changes, because they are the same for each of its pods.

Callers: policy.controller feeds it, policy.server asks it. One thread only.
"""

from __future__ import annotations

import msgspec

from core.k8s.objects import EndpointSlice, Namespace, Object, Pod, Service
from core.refs import Ref, default_ref
from policy import wire
from policy.gateway import InboundRoute
from policy.index import destinations, inbound, options, routing
from policy.index.keys import IpKey, Key, PodKey
from policy.index.settings import IndexSettings
from policy.index.store import Store
from policy.model import AuthorizationPolicy, MeshTLSAuthentication, NetworkAuthentication, Server

_DENY_ALL = wire.InboundPolicy(default_ref("deny"), "detect", ())


class Index:
    """settings: facts about the cluster that are no objects. store: for reports (policy.index.report) only; changed by the verbs alone."""

    def __init__(self, settings: IndexSettings | None = None) -> None:
        self.settings = settings or IndexSettings()
        self.store = Store()
        self._server_policies: dict[str, dict[Ref, wire.InboundPolicy]] = {}

    def apply(self, object_: Object) -> set[Key]:
        """The object is as given; returns every subject whose answer may differ now, none when nothing that we read changed."""
        old = self.store.objects.get(object_.ref)
        if old == object_:
            return set()
        changed: set[Key] = set()
        if old is not None:
            changed |= self._affected(old)
            self.store.drop(old)
        self.store.put(object_)
        return changed | self._affected(object_)

    def delete(self, ref: Ref) -> set[Key]:
        """The object is gone; one that was not known changes nothing."""
        old = self.store.objects.get(ref)
        if old is None:
            return set()
        changed = self._affected(old)
        self.store.drop(old)
        return changed

    def reset(self, group: str, kind: str, objects: tuple[Object, ...]) -> set[Key]:
        """These are all objects of the kind: each is applied, every other one deleted. Unchanged objects change nothing."""
        changed: set[Key] = set()
        kept = {object_.ref for object_ in objects}
        for ref in [ref for ref in self.store.objects if (ref.group, ref.kind) == (group, kind) and ref not in kept]:
            changed |= self.delete(ref)
        for object_ in objects:
            changed |= self.apply(object_)
        return changed

    def inbound_policy(self, namespace: str, pod: str, port: int) -> wire.InboundPolicy:
        """The policy of a port of a pod; nobody is let in at a pod that is not known."""
        found = self.pod(namespace, pod)
        if found is None:
            return _DENY_ALL
        servers = inbound.servers_for(self.store, found, port)
        policy = self._server_policy(servers[0]) if servers else self._default_policy(found, port)
        if inbound.port_in_list(self.store, found, port, options.UNCHECKED_PATH_PORTS):
            return msgspec.structs.replace(policy, check_paths=False)
        return policy

    def destination(self, addr: str, namespace: str = "") -> wire.Destination:
        """What stands behind ``ip:port`` for a client in ``namespace``; raises core.addrs.InvalidAddr."""
        return destinations.resolve(self.store, addr, self.settings, namespace)

    def scope(self, ip: str, namespace: str) -> str:
        """``namespace`` when clients in it get another answer than everybody about this address, else ""."""
        service = self.store.service_at(ip)
        return routing.consumer_scope(self.store, service, namespace) if service is not None else ""

    def pod(self, namespace: str, name: str) -> Pod | None:
        """The pod, None when it is not known."""
        return self.store.pods.get(namespace, {}).get(name)

    def identity(self, pod: Pod) -> str:
        """The SPIFFE URI that the pod's sidecar must prove."""
        return inbound.identity(self.settings, pod.metadata.namespace, pod.spec.service_account_name)

    def _server_policy(self, server: Server) -> wire.InboundPolicy:
        known = self._server_policies.setdefault(server.metadata.namespace, {})
        policy = known.get(server.ref)
        if policy is None:
            policy = inbound.server_policy(self.store, server, self.settings) or wire.InboundPolicy(server.ref, server.protocol, ())
            known[server.ref] = policy
        return policy

    def _default_policy(self, pod: Pod, port: int) -> wire.InboundPolicy:
        name = inbound.port_default(self.store, pod, port, self.settings).name
        protocol = inbound.port_protocol(self.store, pod, port, self.settings)
        return wire.InboundPolicy(default_ref(name), protocol, inbound.access(name, self.settings))

    def _affected(self, object_: Object) -> set[Key]:
        """Subjects whose answer depends on the object, by what the store holds at this moment; forgets remembered answers."""
        namespace = object_.metadata.namespace
        if isinstance(object_, EndpointSlice):
            service = self.store.services.get(namespace, {}).get(object_.service)
            return self._service_keys(service) if service is not None else set()
        if isinstance(object_, Service):
            return self._service_keys(object_)
        if isinstance(object_, Pod):
            return self._pod_keys(object_)
        if isinstance(object_, Namespace):
            return self._namespace_keys(object_.metadata.name)
        if isinstance(object_, Server):
            self._server_policies.pop(namespace, None)
            pods = self.store.pods.get(namespace, {}).values()
            return {key for pod in pods if object_.pod_selector.matches(pod.metadata.labels) for key in self._pod_keys(pod)}
        if isinstance(object_, AuthorizationPolicy):
            return self._policies_of({namespace})
        if isinstance(object_, InboundRoute):
            return self._route_keys(object_)
        if isinstance(object_, MeshTLSAuthentication | NetworkAuthentication):
            users = self.store.policies_by_required.get(object_.ref, {})
            return self._policies_of({policy.metadata.namespace for policy in users.values()})
        return set()

    def _policies_of(self, namespaces: set[str]) -> set[Key]:
        for namespace in namespaces:
            self._server_policies.pop(namespace, None)
        return {PodKey(namespace, pod) for namespace in namespaces for pod in self.store.pods.get(namespace, {})}

    def _pod_keys(self, pod: Pod) -> set[Key]:
        keys: set[Key] = {PodKey(pod.metadata.namespace, pod.metadata.name)}
        keys.update(IpKey(ip) for ip in pod.ips)
        for service in self.store.services_of(pod):
            keys |= self._service_keys(service)
        return keys

    def _service_keys(self, service: Service) -> set[Key]:
        """Its own addresses, and those of Services whose routes lead to it."""
        keys = _vips(service)
        for route in self.store.routes_by_backend.get((service.metadata.namespace, service.metadata.name), {}).values():
            keys |= self._parent_keys(route)
        return keys

    def _route_keys(self, route: InboundRoute) -> set[Key]:
        keys = self._policies_of({route.metadata.namespace}) if route.servers else set()
        return keys | self._parent_keys(route)

    def _parent_keys(self, route: InboundRoute) -> set[Key]:
        keys: set[Key] = set()
        for parent in route.forwarding.parents if route.forwarding else ():
            service = self.store.services.get(parent.namespace, {}).get(parent.name)
            if service is not None:
                keys |= _vips(service)
        return keys

    def _namespace_keys(self, namespace: str) -> set[Key]:
        keys: set[Key] = set()
        for pod in self.store.pods.get(namespace, {}).values():
            keys.add(PodKey(namespace, pod.metadata.name))
            keys.update(IpKey(ip) for ip in pod.ips)
        for service in self.store.services.get(namespace, {}).values():
            keys |= self._service_keys(service)
        return keys


def _vips(service: Service) -> set[Key]:
    return {IpKey(ip) for ip in service.vips}
