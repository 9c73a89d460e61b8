"""The agent's metrics in the Prometheus text format. Pure; called by ebpf.agent for each scrape.

A pod's counters begin with its registration and end with it. What is not ours is not counted, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ebpf.plan import NAMES

# name of the metric, help, label of the cause, counter names with their cause
_COUNTERS: Sequence[tuple[str, str, str, Mapping[str, str]]] = (
    ("connections_captured_total", "Connections of the app that connect() led to the sidecar.", "", {"captured": ""}),
    ("connections_steered_total", "Connections that arrived and were led to the sidecar.", "", {"steered": ""}),
    ("connections_paired_total", "Connections between app and sidecar of which both ends are known.", "", {"paired": ""}),
    ("connections_accelerated_total", "Paired connections whose bytes may skip the TCP stack.", "", {"accelerated": ""}),
    ("redirected_messages_total", "Messages that skipped the TCP stack.", "", {"messages": ""}),
    ("redirected_bytes_total", "Bytes that skipped the TCP stack.", "", {"bytes": ""}),
    (
        "fallbacks_total",
        "Messages (cause full: connections) that were marked for the short way and took TCP, by cause.",
        "cause",
        {"by_tcp_order": "order", "by_tcp_memory": "memory", "by_tcp_unpaired": "unpaired", "by_tcp_full": "full"},
    ),
    (
        "refused_total",
        "What capture refused: connections in either direction without a sidecar, sockets of kinds that escape capture, forged callers.",
        "what",
        {"refused_inbound": "inbound", "refused_outbound": "outbound", "refused_sockets": "socket", "refused_callers": "caller"},
    ),
    ("callers_total", "Connections to the app that show it the real caller.", "", {"callers": ""}),
    ("original_dst_total", "Answers to the sidecar's question for a connection's original destination.", "", {"original_dst": ""}),
)


def render(node: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> str:
    """node, pods: as ebpf.agent's status has them."""
    lines: list[str] = []
    levels = dict.fromkeys(NAMES, 0)
    for pod in pods:
        levels[pod["level"]] += 1
    _family(
        lines, "pods", "gauge", "Registered pods by level of capture.", ((f'level="{level}"', count) for level, count in levels.items())
    )
    abilities = ((f'part="{part}"', 0 if problem else 1) for part, problem in sorted(node["ability"].items()))
    _family(lines, "node_ability", "gauge", "What really loads on this node: 1 works, 0 does not.", abilities)
    _family(lines, "resident_bytes", "gauge", "Memory of the agent (RSS).", [("", node["resident_bytes"])])
    labels = [f'namespace="{_escaped(pod["namespace"])}",pod="{_escaped(pod["name"])}"' for pod in pods]
    both = list(zip(labels, pods, strict=True))
    _family(lines, "pod_level", "gauge", "1: " + NAMES[1] + ", 2: " + NAMES[2] + ", 3: " + NAMES[3] + ", 4: " + NAMES[4] + ".",
            ((label, pod["level"]) for label, pod in both))  # fmt: skip
    _family(
        lines, "pod_accelerated", "gauge", "Whether the pod's hop is shortened.", ((label, int(pod["accelerated"])) for label, pod in both)
    )
    _family(lines, "pod_accelerated_to_app", "gauge", "Whether it is also for what the app reads.",
            ((label, int(pod["accelerated_to_app"])) for label, pod in both))  # fmt: skip
    _family(
        lines, "pod_listens", "gauge", "Whether what arrives reaches the sidecar.", ((label, int(pod["listens"])) for label, pod in both)
    )
    for name, text, cause, counters in _COUNTERS:
        samples = (
            (f'{label},{cause}="{value}"' if cause else label, pod["counters"][counter])
            for label, pod in both
            for counter, value in counters.items()
            if counter in pod["counters"]
        )
        _family(lines, name, "counter", text, samples)
    return "\n".join(lines) + "\n"


def _family(lines: list[str], name: str, kind: str, text: str, samples: Iterable[tuple[str, int]]) -> None:
    lines += [f"# HELP pillion_agent_{name} {text}", f"# TYPE pillion_agent_{name} {kind}"]
    lines += [f"pillion_agent_{name}{{{labels}}} {value}" if labels else f"pillion_agent_{name} {value}" for labels, value in samples]


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
