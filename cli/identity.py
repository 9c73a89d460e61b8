"""`pillion identity`: what a workload proves itself with, and the rotation of issuer and trust anchor."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from cli.output import CommandFailed, output_option, print_json, print_table
from cli.pods import CONTROL_NAMESPACE, ClusterMesh, configured
from cli.reach import SIDECAR, LocalMesh
from identity.admin_client import AdminRefused, IdentityAdmin
from identity.admin_wire import Status
from local.state import state_folder

F = TypeVar("F", bound=Callable[..., Any])
_DEFAULT = "default"


class _WorkloadOrCommand(click.Group):
    """``identity cart`` means ``identity show cart``; a workload named like a command is reached with ``show``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_WorkloadOrCommand)
def identity() -> None:
    """Show a workload's certificates (``pillion identity WORKLOAD``), or look at and rotate what signs them."""


@dataclass(frozen=True)
class _Where:
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
        runs, cluster = _listens(state_folder(_DEFAULT) / "identity" / "admin.sock"), configured()
        if runs and cluster:
            text = "a local mesh runs on this machine, and there is a kubeconfig: which one is meant?"
            raise CommandFailed(text, "--name default for the local mesh, --context NAME or --kubeconfig FILE for the cluster")
        return runs or not cluster

    def admin(self) -> IdentityAdmin:
        """The operator's way to the identity service."""
        return LocalMesh(self.mesh or _DEFAULT).identity() if self.local else self.cluster().identity()

    def cluster(self) -> ClusterMesh:
        """The cluster's mesh."""
        return ClusterMesh(self.kubeconfig, self.context, self.control)

    def certificates(self, namespace: str, workload: str) -> dict[str, Any]:
        """What ``/certs`` of each sidecar says, by ``namespace/pod``."""
        if self.local:
            running = LocalMesh(self.mesh or _DEFAULT)
            answers = {f"{pod.namespace}/{pod.name}": running.sidecar(pod, "/certs") for pod in running.pods(namespace, workload)}
        else:
            cluster = self.cluster()
            answers = {f"{pod.namespace}/{pod.name}": cluster.sidecar(pod, "/certs") for pod in cluster.pods(namespace, workload)}
        return {name: msgspec.json.decode(answer) for name, answer in answers.items()}

    def __str__(self) -> str:
        return f"mesh {self.mesh or _DEFAULT!r}" if self.local else "the cluster"


