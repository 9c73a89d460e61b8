"""What stands behind a dialled address: a Service's ready endpoints, a pod, nothing of the mesh, or a port that is not there. Pure.

An endpoint has an identity only when its sidecar is known to be there (the injector's annotation) and to take the port. Then the
dialling sidecar demands that identity, so a stale answer can fail a connection but never send it to somebody else in plaintext. An endpoint
whose pod is not known (yet) is left out, because nobody can say whether it has a sidecar; one that names no pod is the pod at its address.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from core.addrs import Addr, InvalidAddr, canonical_ip, parse_addr
from core.k8s.objects import EndpointSlice, Pod, Service, ServicePort, SliceEndpoint
from policy import wire
from policy.index import inbound, options, routing
from policy.index.settings import IndexSettings
from policy.index.store import Store

_ADMIN_PORT = 4191  # of every sidecar, never redirected to it: a meshed Prometheus scrapes it as an unmeshed one does
_APP_PROTOCOLS: dict[str, wire.Protocol] = {
    "http": "http1",
    "kubernetes.io/ws": "http1",
    "http2": "http2",
    "h2c": "http2",
    "kubernetes.io/h2c": "http2",
    "grpc": "grpc",
    "https": "tls",
    "kubernetes.io/wss": "tls",
    "tls": "tls",
    "pillion.dev/opaque": "opaque",
    "pillion.dev/tcp": "opaque",
}
"""Service.spec.ports[].appProtocol. Linkerd makes every value it does not know opaque, ``grpc`` included; here such a port is detected.

So is ``tcp``: it is written at ports of HTTP too, whose sidecar would refuse requests among opaque bytes unless the pod's port is opaque.
"""


def resolve(store: Store, addr: str, settings: IndexSettings, namespace: str = "") -> wire.Destination:
    """What stands behind ``ip:port`` for a client in ``namespace``; raises core.addrs.InvalidAddr."""
    dialled = parse_addr(addr)
    service = store.service_at(dialled.ip)
    if service is not None:
        return _service(store, service, dialled, settings, namespace)
    pod = store.pod_at(dialled.ip)
    if pod is None:
        return wire.Destination("external", None, _external_protocol(dialled.port, settings))
    protocol = inbound.port_protocol(store, pod, dialled.port, settings)
    return wire.Destination("pod", pod.ref, protocol, (_endpoint(dialled, pod, settings),))


def _external_protocol(port: int, settings: IndexSettings) -> wire.Protocol:
    return "opaque" if options.read_port_list(settings.opaque_ports).holds(port) else "detect"


def _service(store: Store, service: Service, dialled: Addr, settings: IndexSettings, namespace: str) -> wire.Destination:
    port = next((entry for entry in service.spec.ports if entry.port == dialled.port and entry.protocol == "TCP"), None)
    if port is None:
        return wire.Destination("refused", service.ref, "detect")
    ipv6 = ":" in dialled.ip

    def endpoints(of: Service, at: ServicePort) -> tuple[wire.Endpoint, ...]:
        ready = _ready(store, of, at, ipv6)
        return tuple(_endpoint(addr, ready[addr], settings) for addr in sorted(ready))

    protocol = _service_protocol(store, service, port, _ready(store, service, port, ipv6), settings)
    routes, backends = routing.routing(store, service, port, namespace, endpoints)
    return wire.Destination("service", service.ref, protocol, endpoints(service, port), routes, backends)


def _ready(store: Store, service: Service, port: ServicePort, ipv6: bool) -> dict[Addr, Pod | None]:
    """Ready endpoints of a Service port with their pods: of the dialled address's family, else of the other one."""
    slices = store.slices.get((service.metadata.namespace, service.metadata.name), {}).values()
    family, other = ("IPv6", "IPv4") if ipv6 else ("IPv4", "IPv6")
    for wanted in (family, other):
        found = {
            addr: pod
            for slice_ in slices
            if slice_.address_type == wanted
            for endpoint, addr in _slice_addrs(slice_, port)
            for pod in _behind(store, endpoint, addr, slice_.metadata.namespace)
        }
        if found:
            return found
    return {}


