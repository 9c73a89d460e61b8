"""The containers and volumes that injection adds, as they stand in a pod's spec. Pure; called by injector.patch.

The environment is read by proxy.config; both sides name the same variables and nothing else passes between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from injector.decide import containers
from injector.fixed import ADMIN_PORT, CAPTURE_NAME, INBOUND_PORT, OUTBOUND_PORT, SIDECAR_NAME, SIDECAR_UID
from injector.mesh import Mesh
from injector.options import Options
from injector.probes import Rewritten

AUDIENCE = "identity.pillion.dev"
TOKEN_VOLUME = "pillion-identity-token"
BUNDLE_VOLUME = "pillion-trust-anchors"
BUNDLE_CONFIG_MAP = "pillion-trust-anchors"
BUNDLE_KEY = "ca-bundle.crt"
TOKEN_FOLDER = "/var/run/secrets/pillion.dev/token"
BUNDLE_FOLDER = "/var/run/secrets/pillion.dev/trust"
VALIDATOR_UID = 65532
"""Any uid but the sidecar's, which capture lets pass."""
CLASSIC_WAIT_S = 5
"""A classic sidecar is told to end together with the app: it stays this long, for what the app still has to say."""

_TOKEN_LIFETIME_S = 86400  # as Linkerd's; the kubelet replaces it long before
_RESTRICTED: Mapping[str, Any] = {
    "runAsNonRoot": True,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""What the Pod Security level *restricted* asks of a container, and a read-only root."""


def container(pod: Mapping[str, Any], options: Options, probes: Sequence[Rewritten], mesh: Mesh, *, native: bool) -> dict[str, Any]:
    """The sidecar. native: as an init container that keeps running, starts before every other one and ends after it (KEP-753)."""
    found: dict[str, Any] = {
        "name": SIDECAR_NAME,
        "image": options.image or mesh.image,
        "imagePullPolicy": options.image_pull_policy or mesh.image_pull_policy,
        "env": environment(pod, options, probes, mesh, native=native),
        "ports": [
            {"name": "pillion-inbound", "containerPort": INBOUND_PORT, "protocol": "TCP"},
            {"name": "pillion-admin", "containerPort": ADMIN_PORT, "protocol": "TCP"},
        ],
        "readinessProbe": _probe("/ready", periodSeconds=10, failureThreshold=3),
        "livenessProbe": _probe("/live", initialDelaySeconds=10, periodSeconds=10, failureThreshold=3),
        "securityContext": {"runAsUser": SIDECAR_UID, "runAsGroup": SIDECAR_UID, **_RESTRICTED},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": TOKEN_VOLUME, "mountPath": TOKEN_FOLDER, "readOnly": True},
            {"name": BUNDLE_VOLUME, "mountPath": BUNDLE_FOLDER, "readOnly": True},
        ],
    }
    if mesh.command:
        found["command"] = list(mesh.command)
    if options.resources:
        found["resources"] = {kind: dict(values) for kind, values in options.resources.items()}
    lifecycle: dict[str, Any] = {}
    if wait_s := wait_before_exit_s(options, native=native):
        lifecycle["preStop"] = {"exec": {"command": ["sleep", str(wait_s)]}}
    if native:
        found["restartPolicy"] = "Always"
    if native and captured_by(options, mesh) == "none":
        found["startupProbe"] = _probe("/ready", periodSeconds=1, failureThreshold=120)  # Linkerd's: two minutes
    elif native or options.await_ready:
        lifecycle["postStart"] = {"exec": {"command": hold_command(options, mesh, native=native)}}
    if lifecycle:
        found["lifecycle"] = lifecycle
    return found


def captured_by(options: Options, mesh: Mesh) -> str:
    """Who leads the pod's connections to its sidecar: `mesh.Capture`."""
    return "none" if mesh.capture == "none" else options.capture or mesh.capture


def proves_capture(options: Options, mesh: Mesh, *, native: bool) -> bool:
    """Whether the sidecar proves capture itself: it is the first container, and no other starts before it has.

    A classic sidecar starts after init containers, so that they would run unproven: there a container of its own proves.
    """
    return native and captured_by(options, mesh) == "agent"


def hold_command(options: Options, mesh: Mesh, *, native: bool) -> list[str]:
    """What holds the other containers (proxy.hold says why it is no startup probe).

    An image from before sidecars proved capture refuses the word ``proven``, so that its pods do not start.
    """
    return ["python", "-S", "-m", "injector.hold", *(["proven"] if proves_capture(options, mesh, native=native) else [])]


def wait_before_exit_s(options: Options, *, native: bool) -> int:
    """How long the sidecar goes on as before after it was told to end."""
    if options.wait_before_exit_s is not None:
        return options.wait_before_exit_s
    return 0 if native else CLASSIC_WAIT_S


def _probe(path: str, **timing: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": ADMIN_PORT}, "timeoutSeconds": 1, **timing}


def capture_container(options: Options, mesh: Mesh, *, native: bool) -> dict[str, Any] | None:
    """The init container before all others: puts capture in place, or waits until the agent's is proven; None where none is needed."""
    by = captured_by(options, mesh)
    if by == "none" or proves_capture(options, mesh, native=native):
        return None
    found: dict[str, Any] = {
        "name": CAPTURE_NAME,
        "image": options.image or mesh.image,
        "imagePullPolicy": options.image_pull_policy or mesh.image_pull_policy,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if by == "agent":
        found["command"] = ["python", "-m", "ebpf.validator"]
        found["securityContext"] = {"runAsUser": VALIDATOR_UID, "runAsGroup": VALIDATOR_UID, **_RESTRICTED}
    else:
        found["command"] = ["python", "-m", "ebpf.redirect_self", *_skips(options)]
        # nft needs NET_ADMIN, which only root keeps across exec without file capabilities; the namespace is the pod's own
        root = {"runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False, "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}}
        found["securityContext"] = {**_RESTRICTED, **root}
    if options.resources:
        found["resources"] = {kind: dict(values) for kind, values in options.resources.items()}
    return found


def _skips(options: Options) -> list[str]:
    words = []
    for flag, ranges in (("--skip-inbound", options.skip_inbound_ports), ("--skip-outbound", options.skip_outbound_ports)):
        if ranges:
            words.append(f"{flag}={ranges_text(ranges)}")
    return words


def ranges_text(ranges: Iterable[tuple[int, int]]) -> str:
    """``25,8000-8010``"""
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def environment(pod: Mapping[str, Any], options: Options, probes: Sequence[Rewritten], mesh: Mesh, *, native: bool) -> list[dict[str, Any]]:
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
        "PILLION_IDENTITY_ADDR": mesh.identity,
        "PILLION_IDENTITY_TOKEN_FILE": f"{TOKEN_FOLDER}/token",
        "PILLION_TRUST_ANCHORS_FILE": f"{BUNDLE_FOLDER}/{BUNDLE_KEY}",
        "PILLION_POLICY_ADDR": mesh.policy,
        "PILLION_INBOUND_LISTEN": f"[::]:{INBOUND_PORT}",
        "PILLION_OUTBOUND_LISTEN": f"[::]:{OUTBOUND_PORT}",
        "PILLION_ADMIN_LISTEN": f"[::]:{ADMIN_PORT}",
        "PILLION_INBOUND_PORTS": inbound_ports_text(pod),
        "PILLION_LOG_LEVEL": options.log_level,
        "PILLION_LOG_FORMAT": options.log_format,
        "PILLION_ACCESS_LOG": options.access_log,
        "PILLION_SHUTDOWN_GRACE_S": str(options.shutdown_grace_s),
        "PILLION_SHUTDOWN_ENDPOINT": "true" if options.shutdown_endpoint else "false",
        "PILLION_PROBES": probes_text({probe.key: probe.original for probe in probes}),
    }
    if proves_capture(options, mesh, native=native):
        values["PILLION_PROVE_CAPTURE"] = "true"
    if options.forwarded != "off":
        values["PILLION_FORWARDED"] = options.forwarded
    if options.connect_timeout_ms is not None:
        values["PILLION_CONNECT_TIMEOUT_MS"] = str(options.connect_timeout_ms)
    if options.detect_timeout_s is not None:
        values["PILLION_DETECT_TIMEOUT_S"] = f"{options.detect_timeout_s:g}"
    values |= {name: _unexpanded(value) for name, value in options.env.items()}
    env: list[dict[str, Any]] = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    return env + [{"name": name, "value": value} for name, value in values.items()]


def probes_text(probes: Mapping[str, Mapping[str, Any]]) -> str:
    """The value of PILLION_PROBES."""
    return _unexpanded(json.dumps(probes, sort_keys=True))


def _unexpanded(value: str) -> str:
    return value.replace("$", "$$")  # Kubernetes expands $(NAME) in values; a doubled dollar is a plain one


def inbound_ports_text(pod: Mapping[str, Any]) -> str:
    """Declared TCP ports of the app: their policy is wanted before the first connection."""
    found = {
        port["containerPort"]
        for container in containers(pod)
        if container.get("name") != SIDECAR_NAME
        for port in container.get("ports") or []
        if port.get("protocol", "TCP") == "TCP"
    }
    return ",".join(map(str, sorted(found)))


def volumes() -> list[dict[str, Any]]:
    """The token, for our audience only, and the trust anchors."""
    token = {"path": "token", "audience": AUDIENCE, "expirationSeconds": _TOKEN_LIFETIME_S}
    bundle = {"name": BUNDLE_CONFIG_MAP, "items": [{"key": BUNDLE_KEY, "path": BUNDLE_KEY}]}
    return [
        {"name": TOKEN_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}},
        {"name": BUNDLE_VOLUME, "configMap": bundle},
    ]
