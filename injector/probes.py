"""Probes that open nothing: the kubelet asks the sidecar's admin port, and the sidecar asks the app. Pure; called by injector.patch.

An http, tcp or grpc probe of the app would otherwise need a hole in the policy of its port. exec probes run inside the container and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from injector.fixed import ADMIN_PORT, SIDECAR_NAME

KINDS = ("startupProbe", "readinessProbe", "livenessProbe")
_ACTIONS = ("httpGet", "tcpSocket", "grpc")
_GRACE_S = 1  # the sidecar must be able to report its own timeout before the kubelet's


class UnknownPort(ValueError):
    """A probe names a port that its container does not declare."""


@dataclass(frozen=True)
class Rewritten:
    """One probe. path: JSON pointer to it. probe: what stands there now. key, original: the entry of PILLION_PROBES.

    container, kind: which probe of which container it is.
    """

    container: str
    kind: str
    path: str
    probe: Mapping[str, Any]
    key: str
    original: Mapping[str, Any]


def rewrite_probes(pod: Mapping[str, Any]) -> list[Rewritten]:
    """Every probe that must go through the sidecar, in the order of the containers; raises UnknownPort."""
    found = []
    spec = pod.get("spec") or {}
    for field in ("initContainers", "containers"):
        for number, container in enumerate(spec.get(field) or []):
            if container.get("name") == SIDECAR_NAME:
                continue
            for kind in KINDS:
                probe = container.get(kind)
                if probe and (rewritten := _rewrite(f"/spec/{field}/{number}/{kind}", container, kind, probe)):
                    found.append(rewritten)
    return found


def _rewrite(path: str, container: Mapping[str, Any], kind: str, probe: Mapping[str, Any]) -> Rewritten | None:
    action = next((name for name in _ACTIONS if probe.get(name) is not None), None)
    if action is None or probe[action].get("host"):
        return None  # exec, or a probe of some other host: neither reaches an app port of this pod
    key = f"/pillion-probe/{container['name']}/{kind}"
    if action == "httpGet" and (probe[action].get("path"), probe[action].get("port")) == (key, ADMIN_PORT):
        return None  # rewritten already
    timeout_s = probe.get("timeoutSeconds") or 1
    target = dict(probe[action], port=_number(probe[action].get("port"), container, kind))
    asked = {name: value for name, value in probe.items() if name not in _ACTIONS}
    asked |= {"httpGet": {"path": key, "port": ADMIN_PORT}, "timeoutSeconds": timeout_s + _GRACE_S}
    return Rewritten(container["name"], kind, path, asked, key, {action: target, "timeoutSeconds": timeout_s})


def _number(port: object, container: Mapping[str, Any], kind: str) -> int:
    if isinstance(port, int):
        return port
    if isinstance(port, str) and port.isascii() and port.isdigit():
        return int(port)
    for declared in container.get("ports") or []:
        if declared.get("name") == port:
            return int(declared["containerPort"])
    raise UnknownPort(
        f"{kind} of container {container.get('name')} names the port {port!r}: expected a number or a port the container declares"
    )


__all__ = ["ADMIN_PORT", "KINDS", "Rewritten", "UnknownPort", "rewrite_probes"]
