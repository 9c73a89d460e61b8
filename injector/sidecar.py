"""The sidecar's container and volumes, as they stand in a pod's spec. Pure; called by injector.patch.

The environment is read by proxy.config; both sides name the same variables and nothing else passes between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from injector.decide import SIDECAR_NAME, SIDECAR_UID, containers
from injector.options import Options
from injector.probes import ADMIN_PORT, Rewritten

OUTBOUND_PORT = 4140
INBOUND_PORT = 4143
AUDIENCE = "identity.pillion.dev"
TOKEN_VOLUME = "pillion-identity-token"
BUNDLE_VOLUME = "pillion-trust-bundle"
BUNDLE_CONFIG_MAP = "pillion-trust-bundle"
TOKEN_FOLDER = "/var/run/secrets/pillion.dev/token"
BUNDLE_FOLDER = "/var/run/secrets/pillion.dev/trust"
_TOKEN_LIFETIME_S = 86400  # as Linkerd's; the kubelet replaces it long before


@dataclass(frozen=True)
class Mesh:
    """What is the same for every pod of an installation."""

    image: str = "ghcr.io/pillion-mesh/proxy:0.1.0"
    trust_domain: str = "cluster.local"
    control_namespace: str = "pillion"
    identity_port: int = 8080
    policy_port: int = 8090

    def address(self, service: str, port: int) -> str:
        """Where a control-plane service is reached."""
        return f"{service}.{self.control_namespace}.svc.cluster.local:{port}"


DEFAULT_MESH = Mesh()


def container(pod: Mapping[str, Any], options: Options, probes: Sequence[Rewritten], mesh: Mesh) -> dict[str, Any]:
    """The native sidecar: an init container that keeps running, starts before every other one and ends after it (KEP-753)."""
    return {
        "name": SIDECAR_NAME,
        "image": options.image or mesh.image,
        "imagePullPolicy": "IfNotPresent",
        "restartPolicy": "Always",
        "env": environment(pod, options, probes, mesh),
        "ports": [
            {"name": "pillion-inbound", "containerPort": INBOUND_PORT, "protocol": "TCP"},
            {"name": "pillion-admin", "containerPort": ADMIN_PORT, "protocol": "TCP"},
        ],
        "startupProbe": _probe("/ready", periodSeconds=1, failureThreshold=120),  # Linkerd's: two minutes
        "readinessProbe": _probe("/ready", periodSeconds=10, failureThreshold=3),
        "livenessProbe": _probe("/live", initialDelaySeconds=10, periodSeconds=10, failureThreshold=3),
        "securityContext": {
            "runAsUser": SIDECAR_UID,
            "runAsGroup": SIDECAR_UID,
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": TOKEN_VOLUME, "mountPath": TOKEN_FOLDER, "readOnly": True},
            {"name": BUNDLE_VOLUME, "mountPath": BUNDLE_FOLDER, "readOnly": True},
        ],
    }


def _probe(path: str, **timing: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": ADMIN_PORT}, "timeoutSeconds": 1, **timing}


def environment(pod: Mapping[str, Any], options: Options, probes: Sequence[Rewritten], mesh: Mesh) -> list[dict[str, Any]]:
    """The sidecar's variables; what only the kubelet knows comes by downward API."""
    fields = {
        "PILLION_POD_NAMESPACE": "metadata.namespace",
        "PILLION_POD_NAME": "metadata.name",
        "PILLION_POD_UID": "metadata.uid",
        "PILLION_POD_IPS": "status.podIPs",
        "PILLION_SERVICE_ACCOUNT": "spec.serviceAccountName",
    }
    values = {
        "PILLION_TRUST_DOMAIN": mesh.trust_domain,
        "PILLION_CONTROL_NAMESPACE": mesh.control_namespace,
        "PILLION_IDENTITY_ADDR": mesh.address("pillion-identity", mesh.identity_port),
        "PILLION_IDENTITY_TOKEN_FILE": f"{TOKEN_FOLDER}/token",
        "PILLION_TRUST_ANCHORS_FILE": f"{BUNDLE_FOLDER}/ca.crt",
        "PILLION_POLICY_ADDR": mesh.address("pillion-policy", mesh.policy_port),
        "PILLION_INBOUND_LISTEN": f"[::]:{INBOUND_PORT}",
        "PILLION_OUTBOUND_LISTEN": f"[::]:{OUTBOUND_PORT}",
        "PILLION_ADMIN_LISTEN": f"[::]:{ADMIN_PORT}",
        "PILLION_INBOUND_PORTS": ",".join(map(str, inbound_ports(pod))),
        "PILLION_LOG_LEVEL": options.log_level,
        "PILLION_ACCESS_LOG": options.access_log,
        "PILLION_SHUTDOWN_GRACE_S": str(options.shutdown_grace_s),
        # Kubernetes expands $(NAME) in values; a doubled dollar is a plain one
        "PILLION_PROBES": json.dumps({probe.key: probe.original for probe in probes}, sort_keys=True).replace("$", "$$"),
    }
    env: list[dict[str, Any]] = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    return env + [{"name": name, "value": value} for name, value in values.items()]


def inbound_ports(pod: Mapping[str, Any]) -> list[int]:
    """Declared TCP ports of the app, in order: their policy is wanted before the first connection."""
    return sorted(
        {
            port["containerPort"]
            for found in containers(pod)
            if found.get("name") != SIDECAR_NAME
            for port in found.get("ports") or []
            if port.get("protocol", "TCP") == "TCP"
        }
    )


def volumes() -> list[dict[str, Any]]:
    """The token, for our audience only, and the trust bundle."""
    token = {"path": "token", "audience": AUDIENCE, "expirationSeconds": _TOKEN_LIFETIME_S}
    bundle = {"name": BUNDLE_CONFIG_MAP, "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    return [
        {"name": TOKEN_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}},
        {"name": BUNDLE_VOLUME, "configMap": bundle},
    ]
