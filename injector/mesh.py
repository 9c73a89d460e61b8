"""What is the same for every pod of an installation, and its text: ``mesh.yaml`` of the ConfigMap ``pillion-config``. Pure.

Written by `pillion install`, read by the webhook (hot) and by `pillion inject --manual --mesh FILE`, so that both make the same patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import msgspec

from core.env import host_port
from core.k8s.fields import InvalidObject, read
from core.k8s.manifests import InvalidManifest, read_manifests
from core.names import InvalidName, WorkloadId
from injector.options import InvalidOption, check_defaults

Capture = Literal["init", "agent", "none"]

_ImageName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$", max_length=512)]


class InvalidMesh(ValueError):
    """Mesh settings that cannot be used; the text names the key and what was expected."""


@dataclass(frozen=True)
class Mesh:
    """capture: who redirects the pod's connections: an init container with NET_ADMIN, the node's agent, or somebody else ("none").

    command: the sidecar's; empty for the image's own. identity_addr, policy_addr: empty for the Services of the control namespace.
    native_sidecar: false for clusters before Kubernetes 1.29. defaults: option -> text, weaker than annotations.
    """

    image: str = "pillion:0.1.0"
    image_pull_policy: str = "IfNotPresent"
    command: tuple[str, ...] = ("python", "-m", "proxy")
    trust_domain: str = "cluster.local"
    cluster_domain: str = "cluster.local"
    control_namespace: str = "pillion"
    identity_addr: str = ""
    policy_addr: str = ""
    capture: Capture = "init"
    native_sidecar: bool = True
    defaults: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """``host:port`` of the identity service."""
        return self.identity_addr or f"{self._service('pillion-identity')}:8080"

    @property
    def policy(self) -> str:
        """``host:port`` of the policy controller."""
        return self.policy_addr or f"{self._service('pillion-policy')}:8090"

    def _service(self, name: str) -> str:
        """Ends in a dot: without it, a pod's resolver asks for the name in every domain of its search list first."""
        return f"{name}.{self.control_namespace}.svc.{self.cluster_domain}."


DEFAULT_MESH = Mesh()
LOCAL_MESH = Mesh(
    capture="none",
    command=(),
    identity_addr="pillion-identity.pillion.svc.cluster.local:8080",
    policy_addr="pillion-policy.pillion.svc.cluster.local:8090",
)
"""The local runner's: it captures by itself, and runs a program of its own in place of the image. Its names are looked up in hosts files,
where one with a dot at its end is another."""


class _Text(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    image: _ImageName | None = None
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    command: tuple[str, ...] | None = None
    trust_domain: str | None = None
    cluster_domain: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=200)] | None = None
    control_namespace: str | None = None
    identity_addr: str | None = None
    policy_addr: str | None = None
    capture: Capture | None = None
    native_sidecar: bool | None = None
    defaults: dict[str, str] | None = None


KEYS = tuple(_Text.__struct_encode_fields__)


def read_mesh(text: bytes) -> Mesh:
    """The settings from YAML (or JSON); what is left out has its default. Raises InvalidMesh."""
    try:
        documents = read_manifests(text, is_json=False)
    except InvalidManifest as error:
        raise InvalidMesh(f"not YAML: {error}") from None
    if len(documents) > 1:
        raise InvalidMesh("expected one document")
    try:
        found = read(documents[0] if documents else {}, _Text)
    except InvalidObject as error:
        raise InvalidMesh(str(error)) from None
    given: dict[str, Any] = {entry.name: value for entry in fields(Mesh) if (value := getattr(found, entry.name)) is not None}
    mesh = Mesh(**given)
    _check(mesh)
    return mesh


def _check(mesh: Mesh) -> None:
    try:
        WorkloadId.checked(mesh.trust_domain, mesh.control_namespace, "pillion-identity")
    except InvalidName as error:
        raise InvalidMesh(str(error)) from None
    for key, value in (("identityAddr", mesh.identity_addr), ("policyAddr", mesh.policy_addr)):
        try:
            if value:
                host_port(value)
        except ValueError as error:
            raise InvalidMesh(f"{key}: {error}") from None
    try:
        check_defaults(mesh.defaults)
    except InvalidOption as error:
        raise InvalidMesh(f"defaults.{error.name}: expected {error.expected}") from None
