"""Services: virtual addresses, which pods stand behind them, and the names pods know each other by. Pure; called by local.supervisor.

Follows the endpoint-slice controller (named target ports, readiness, publishNotReadyAddresses) and the cluster's DNS names, which here
are lines of a hosts file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.k8s.objects import EndpointSlice, Service, ServicePort
from core.refs import Ref
from local.network import CLUSTER_DOMAIN, Addresses


@dataclass(frozen=True)
class PodFacts:
    """What Services need to know of a running pod. ports: name -> number of declared ports. meshed: has a sidecar."""

    ref: Ref
    labels: Mapping[str, str]
    addresses: Addresses
    ready: bool
    ports: Mapping[str, int]
    hostname: str = ""
    subdomain: str = ""
    meshed: bool = False


@dataclass(frozen=True)
class Backend:
    """A pod behind a Service port and the number the port has there."""

    pod: PodFacts
    port: int


@dataclass(frozen=True)
class Front:
    """One port of a Service with its virtual addresses (none for a headless one) and the ready pods behind it."""

    service: Ref
    vips: Sequence[str]
    port: ServicePort
    backends: Sequence[Backend]


def is_headless(service: Service) -> bool:
    """clusterIP: None: names lead to the pods themselves."""
    return service.spec.cluster_ip == "None"


def families(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Which families a Service has: IPv4 unless it asks for more (Service.spec.ipFamilies, ipFamilyPolicy)."""
    spec = raw.get("spec") or {}
    asked = tuple(family for family in spec.get("ipFamilies") or () if family in ("IPv4", "IPv6")) or ("IPv4",)
    if spec.get("ipFamilyPolicy") in ("PreferDualStack", "RequireDualStack"):
        return asked if len(asked) > 1 else (*asked, "IPv6" if asked[0] == "IPv4" else "IPv4")
    return asked[:1]


def of_family(addresses: Addresses, wanted: Iterable[str]) -> tuple[str, ...]:
    """The addresses of these families, in that order."""
    by_family = {"IPv4": addresses.v4, "IPv6": addresses.v6}
    return tuple(by_family[family] for family in wanted if by_family[family])


def selected(service: Service, pods: Iterable[PodFacts]) -> list[PodFacts]:
    """The pods a Service selects, ready or not; one without a selector selects none (its endpoints are somebody else's)."""
    selector = service.spec.selector
    if not selector:
        return []
    return [
        pod
        for pod in pods
        if pod.ref.namespace == service.metadata.namespace and all(pod.labels.get(key) == value for key, value in selector.items())
    ]


def target_port(port: ServicePort, pod: PodFacts) -> int | None:
    """The number a Service port has in a pod; None when the pod declares no port of that name."""
    target = port.target_port
    if isinstance(target, str):
        return pod.ports.get(target)
    return target or port.port


def fronts(services: Iterable[Service], pods: Sequence[PodFacts]) -> list[Front]:
    """What the node translates: every port of every Service, with its ready backends."""
    found = []
    for service in services:
        ready = [pod for pod in selected(service, pods) if pod.ready]
        for port in service.spec.ports:
            backends = [Backend(pod, number) for pod in ready if (number := target_port(port, pod))]
            found.append(Front(service.ref, service.vips, port, backends))
    return found


def slices(service: Service, raw: Mapping[str, Any], pods: Sequence[PodFacts]) -> list[dict[str, Any]]:
    """discovery.k8s.io/v1 EndpointSlice objects of a Service: one per address family and set of target ports."""
    publish = bool((raw.get("spec") or {}).get("publishNotReadyAddresses"))
    mine = selected(service, pods)
    objects = []
    for family in families(raw):
        groups: dict[tuple[tuple[str, int, str], ...], list[PodFacts]] = {}
        for pod in mine:
            if of_family(pod.addresses, [family]):
                ports = tuple((port.name, number, port.protocol) for port in service.spec.ports if (number := target_port(port, pod)))
                groups.setdefault(ports, []).append(pod)
        for number, (ports, members) in enumerate(sorted(groups.items()) or [((), [])]):
            objects.append(_slice(service, family, number, ports, members, publish))
    return objects


def _slice(
    service: Service, family: str, number: int, ports: tuple[tuple[str, int, str], ...], members: list[PodFacts], publish: bool
) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service.metadata.name}-{family.lower()}-{number}",
            "namespace": service.metadata.namespace,
            "labels": {EndpointSlice.SERVICE_LABEL: service.metadata.name},
        },
        "addressType": family,
        "ports": [{"name": name, "port": port, "protocol": protocol} for name, port, protocol in ports],
        "endpoints": [
            {
                "addresses": list(of_family(pod.addresses, [family])),
                "conditions": {"ready": pod.ready or publish, "serving": pod.ready},
                "targetRef": {"kind": "Pod", "namespace": pod.ref.namespace, "name": pod.ref.name},
            }
            for pod in sorted(members, key=lambda pod: pod.ref)
        ],
    }


def names_of(service: Ref, namespace: str) -> str:
    """The names a Service has for a pod of ``namespace``, as the resolver's search list makes them; the full one first."""
    name, of = service.name, service.namespace
    long = f"{name}.{of}.svc.{CLUSTER_DOMAIN} {name}.{of}.svc {name}.{of}"
    return f"{long} {name}" if of == namespace else long


def hosts_lines(
    services: Iterable[tuple[Service, Mapping[str, Any]]], pods: Sequence[PodFacts], namespace: str, extra: Sequence[tuple[str, str]] = ()
) -> list[str]:
    """Lines of a hosts file that every pod of a namespace shares. extra: (address, names) of the control plane."""
    lines = [f"{address} {names}" for address, names in extra]
    for service, raw in sorted(services, key=lambda pair: pair[0].ref):
        names = names_of(service.ref, namespace)
        lines += [f"{vip} {names}" for vip in service.vips]
        publish = bool((raw.get("spec") or {}).get("publishNotReadyAddresses"))
        for pod in sorted(selected(service, pods), key=lambda pod: pod.ref):
            addresses = of_family(pod.addresses, families(raw)) if pod.ready or publish else ()
            if not is_headless(service):
                continue
            lines += [f"{address} {names}" for address in addresses]
            if pod.hostname and pod.subdomain == service.metadata.name:
                own = " ".join(f"{pod.hostname}.{name}" for name in names.split())
                lines += [f"{address} {own}" for address in addresses]
    return lines


def alias_lines(spec: Mapping[str, Any]) -> list[str]:
    """Lines of a hosts file for a pod's hostAliases, whose shape was checked."""
    return [f"{alias['ip']} {' '.join(alias['hostnames'])}" for alias in spec.get("hostAliases") or () if alias.get("hostnames")]


def hosts_file(own: PodFacts, lines: Sequence[str]) -> str:
    """/etc/hosts of a pod."""
    head = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
    head += [f"{address} {own.hostname or own.ref.name}" for address in own.addresses.all]
    return "\n".join(["# Managed by pillion local: Services and pods of this mesh.", *head, *lines]) + "\n"
