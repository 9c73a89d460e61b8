"""The shape of what the runner reads in a pod spec: types only, so that a wrong manifest is refused at its field, not later. Pure.

Fields that the runner does not read are not here and may hold anything. Called by local.objects.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

PortNumber = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=86_400)]
Id = Annotated[int, msgspec.Meta(ge=1, le=65533)]  # uid 0 would be root on this machine's own files; a user namespace has ids to 65535


class Shape(msgspec.Struct, frozen=True, rename="camel"):
    """Only ever read into, never used."""


class Meta(Shape, frozen=True):
    """metadata of a pod template."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Port(Shape, frozen=True):
    """Container.ports[]."""

    container_port: PortNumber
    name: str = ""
    protocol: str = "TCP"


class Ref(Shape, frozen=True):
    """A reference to a ConfigMap, a Secret or a key of one."""

    name: str = ""
    key: str = ""
    optional: bool = False


class FieldRef(Shape, frozen=True):
    """Downward API."""

    field_path: str


class ValueFrom(Shape, frozen=True):
    """Container.env[].valueFrom."""

    field_ref: FieldRef | None = None
    config_map_key_ref: Ref | None = None
    secret_key_ref: Ref | None = None


class Env(Shape, frozen=True):
    """Container.env[]."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[^=\x00]+$")]
    value: str | None = None
    value_from: ValueFrom | None = None


class EnvFrom(Shape, frozen=True):
    """Container.envFrom[]."""

    prefix: str | None = None
    config_map_ref: Ref | None = None
    secret_ref: Ref | None = None


class Mount(Shape, frozen=True):
    """Container.volumeMounts[]."""

    name: str
    mount_path: Annotated[str, msgspec.Meta(pattern=r"^/[^\x00]*[^/\x00]$")]
    sub_path: str | None = None
    read_only: bool | None = None


class Action(Shape, frozen=True):
    """httpGet, tcpSocket or grpc of a probe."""

    port: int | str | None = None
    path: str | None = None
    host: str | None = None
    scheme: str | None = None
    service: str | None = None
    http_headers: list[dict[str, str]] | None = None


class Exec(Shape, frozen=True):
    """exec of a probe or hook."""

    command: list[str] = []


class Probe(Shape, frozen=True):
    """A probe of any kind."""

    http_get: Action | None = None
    tcp_socket: Action | None = None
    grpc: Action | None = None
    exec: Exec | None = None
    initial_delay_seconds: Seconds | None = None
    period_seconds: Seconds | None = None
    timeout_seconds: Seconds | None = None
    success_threshold: Seconds | None = None
    failure_threshold: Seconds | None = None


class Hooks(Shape, frozen=True):
    """Container.lifecycle."""

    pre_stop: dict[str, Any] | None = None


class Security(Shape, frozen=True):
    """securityContext of a pod or container."""

    run_as_user: Id | None = None
    run_as_group: Id | None = None


class Container(Shape, frozen=True):
    """A container of any kind."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
    image: str | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    working_dir: str | None = None
    restart_policy: str | None = None
    env: list[Env] | None = None
    env_from: list[EnvFrom] | None = None
    ports: list[Port] | None = None
    volume_mounts: list[Mount] | None = None
    liveness_probe: Probe | None = None
    readiness_probe: Probe | None = None
    startup_probe: Probe | None = None
    lifecycle: Hooks | None = None
    security_context: Security | None = None


class Item(Shape, frozen=True):
    """items[] of a volume."""

    path: str
    key: str = ""
    field_ref: FieldRef | None = None


class Files(Shape, frozen=True):
    """configMap, secret or downwardAPI of a volume or of a projected source."""

    name: str | None = None
    secret_name: str | None = None
    items: list[Item] | None = None
    optional: bool | None = None


class TokenSource(Shape, frozen=True):
    """serviceAccountToken of a projected volume."""

    path: str
    audience: str | None = None
    expiration_seconds: Annotated[int, msgspec.Meta(ge=600)] | None = None  # Kubernetes' own minimum


class Source(Shape, frozen=True):
    """sources[] of a projected volume."""

    config_map: Files | None = None
    secret: Files | None = None
    downward_api: Files | None = msgspec.field(default=None, name="downwardAPI")
    service_account_token: TokenSource | None = None


class Projected(Shape, frozen=True):
    """A projected volume."""

    sources: list[Source] | None = None


class HostPath(Shape, frozen=True):
    """A path of the machine."""

    path: Annotated[str, msgspec.Meta(pattern=r"^/[^\x00]*$")]


class Volume(Shape, frozen=True):
    """Pod.spec.volumes[]."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
    host_path: HostPath | None = None
    config_map: Files | None = None
    secret: Files | None = None
    downward_api: Files | None = msgspec.field(default=None, name="downwardAPI")
    projected: Projected | None = None


class HostAlias(Shape, frozen=True):
    """Pod.spec.hostAliases[]."""

    ip: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Fa-f.:]{2,45}\Z")]
    hostnames: list[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,252})\Z")]] = []


class PodSpec(Shape, frozen=True):
    """Pod.spec."""

    containers: Annotated[list[Container], msgspec.Meta(min_length=1)]
    init_containers: list[Container] | None = None
    volumes: list[Volume] | None = None
    restart_policy: str | None = None
    hostname: str | None = None
    subdomain: str | None = None
    service_account_name: str | None = None
    termination_grace_period_seconds: Seconds | None = None
    host_aliases: list[HostAlias] | None = None
    host_network: bool | None = None
    security_context: Security | None = None
