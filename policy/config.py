"""The settings of the policy controller, from the environment. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_network

from core.addrs import ListenAddr
from core.env import HostPort, InvalidSettings, comma_list, host_port, listen_addr, one_of, setting, text
from core.names import DEFAULT_TRUST_DOMAIN, InvalidName, WorkloadId
from policy.index.options import read_port_list
from policy.index.settings import CLUSTER_NETWORKS, IndexSettings
from policy.model import ACCESS_POLICIES


def _network(value: str) -> str:
    try:
        return str(ip_network(value))
    except ValueError as error:
        raise ValueError(f"expected networks such as 10.0.0.0/8: {error}") from None


def _port_list(value: str) -> str:
    wrong = read_port_list(value).wrong
    if wrong:
        raise ValueError(f"expected ports and ranges, found {', '.join(map(repr, wrong))}")
    return value


def source(value: str) -> str:
    """``folder:DIR``, returned as DIR, or ``kubernetes``, returned as the empty string."""
    kind, _, path = value.strip().partition(":")
    if (kind, path) == ("kubernetes", ""):
        return ""
    if kind != "folder" or not path:
        raise ValueError("expected kubernetes or folder:DIR")
    return path


@dataclass(frozen=True)
class Config:
    """Every setting; `core.env.load` reads them."""

    folder: str = setting("PILLION_POLICY_SOURCE", source, reason="where API objects come from: kubernetes, or folder:DIR, watched")
    trust_domain: str = setting("PILLION_TRUST_DOMAIN", text, default=DEFAULT_TRUST_DOMAIN, reason="of all identities")
    control_namespace: str = setting("PILLION_CONTROL_NAMESPACE", text, default="pillion", reason="our own namespace")
    service_account: str = setting("PILLION_SERVICE_ACCOUNT", text, default="pillion-policy", reason="our own service account")
    listen: ListenAddr = setting("PILLION_POLICY_LISTEN", listen_addr, default="[::]:8090", reason="where sidecars subscribe, mutual TLS")
    admin_listen: ListenAddr = setting("PILLION_ADMIN_LISTEN", listen_addr, default="[::]:9990", reason="liveness, readiness, metrics")
    diagnostics_socket: str = setting(
        "PILLION_DIAGNOSTICS_SOCKET", text, default="", reason="Unix socket for pillion diagnostics, authz and check; empty for none"
    )
    kubeconfig: str = setting("PILLION_KUBECONFIG", text, default="", reason="for development: not the pod's own service account")
    pod_name: str = setting("PILLION_POD_NAME", text, default="", reason="our name in the election of who writes statuses; empty: never")
    serve_webhook: str = setting(
        "PILLION_WEBHOOK", one_of("on", "off"), default="on", reason="the validating webhook; off: for development"
    )
    webhook_listen: ListenAddr = setting(
        "PILLION_WEBHOOK_LISTEN", listen_addr, default="[::]:8443", reason="where the API server asks what may be stored, HTTPS"
    )
    webhook: str = setting(
        "PILLION_WEBHOOK_CONFIGURATION",
        text,
        default="pillion-policy",
        reason="the ValidatingWebhookConfiguration that gets our caBundle",
    )
    service: str = setting("PILLION_POLICY_SERVICE", text, default="pillion-policy", reason="the Service that the API server asks")
    serving_secret: str = setting(
        "PILLION_SERVING_SECRET", text, default="pillion-policy-tls", reason="the Secret that all replicas serve from; must exist"
    )
    identity_addr: HostPort = setting("PILLION_IDENTITY_ADDR", host_port, reason="the identity service")
    token_file: str = setting("PILLION_IDENTITY_TOKEN_FILE", text, reason="our service account token")
    anchors_file: str = setting("PILLION_TRUST_ANCHORS_FILE", text, reason="the trust bundle to begin with")
    default_inbound_policy: str = setting(
        "PILLION_DEFAULT_INBOUND_POLICY", one_of(*ACCESS_POLICIES), default="all-unauthenticated", reason="of pods without the annotation"
    )
    cluster_networks: tuple[str, ...] = setting(
        "PILLION_CLUSTER_NETWORKS", comma_list(_network), default=",".join(CLUSTER_NETWORKS), reason="what cluster-* policies admit"
    )
    opaque_ports: str = setting(
        "PILLION_OPAQUE_PORTS",
        _port_list,
        default=IndexSettings().opaque_ports,
        reason="server-speaks-first ports, opaque without annotation",
    )
    log_level: str = setting("PILLION_LOG_LEVEL", one_of("debug", "info", "warning", "error"), default="info", reason="of the log")
    log_format: str = setting("PILLION_LOG_FORMAT", one_of("json", "console"), default="json", reason="of the log")

    @property
    def identity(self) -> WorkloadId:
        """Ours."""
        return WorkloadId.checked(self.trust_domain, self.control_namespace, self.service_account)

    @property
    def identity_service(self) -> WorkloadId:
        """Whom the identity service must prove to be."""
        return WorkloadId.checked(self.trust_domain, self.control_namespace, "pillion-identity")

    @property
    def index(self) -> IndexSettings:
        """What the index needs to know."""
        return IndexSettings(self.trust_domain, self.default_inbound_policy, self.cluster_networks, self.opaque_ports)

    def check(self) -> None:
        """What no single setting shows; raises InvalidSettings."""
        try:
            _ = self.identity, self.identity_service
        except InvalidName as error:
            raise InvalidSettings((str(error),)) from None
