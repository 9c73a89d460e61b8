"""From a pod object of Kubernetes to what capture must know of it. Pure; called by ebpf.cluster_pods and local.pod."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebpf.redirect import INBOUND_PORT, OUTBOUND_PORT, SIDECAR_UID, Range
from ebpf.wire import BadMessage, PodFacts

# The injector's words (injector.fixed), which this component may not import: a test compares them.
STATUS, INJECTED = "pillion.dev/status", "injected"
PREFIX = "config.pillion.dev/"
SIDECAR_NAME = "pillion-proxy"
_RANGES_MAX = 256


def facts_untrusted(pod: Mapping[str, Any]) -> PodFacts | None:
    """What capture must know of a pod, None when it is not to be captured (not injected, of the node's network, ended).

    Raises BadMessage when its annotations cannot be understood: such a pod stays uncaptured, and so its containers do not start; one that
    is captured already stays as it is.
    """
    try:
        meta, spec = pod["metadata"], pod["spec"]
        annotations = meta.get("annotations") or {}
        if annotations.get(STATUS) != INJECTED or spec.get("hostNetwork") or has_ended(pod):
            return None
        containers = [*(spec.get("initContainers") or []), *spec["containers"]]
        sidecar = next((one for one in containers if one.get("name") == SIDECAR_NAME), None)
        if sidecar is None:
            return None
        named = {
            port["name"]: int(port["containerPort"])
            for container in reversed(containers)  # the first declaration of a name counts
            for port in container.get("ports") or []
            if port.get("name") and port.get("protocol", "TCP") == "TCP"
        }
        return PodFacts(
            id=meta["uid"],
            namespace=meta["namespace"],
            name=meta["name"],
            sidecar_uid=(sidecar.get("securityContext") or {}).get("runAsUser", SIDECAR_UID),
            outbound_port=_port_of(sidecar, "PILLION_OUTBOUND_LISTEN", OUTBOUND_PORT),
            inbound_port=_port_of(sidecar, "PILLION_INBOUND_LISTEN", INBOUND_PORT),
            skip_inbound=port_list(annotations.get(f"{PREFIX}skip-inbound-ports", ""), named),
            skip_outbound=port_list(annotations.get(f"{PREFIX}skip-outbound-ports", ""), named),
            accelerate=annotations.get(f"{PREFIX}accelerate", "true") == "true",
            unaccelerated=port_list(annotations.get(f"{PREFIX}unaccelerated-ports", ""), named),
            real_caller=annotations.get(f"{PREFIX}real-caller", "true") == "true",
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadMessage(f"the pod object cannot be understood: {error!r}") from None


def has_ended(pod: Mapping[str, Any]) -> bool:
    """None of its containers runs, nor will one again."""
    status = pod.get("status")
    return isinstance(status, dict) and status.get("phase") in ("Succeeded", "Failed")


def port_list(text: str, named: Mapping[str, int]) -> tuple[Range, ...]:
    """``25,8000-8010,postgres``, as injector.options reads it; raises ValueError."""
    found: list[Range] = []
    for entry in (part.strip() for part in text.split(",")):
        first, _, last = entry.partition("-")
        if first.isdigit() and (last or first).isdigit():
            low, high = int(first), int(last or first)
            if not 1 <= low <= high <= 65535:
                raise ValueError(f"{entry} is no range of ports")
            found.append((low, high))
        elif entry in named:
            found.append((named[entry], named[entry]))
    if len(found) > _RANGES_MAX:
        raise ValueError(f"more than {_RANGES_MAX} ranges of ports")
    return tuple(found)


def _port_of(container: Mapping[str, Any], variable: str, default: int) -> int:
    values = [one.get("value") or "" for one in container.get("env") or [] if one.get("name") == variable]
    return int(values[0].rpartition(":")[2]) if values else default