def _slice_addrs(slice_: EndpointSlice, port: ServicePort) -> Iterator[tuple[SliceEndpoint, Addr]]:
    """A slice's port has the name of the Service's; without a number it stands for the Service's target."""
    listed = next((entry for entry in slice_.ports if entry.name == port.name and entry.protocol == "TCP"), None)
    if listed is None:
        return
    target = listed.port or (port.target_port if isinstance(port.target_port, int) else port.port)
    for endpoint in slice_.endpoints:
        if endpoint.conditions.ready is False or not endpoint.addresses:
            continue
        try:
            yield endpoint, Addr(canonical_ip(endpoint.addresses[0]), target)
        except InvalidAddr:
            continue  # an address nobody can dial is no endpoint; the API server validates these


def _behind(store: Store, endpoint: SliceEndpoint, addr: Addr, namespace: str) -> tuple[Pod | None, ...]:
    """The pod that an endpoint is, None when it is no pod; nothing when it is one that is not known.

    Who writes a slice may name any pod beside any address. At one that is not its own the pod has to prove itself, or is nobody: plaintext
    could go to a pod that has a sidecar.
    """
    ref = endpoint.target_ref
    if ref is None or ref.kind != "Pod":
        return (store.pod_at(addr.ip),)
    pod = store.pods.get(ref.namespace or namespace, {}).get(ref.name)
    return (pod,) if pod is not None and (addr.ip in pod.ips or _takes_tls(pod, addr.port)) else ()


def _endpoint(addr: Addr, pod: Pod | None, settings: IndexSettings) -> wire.Endpoint:
    if pod is None:
        return wire.Endpoint(str(addr))
    return wire.Endpoint(str(addr), _identity(pod, addr.port, settings), pod.ref)


def _identity(pod: Pod, port: int, settings: IndexSettings) -> str | None:
    if not _takes_tls(pod, port):
        return None
    return inbound.identity(settings, pod.metadata.namespace, pod.spec.service_account_name)


def _takes_tls(pod: Pod, port: int) -> bool:
    # The pod's own annotation only: the injector copies the namespace's, as the redirect was set up by what stood there at that time.
    skipped = options.read_port_list(pod.metadata.annotations.get(options.SKIP_INBOUND_PORTS, ""))
    return meshed(pod) and port != _ADMIN_PORT and not skipped.holds(port, pod.ports)


def meshed(pod: Pod) -> bool:
    """Does the pod have a sidecar? The injector's patch says so, not the wish in its annotations."""
    return pod.metadata.annotations.get(options.STATUS) == options.INJECTED


def _service_protocol(
    store: Store, service: Service, port: ServicePort, ready: Mapping[Addr, Pod | None], settings: IndexSettings
) -> wire.Protocol:
    """appProtocol, else the Service's opaque-ports annotation, else what all endpoints' pods say, opaque if any of them says so."""
    known = _APP_PROTOCOLS.get(port.app_protocol.lower())
    if known is not None:
        return known
    listed = options.nearest(options.OPAQUE_PORTS, service.metadata.annotations, store.namespace_annotations(service.metadata.namespace))
    if options.read_port_list(settings.opaque_ports if listed is None else listed).holds(port.port, name=port.name):
        return "opaque"
    ports = {(pod.ref, addr.port): pod for addr, pod in ready.items() if pod is not None}  # a pod may be named at thousands of addresses
    said = {inbound.port_protocol(store, pod, number, settings) for (_, number), pod in ports.items()}
    return _agreed(said | {"detect"} if None in ready.values() else said)


def _agreed(said: set[wire.Protocol]) -> wire.Protocol:
    """An endpoint that takes bytes untouched must get them so; else a protocol that all endpoints name; else it is detected."""
    if "opaque" in said:
        return "opaque"
    return said.pop() if len(said) == 1 else "detect"
