"""The node's ruleset for nftables, as text: the translation of Service addresses. Pure.

Called by local.mesh. The text replaces the table whole in one transaction; capture in the pods is ebpf.redirect.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf.redirect import hook, table
from local.network import NODE4, NODE6, SERVICE_CIDR4, SERVICE_CIDR6, Addresses
from local.services import Front


def services(fronts: Sequence[Front], pods: Sequence[Addresses]) -> str:
    """The node's table: a Service address leads to a random ready pod, as kube-proxy has it; one with nobody behind it refuses at once."""
    to_pods: list[str] = []
    for front in fronts:
        for vip in front.vips:
            family = "ip6" if ":" in vip else "ip"
            protocol = front.port.protocol.lower()
            targets = [
                f"{backend.pod.addresses.v6 if family == 'ip6' else backend.pod.addresses.v4} . {backend.port}"
                for backend in front.backends
                if family == "ip" or backend.pod.addresses.v6
            ]
            if targets and protocol in ("tcp", "udp"):
                choice = ", ".join(f"{number} : {target}" for number, target in enumerate(targets))
                match = f"{family} daddr {vip} {protocol} dport {front.port.port}"
                to_pods.append(f"{match} dnat {family} to numgen random mod {len(targets)} map {{ {choice} }}")
    # a pod that reaches itself through a Service must not see a packet from its own address arrive from outside
    hairpin = [f"ip saddr {pod.v4} ip daddr {pod.v4} snat ip to {NODE4}" for pod in pods]
    hairpin += [f"ip6 saddr {pod.v6} ip6 daddr {pod.v6} snat ip6 to {NODE6}" for pod in pods if pod.v6]
    ranges = (("ip", SERVICE_CIDR4), ("ip6", SERVICE_CIDR6))
    return table(
        {
            "services": to_pods,
            "prerouting": [hook("nat", "prerouting", -100), "jump services"],
            "output": [hook("nat", "output", -100), "jump services"],
            "unserved": [
                hook("filter", "prerouting", -90),
                *(f"{family} daddr {cidr} reject with icmpx port-unreachable" for family, cidr in ranges),
            ],
            "postrouting": [hook("nat", "postrouting", 100), *hairpin],
        }
    )
