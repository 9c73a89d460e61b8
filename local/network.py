"""What pods and the node are to each other on the network: addresses, links, routes. Decides; local.sandbox and local.supervisor apply.

Every pod has one veth pair to the node, point to point: no bridge, so that every packet between two pods is routed, and translated where it
is for a Service, by the node's own namespace. Addresses are /32 and /128. Pure.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

POD_CIDR4 = ipaddress.IPv4Network("10.142.0.0/16")
POD_CIDR6 = ipaddress.IPv6Network("fd42:142::/64")
SERVICE_CIDR4 = ipaddress.IPv4Network("10.143.0.0/16")
SERVICE_CIDR6 = ipaddress.IPv6Network("fd42:143::/112")
NODE4 = str(POD_CIDR4[1])
NODE6 = str(POD_CIDR6[1])
GATEWAY6 = "fe80::1"
_FIRST = 10  # leaves room for the node's own addresses

CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True)
class Addresses:
    """An IPv4 and an IPv6 address with the same host part; v6 is "" on a kernel without IPv6."""

    v4: str
    v6: str

    @property
    def all(self) -> tuple[str, ...]:
        """Both, IPv4 first (the primary family, as in a dual-stack cluster's default)."""
        return (self.v4, self.v6) if self.v6 else (self.v4,)


class OutOfAddresses(RuntimeError):
    """More pods or Services than the address range holds."""


class AddressPool:
    """Hands out host numbers of a pair of networks in order; one that was given back comes round only after all the others."""

    def __init__(self, net4: ipaddress.IPv4Network, net6: ipaddress.IPv6Network, *, ipv6: bool) -> None:
        self._net4, self._net6, self._ipv6 = net4, net6, ipv6
        self._used: set[int] = set()
        self._next = _FIRST

    def take(self) -> Addresses:
        """A pair nobody has; raises OutOfAddresses."""
        size = min(self._net4.num_addresses, self._net6.num_addresses) - 1
        for step in range(size):
            host = (self._next - _FIRST + step) % (size - _FIRST) + _FIRST
            if host not in self._used:
                self._used.add(host)
                self._next = host + 1
                return Addresses(str(self._net4[host]), str(self._net6[host]) if self._ipv6 else "")
        raise OutOfAddresses(f"all addresses of {self._net4} are in use")

    def give_back(self, addresses: Addresses) -> None:
        """The address may be handed out again."""
        self._used.discard(int(ipaddress.IPv4Address(addresses.v4)) - int(self._net4.network_address))


def node_setup(*, ipv6: bool) -> str:
    """``ip -batch`` input for the node namespace."""
    lines = ["link set lo up", f"address add {NODE4}/32 dev lo"]
    if ipv6:
        lines.append(f"address add {NODE6}/128 dev lo nodad")
    return "\n".join(lines) + "\n"


def link_at_node(pod_pid: int, name: str, addresses: Addresses) -> str:
    """``ip -batch`` input for the node namespace: the veth pair, one end in the pod, and the routes to the pod."""
    lines = [
        f"link add {name} type veth peer name eth0 netns {pod_pid}",
        f"link set {name} up",
        f"route add {addresses.v4}/32 dev {name} src {NODE4}",
    ]
    if addresses.v6:
        lines += [f"address add {GATEWAY6}/64 dev {name} nodad", f"route add {addresses.v6}/128 dev {name} src {NODE6}"]
    return "\n".join(lines) + "\n"


def link_at_pod(addresses: Addresses) -> str:
    """``ip -batch`` input for the pod's namespace."""
    lines = [
        "link set lo up",
        "link set eth0 up",
        f"address add {addresses.v4}/32 dev eth0",
        f"route add {NODE4} dev eth0 scope link",
        f"route add default via {NODE4} dev eth0",
    ]
    if addresses.v6:
        lines += [f"address add {addresses.v6}/128 dev eth0 nodad", f"route add ::/0 via {GATEWAY6} dev eth0"]
    return "\n".join(lines) + "\n"


def node_sysctls(*, ipv6: bool) -> dict[str, str]:
    """/proc/sys/net settings of the node: it routes between pods."""
    return {"ipv4/ip_forward": "1"} | ({"ipv6/conf/all/forwarding": "1"} if ipv6 else {})


def pod_sysctls(*, ipv6: bool) -> dict[str, str]:
    """/proc/sys/net settings of a pod: apps without privileges may bind port 80, as container runtimes allow by default."""
    settings = {"ipv4/ip_unprivileged_port_start": "0"}
    if ipv6:
        # nobody else can hold the address of a point-to-point link; probing for duplicates would cost each pod a second
        settings |= {"ipv6/conf/default/accept_dad": "0", "ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_ra": "0"}
    return settings
