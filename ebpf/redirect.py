"""Capture by nftables, as text: the ruleset of a meshed pod where eBPF does not capture. Pure.

Called by ebpf.pods (levels 2 and 3 of a node's agent), ebpf.redirect_self (an init container) and local.sandbox (rootless meshes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from core.capture import NOBODY

OUTBOUND_PORT = 4140
INBOUND_PORT = 4143
ADMIN_PORT = 4191
SIDECAR_UID = 2102
TABLE = "pillion"

Range = tuple[int, int]

_OPENING = "tcp flags & (fin | syn | rst | ack) == syn"


def ports(ranges: Iterable[Range]) -> str:
    """An anonymous set of nft: ``{ 22, 8000-8010 }``."""
    return "{ " + ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in merged(ranges)) + " }"


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Sorted and without overlaps, which nft refuses in a set."""
    result: list[Range] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


def capture(
    skip_inbound: Sequence[Range] = (),
    skip_outbound: Sequence[Range] = (),
    *,
    outbound_port: int = OUTBOUND_PORT,
    inbound_port: int = INBOUND_PORT,
    sidecar_uid: int = SIDECAR_UID,
) -> str:
    """The table that leads a pod's TCP through its sidecar, IPv4 and IPv6.

    Out: everything but the sidecar's own connections (by uid) and what stays on the loopback device, so that talking to oneself never
    touches the sidecar (Linkerd's proxy-init has the same two exemptions). One connection of the sidecar is led like an app's, by which it
    proves that it is captured (proxy.capture_proof). In: everything but the admin port, which the node probes;
    what arrives for the sidecar's own ports is led to it like the rest, where the loop guard refuses it. Only what opens a connection is
    redirected: conntrack takes a connection that it sees in the middle for a new one, and connections that eBPF had captured must live on.
    """
    outbound = [f"tcp dport {ports(skip_outbound)} return"] if skip_outbound else []
    inbound = [f"tcp dport {ports([(ADMIN_PORT, ADMIN_PORT), *skip_inbound])} return"]
    return table(
        {
            "output": [
                hook("nat", "output", -100),
                *(f"{_family(ip)} daddr {ip} tcp dport {outbound_port} {_OPENING} redirect to :{outbound_port}" for ip in NOBODY),
                f"meta skuid {sidecar_uid} return",
                'oifname "lo" return',
                *outbound,
                f"{_OPENING} redirect to :{outbound_port}",
            ],
            "prerouting": [
                hook("nat", "prerouting", -100),
                'iifname "lo" return',
                *inbound,
                f"{_OPENING} redirect to :{inbound_port}",
            ],
        }
    )


def _family(ip: str) -> str:
    return "ip6" if ":" in ip else "ip"


def no_capture() -> str:
    """The same transaction without a table after it."""
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n"


def hook(kind: str, name: str, priority: int) -> str:
    """The first line of a base chain."""
    return f"type {kind} hook {name} priority {priority}; policy accept;"


def table(chains: dict[str, list[str]]) -> str:
    """Our table with these chains and nothing else, replaced whole in one transaction."""
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    for name, rules in chains.items():
        lines += [f"  chain {name} {{", *(f"    {rule}" for rule in rules), "  }"]
    return "\n".join([*lines, "}"]) + "\n"
