"""The sidecar's settings, read from the environment once at start. Written by injector.sidecar, described by ``--help``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.addrs import ListenAddr, canonical_ip
from core.env import (
    HostPort,
    boolean,
    comma_list,
    host_port,
    integer,
    json_object,
    listen_addr,
    load,
    milliseconds,
    number,
    one_of,
    port,
    setting,
    text,
)
from core.names import WorkloadId


@dataclass(frozen=True)
class Config:
    """Everything a sidecar can be told. Units are in the names; the reasons are part of the declaration."""

    trust_domain: str = setting("PILLION_TRUST_DOMAIN", text, default="cluster.local", reason="the SPIFFE trust domain of the mesh")
    namespace: str = setting("PILLION_POD_NAMESPACE", text, reason="the pod's namespace")
    pod: str = setting("PILLION_POD_NAME", text, reason="the pod's name")
    pod_uid: str = setting("PILLION_POD_UID", text, default="unknown", reason="tells instances of one workload apart")
    pod_ips: tuple[str, ...] = setting(
        "PILLION_POD_IPS",
        comma_list(canonical_ip),
        reason="the pod's own addresses: calls to itself stay plain",
    )
    service_account: str = setting("PILLION_SERVICE_ACCOUNT", text, reason="with the namespace, the workload identity")
    control_namespace: str = setting("PILLION_CONTROL_NAMESPACE", text, default="pillion", reason="where the control plane runs")

    identity_addr: HostPort = setting("PILLION_IDENTITY_ADDR", host_port, reason="the identity service")
    token_file: str = setting("PILLION_IDENTITY_TOKEN_FILE", text, reason="the projected service account token")
    anchors_file: str = setting("PILLION_TRUST_ANCHORS_FILE", text, reason="the trust bundle to begin with")
    policy_addr: HostPort = setting("PILLION_POLICY_ADDR", host_port, reason="the policy controller")

    inbound_listen: ListenAddr = setting(
        "PILLION_INBOUND_LISTEN",
        listen_addr,
        default="[::]:4143",
        reason="where redirected inbound connections arrive",
    )
    outbound_listen: ListenAddr = setting(
        "PILLION_OUTBOUND_LISTEN",
        listen_addr,
        default="[::]:4140",
        reason="where redirected outbound connections arrive",
    )
    admin_listen: ListenAddr = setting("PILLION_ADMIN_LISTEN", listen_addr, default="[::]:4191", reason="probes, metrics, dumps, shutdown")
    inbound_ports: tuple[int, ...] = setting(
        "PILLION_INBOUND_PORTS",
        comma_list(port),
        default="",
        reason="ports whose policy is asked for before the first connection",
    )

    log_level: str = setting(
        "PILLION_LOG_LEVEL",
        one_of("debug", "info", "warning", "error"),
        default="info",
        reason="how much is logged; changeable at run time",
    )
    log_format: str = setting(
        "PILLION_LOG_FORMAT",
        one_of("json", "console"),
        default="json",
        reason="one JSON object a line, or for people",
    )
    access_log: str = setting(
        "PILLION_ACCESS_LOG",
        one_of("off", "errors", "all"),
        default="off",
        reason="which finished requests are logged",
    )

    prove_capture: bool = setting(
        "PILLION_PROVE_CAPTURE",
        boolean,
        default="false",
        reason="whether to end unless this pod's connections are led here; its other containers wait for that (injector.hold)",
    )

    detect_silence_s: float = setting(
        "PILLION_DETECT_SILENCE_MS",
        milliseconds(1, 60_000),
        default="100",
        unit="ms",
        reason="silence after which a client may be waiting for the server to speak first",
    )
    policy_wait_s: float = setting(
        "PILLION_POLICY_WAIT_MS",
        milliseconds(1, 60_000),
        default="2000",
        unit="ms",
        reason="how long a connection waits for the first policy of its port before it is refused",
    )
    connect_timeout_s: float = setting(
        "PILLION_CONNECT_TIMEOUT_MS",
        milliseconds(10, 60_000),
        default="1000",
        unit="ms",
        reason="TCP connect to an endpoint (Linkerd: 1 s)",
    )
    handshake_timeout_s: float = setting(
        "PILLION_HANDSHAKE_TIMEOUT_MS",
        milliseconds(10, 60_000),
        default="5000",
        unit="ms",
        reason="TLS handshake, both directions",
    )
    detect_timeout_s: float = setting(
        "PILLION_DETECT_TIMEOUT_S",
        number(0.1, 600),
        default="10",
        unit="s",
        reason="to finish a first line or ClientHello that was begun",
    )
    header_timeout_s: float = setting(
        "PILLION_HEADER_TIMEOUT_S",
        number(1, 600),
        default="10",
        unit="s",
        reason="to finish a request head that was begun (408)",
    )
    idle_timeout_s: float = setting(
        "PILLION_IDLE_TIMEOUT_S",
        number(1, 86_400),
        default="300",
        unit="s",
        reason="a keep-alive connection without a request is closed after this",
    )
    opaque_idle_timeout_s: float = setting(
        "PILLION_OPAQUE_IDLE_TIMEOUT_S",
        number(1, 864_000),
        default="86400",
        unit="s",
        reason="an opaque connection without a byte is closed after this",
    )
    pool_idle_s: float = setting(
        "PILLION_POOL_IDLE_S",
        number(0, 3600),
        default="60",
        unit="s",
        reason="an unused upstream connection is closed after this",
    )
    shutdown_grace_s: float = setting(
        "PILLION_SHUTDOWN_GRACE_S",
        number(0, 3600),
        default="30",
        unit="s",
        reason="how long drain waits for open connections",
    )
    shutdown_endpoint: bool = setting(
        "PILLION_SHUTDOWN_ENDPOINT",
        boolean,
        default="true",
        reason="whether POST /shutdown on loopback works",
    )

    max_target_bytes: int = setting(
        "PILLION_MAX_TARGET_BYTES",
        integer(64, 1 << 20),
        default="8192",
        unit="bytes",
        reason="request target (414)",
    )
    max_head_bytes: int = setting(
        "PILLION_MAX_HEAD_BYTES",
        integer(1024, 1 << 20),
        default="65536",
        unit="bytes",
        reason="request head (431)",
    )
    max_header_count: int = setting("PILLION_MAX_HEADER_COUNT", integer(1, 10_000), default="100", reason="fields of a request head (431)")
    max_connections: int = setting(
        "PILLION_MAX_CONNECTIONS",
        integer(1, 1_000_000),
        default="50000",
        reason="accepted connections at a time; more are refused",
    )

    forwarded: str = setting(
        "PILLION_FORWARDED",
        one_of("off", "forwarded", "x-forwarded-for"),
        default="off",
        reason="the header field that tells the app the caller's address, appended to those that the request came with",
    )

    probes: dict[str, Any] = setting("PILLION_PROBES", json_object, default="{}", reason="the app's own probes, by admin path")

    @property
    def identity(self) -> WorkloadId:
        """Who this sidecar's workload is; raises InvalidName, which `load_config` turns into a settings error."""
        return WorkloadId.checked(self.trust_domain, self.namespace, self.service_account)

    def control_identity(self, service: str) -> WorkloadId:
        """The identity that a control-plane service (``pillion-identity``, ``pillion-policy``) must prove."""
        return WorkloadId.checked(self.trust_domain, self.control_namespace, service)


def load_config(environ: Mapping[str, str]) -> Config:
    """Read the settings; raises core.env.InvalidSettings with every error at once."""
    config = load(Config, environ)
    config.identity  # noqa: B018  # raises when the names cannot form an identity
    return config
