"""The shape of what injection reads in a pod: types only, so that a wrong object is refused at its field, not later. Pure.

Fields that injection does not read are not here and may hold anything. Called by injector.patch before anything is decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from core.k8s.fields import InvalidObject, join, read, without_nulls

_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_Seconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_CONTAINERS_MAX = 1000


class _Shape(msgspec.Struct, frozen=True, rename="camel"):
    pass


class _Meta(_Shape, frozen=True):
    name: str = ""
    generate_name: str = ""
    namespace: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _ContainerPort(_Shape, frozen=True):
    container_port: _Port
    name: str = ""
    protocol: str = "TCP"


class _Action(_Shape, frozen=True):
    port: int | str
    host: str = ""


class _Probe(_Shape, frozen=True):
    http_get: _Action | None = None
    tcp_socket: _Action | None = None
    grpc: _Action | None = None
    timeout_seconds: _Seconds = 1


class _Security(_Shape, frozen=True):
    run_as_user: int | None = None


class _Container(_Shape, frozen=True):
    name: str
    image: str = ""
    restart_policy: str = ""
    ports: list[_ContainerPort] = []
    env: list[dict[str, Any]] = []
    startup_probe: _Probe | None = None
    readiness_probe: _Probe | None = None
    liveness_probe: _Probe | None = None
    security_context: _Security | None = None


class _Os(_Shape, frozen=True):
    name: str = ""


class _Spec(_Shape, frozen=True):
    containers: Annotated[list[_Container], msgspec.Meta(max_length=_CONTAINERS_MAX)]
    init_containers: Annotated[list[_Container], msgspec.Meta(max_length=_CONTAINERS_MAX)] = []
    volumes: list[dict[str, Any]] = []
    host_network: bool = False
    host_users: bool = True
    os: _Os | None = None
    termination_grace_period_seconds: _Seconds | None = None
    security_context: _Security | None = None


def checked(pod: object) -> dict[str, Any]:
    """The pod without nulls, which mean absent; raises InvalidObject. Positions in lists are those of ``pod``."""
    if not isinstance(pod, Mapping):
        raise InvalidObject("", "a pod", type(pod).__name__)
    try:
        found: Any = without_nulls(pod)
    except RecursionError:
        raise InvalidObject("", "a pod of at most some hundred levels", "more") from None
    read(found.get("metadata", {}), _Meta, "metadata")
    if "spec" not in found:
        raise InvalidObject("spec", "a value", "nothing")
    spec = read(found["spec"], _Spec, "spec")
    names: set[str] = set()
    for field, containers in (("initContainers", spec.init_containers), ("containers", spec.containers)):
        for number, container in enumerate(containers):
            if container.name in names:
                raise InvalidObject(join(f"spec.{field}[{number}]", "name"), "a name that no other container has", container.name[:80])
            names.add(container.name)
    result: dict[str, Any] = found
    return result
