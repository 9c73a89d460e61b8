"""Rulesets for nftables, as text: capture in a meshed pod, and the node's translation of Service addresses. Pure.

Called by local.sandbox (capture) and local.supervisor (services). Each text replaces the table whole in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from local.network import NODE4, NODE6, SERVICE_CIDR4, SERVICE_CIDR6, Addresses
from local.services import Front

OUTBOUND_PORT = 4140
INBOUND_PORT = 4143
ADMIN_PORT = 4191
SIDECAR_UID = 2102


def _ports(ranges: Iterable[tuple[int, int]]) -> str:
    return "{ " + ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in merged(ranges)) + " }"


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted and without overlaps, which nft refuses in a set."""
    result: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


def capture(skip_inbound: Sequence[tuple[int, int]] = (), skip_outbound: Sequence[tuple[int, int]] = ()) -> str:
    """The table that leads a pod's TCP through its sidecar, IPv4 and IPv6.

    Out: everything but the sidecar's own connections (by uid) and what stays on the loopback device, so that talking to oneself never
    touches the sidecar (Linkerd's proxy-init has the same two exemptions). In: everything but the admin port, which the node probes;
    what arrives for the sidecar's own ports is led to it like the rest, where the loop guard refuses it.
    """
    outbound = [f"tcp dport {_ports(skip_outbound)} return"] if skip_outbound else []
    inbound = [f"tcp dport {_ports([(ADMIN_PORT, ADMIN_PORT), *skip_inbound])} return"]
    return _table(
        {
            "output": [
                _hook("nat", "output", -100),
                f"meta skuid {SIDECAR_UID} return",
                'oifname "lo" return',
                *outbound,
                f"meta l4proto tcp redirect to :{OUTBOUND_PORT}",
            ],
            "prerouting": [
                _hook("nat", "prerouting", -100),
                'iifname "lo" return',
                *inbound,
                f"meta l4proto tcp redirect to :{INBOUND_PORT}",
            ],
        }
    )


def _hook(kind: str, hook: str, priority: int) -> str:
    return f"type {kind} hook {hook} priority {priority}; policy accept;"


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
    return _table(
        {
            "services": to_pods,
            "prerouting": [_hook("nat", "prerouting", -100), "jump services"],
            "output": [_hook("nat", "output", -100), "jump services"],
            "unserved": [
                _hook("filter", "prerouting", -90),
                *(f"{family} daddr {cidr} reject with icmpx port-unreachable" for family, cidr in ranges),
            ],
            "postrouting": [_hook("nat", "postrouting", 100), *hairpin],
        }
    )


def _table(chains: dict[str, list[str]]) -> str:
    lines = ["table inet pillion", "delete table inet pillion", "table inet pillion {"]
    for name, rules in chains.items():
        lines += [f"  chain {name} {{", *(f"    {rule}" for rule in rules), "  }"]
    return "\n".join([*lines, "}"]) + "\n"