def _listens(path: Path) -> bool:
    """Whether a local identity service is there; a killed one may have left its socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _where_options(command: F) -> F:
    """``--name``, or ``--kubeconfig --context --control-namespace``, passed as ``where``."""

    @functools.wraps(command)
    def wrapped(mesh: str, kubeconfig: str, context: str, control: str, **options: Any) -> Any:
        return command(where=_Where(mesh, kubeconfig, context, control), **options)

    for option in (
        click.option("--control-namespace", "control", default=CONTROL_NAMESPACE, show_default=True, help="Where Pillion is installed."),
        click.option("--context", default="", help="Of the kubeconfig."),
        click.option("--kubeconfig", default="", help="Default: KUBECONFIG, else ~/.kube/config."),
        click.option("--name", "mesh", default="", help="A local mesh; without this, the one that runs here, or the cluster."),
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]  # click commands are built from any callable


@identity.command()
@click.argument("workload")
@click.option("-n", "--namespace", default="default", show_default=True, help="The workload's namespace.")
@_where_options
@output_option
def show(workload: str, namespace: str, where: _Where, output: str) -> None:
    """Show the certificates and trust anchors of every pod of WORKLOAD."""
    found = where.certificates(namespace, workload)
    if output == "json":
        print_json(found)
    else:
        print_table(
            ("POD", "IDENTITY", "SERIAL", "VALID UNTIL", "ISSUER", "ANCHORS"), [_row(name, certs) for name, certs in found.items()], ""
        )
    missing = [name for name, certs in found.items() if certs is None]
    if missing:
        logs = "pillion local logs" if where.local else f"kubectl logs -n {namespace}"
        raise CommandFailed(f"not certified: {', '.join(missing)}", f"{logs} POD -c {SIDECAR}")


def _row(name: str, certs: dict[str, Any] | None) -> tuple[str, ...]:
    if certs is None:
        return (name, "(none yet)", "-", "-", "-", "-")
    leaf = certs["chain"][0]
    return (name, certs["identity"], leaf["serial"][:16], _time(certs["not_after"]), leaf["issuer"], str(len(certs["trust_anchors"])))


@identity.command()
@_where_options
@output_option
def status(where: _Where, output: str) -> None:
    """Show trust anchors, issuer, the step of a rotation that is due, and who has picked up what."""
    with _asking(where):
        found = where.admin().status()
    _print_status(found, output)


@identity.command()
@click.option("--step", type=click.Choice(["add", "switch", "drop", "abort"]), help="Default: the step that is due.")
@click.option("--through", is_flag=True, help="Do every step, waiting for the workloads in between.")
@click.option("--wait", "wait_s", default=120.0, show_default=True, help="With --through: seconds to wait for workloads at each step.")
@click.option("--ignore-absent", is_flag=True, help="Do not wait for workloads that are no longer heard of.")
@click.option("--force", is_flag=True, help="Do the step even if it breaks workloads that have not picked up the last one.")
@_where_options
@output_option
def rotate(step: str | None, through: bool, wait_s: float, ignore_absent: bool, force: bool, where: _Where, output: str) -> None:
    """Rotate the trust anchor: add the new one, switch the issuer, drop the old one.

    Each call does one step. A step that would break a workload that has not picked up the last one is refused.
    """
    if through and (step or force):
        raise click.UsageError("--through does every step in turn and forces none: leave out --step and --force")
    with _asking(where):
        admin = where.admin()
        if through:
            found = admin.rotate_through(ignore_absent=ignore_absent, wait_s=wait_s, told=lambda line: click.echo(line, err=True))
        else:
            done, found = admin.rotate(step or "", ignore_absent=ignore_absent, force=force)
            click.echo(f"{done}: done; next step: {found.due or 'none'}", err=True)
    _print_status(found, output)


@contextlib.contextmanager
def _asking(where: _Where) -> Iterator[None]:
    """Turn the service's refusals, and its absence, into errors of the command."""
    try:
        yield
    except AdminRefused as refused:
        blocking = "".join(f"\n  waits for {who}" for who in refused.blocking)
        raise CommandFailed(refused.sentence + blocking, "pillion identity status") from None
    except OSError as error:
        text = f"the identity service of {where} does not answer ({error.strerror or error})"
        raise CommandFailed(text, "pillion local status" if where.local else "pillion check") from None


def _print_status(found: Status, output: str) -> None:
    if output == "json":
        print_json(found)
        return
    click.echo(f"trust domain {found.trust_domain}, bundle generation {found.generation}, next step of a rotation: {found.due or 'none'}")
    anchors = [(anchor.id, "trust anchor", str(anchor.generation), _time(anchor.not_after)) for anchor in found.anchors]
    anchors.append((found.issuer, "issuer in force", "-", _time(found.issuer_not_after)))
    print_table(("ID", "WHAT", "SINCE GENERATION", "VALID UNTIL"), anchors, "")
    click.echo()
    rows = [
        (
            one.pod,
            one.workload,
            one.generation,
            one.issuer,
            _time(one.not_after),
            "absent" if one.absent else f"{one.heard_s_ago:.0f} s ago",
        )
        for one in found.workloads
    ]
    print_table(("POD", "IDENTITY", "GENERATION", "ISSUER", "VALID UNTIL", "HEARD"), rows, "no workload holds a certificate")
    for who in found.blocking:
        click.echo(f"the next step waits for {who}")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
