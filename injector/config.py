"""The settings of the injector's process, from the environment; what it puts into pods stands in mesh.yaml (`injector.mesh`). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from core.addrs import ListenAddr
from core.env import listen_addr, one_of, setting, text


@dataclass(frozen=True)
class Config:
    """Every setting; `core.env.load` reads them."""

    control_namespace: str = setting("PILLION_CONTROL_NAMESPACE", text, default="pillion", reason="our own namespace")
    listen: ListenAddr = setting("PILLION_INJECTOR_LISTEN", listen_addr, default="[::]:8443", reason="where the API server asks, HTTPS")
    admin_listen: ListenAddr = setting("PILLION_ADMIN_LISTEN", listen_addr, default="[::]:9990", reason="liveness, readiness, metrics")
    mesh_file: str = setting("PILLION_MESH_FILE", text, default="/etc/pillion/mesh.yaml", reason="what goes into pods; followed live")
    service: str = setting("PILLION_INJECTOR_SERVICE", text, default="pillion-injector", reason="the Service that the API server asks")
    webhook: str = setting(
        "PILLION_WEBHOOK_CONFIGURATION", text, default="pillion-injector", reason="the MutatingWebhookConfiguration that gets our caBundle"
    )
    serving_secret: str = setting(
        "PILLION_SERVING_SECRET", text, default="pillion-injector-tls", reason="the Secret that all replicas serve from; must exist"
    )
    kubeconfig: str = setting("PILLION_KUBECONFIG", text, default="", reason="for development: not the pod's own service account")
    log_level: str = setting("PILLION_LOG_LEVEL", one_of("debug", "info", "warning", "error"), default="info", reason="of the log")
    log_format: str = setting("PILLION_LOG_FORMAT", one_of("json", "console"), default="json", reason="of the log")
