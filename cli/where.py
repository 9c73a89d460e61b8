"""Which mesh a command means: one that `pillion local up` runs, or the cluster of a kubeconfig; and the same questions to either.

Used by every command that asks a running mesh, so that they all find it in the same way.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.output import CommandFailed
from cli.pods import CONTROL_NAMESPACE, ClusterMesh, FoundPod, configured
from cli.reach import LocalMesh
from core.addrs import Addr, canonical_ip
from identity.admin_client import IdentityAdmin
from local import protocol
from local.state import BadName, state_folder

F = TypeVar("F", bound=Callable[..., Any])
FoundPods = Sequence[protocol.PodStatus | FoundPod]
_DEFAULT = "default"


@dataclass(frozen=True)
class Where:
    """A local mesh by name, or the cluster of a kubeconfig."""

    mesh: str
    kubeconfig: str
    context: str
    control: str

    @property
    def local(self) -> bool:
        """Which of both is meant; raises CommandFailed when that is open, because a rotation of the wrong mesh cannot be undone."""
        if self.mesh:
            return True
        if self.kubeconfig or self.context:
            return False
        try:
            runs, cluster = _listens(state_folder(_DEFAULT) / "identity" / "admin.sock"), configured()
        except BadName as error:
            raise CommandFailed(str(error)) from None
        if runs and cluster:
            text = "a local mesh runs on this machine, and there is a kubeconfig: which one is meant?"
            raise CommandFailed(text, "--name default for the local mesh, --context NAME or --kubeconfig FILE for the cluster")
        return runs or not cluster

    def mesh_asked(self) -> LocalMesh | ClusterMesh:
        """What answers questions about pods, sidecars and policy; raises CommandFailed when it cannot be reached."""
        if not self.local:
            return ClusterMesh(self.kubeconfig, self.context, self.control)
        return LocalMesh(self.mesh) if self.mesh else LocalMesh(_DEFAULT, "; for a cluster: --kubeconfig FILE, or set KUBECONFIG")

    def admin(self) -> IdentityAdmin:
        """The operator's way to the identity service."""
        return self.mesh_asked().identity()

    def __str__(self) -> str:
        return f"mesh {self.mesh or _DEFAULT!r}" if self.local else "the cluster"


class Asked:
    """A mesh that has been found: the questions of `pillion authz`, `identity` and `diagnostics`; each raises CommandFailed."""

    def __init__(self, where: Where) -> None:
        self._mesh = where.mesh_asked()

    def pods(self, namespace: str, workload: str) -> FoundPods:
        """The meshed pods of a name; never empty."""
        return self._mesh.pods(namespace, workload)

    def workloads(self, namespace: str) -> Mapping[str, FoundPods]:
        """``kind/name`` of everything meshed that runs in a namespace -> its pods; never empty."""
        return self._mesh.workloads(namespace)

    def service_addresses(self, namespace: str, name: str, port: int) -> list[str]:
        """What an app that dials a Service reaches first, as IP:PORT; never empty."""
        ips = self._mesh.service_ips(namespace, name)
        if not ips:
            raise CommandFailed(f"service {namespace}/{name} has no address of its own, its name leads to the pods", "give a pod's IP:PORT")
        return [str(Addr(canonical_ip(ip), port)) for ip in ips]

    def sidecar(self, pod: protocol.PodStatus | FoundPod, path: str) -> bytes:
        """GET a path of the sidecar's admin port."""
        if isinstance(self._mesh, LocalMesh):
            assert isinstance(pod, protocol.PodStatus)
            return self._mesh.sidecar(pod, path)
        assert isinstance(pod, FoundPod)
        return self._mesh.sidecar(pod, path)

    def policy(self, path: str, **query: str) -> Any:
        """GET from the policy controller's diagnostics."""
        return self._mesh.policy(path, **query)


def _listens(path: Path) -> bool:
    """Whether a local identity service is there; a killed one may have left its socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def where_options(command: F) -> F:
    """``--name``, or ``--kubeconfig --context --control-namespace``, passed as ``where``."""

    @functools.wraps(command)
    def wrapped(mesh: str, kubeconfig: str, context: str, control: str, **options: Any) -> Any:
        return command(where=Where(mesh, kubeconfig, context, control), **options)

    for option in (
        click.option("--control-namespace", "control", default=CONTROL_NAMESPACE, show_default=True, help="Where Pillion is installed."),
        click.option("--context", default="", help="Of the kubeconfig."),
        click.option("--kubeconfig", default="", help="Default: KUBECONFIG, else ~/.kube/config."),
        click.option("--name", "mesh", default="", help="A local mesh; without this, the one that runs here, or the cluster."),
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]  # click commands are built from any callable
