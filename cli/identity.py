"""`pillion identity`: what a workload proves itself with, and the rotation of issuer and trust anchor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from cli.output import CommandFailed, output_option, print_json, print_table
from cli.where import Asked, Where, where_options
from identity.admin_client import AdminRefused
from identity.admin_wire import Status
from injector.fixed import SIDECAR_NAME


class _WorkloadOrCommand(click.Group):
    """``identity cart`` means ``identity show cart``; a workload named like a command is reached with ``show``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_WorkloadOrCommand)
def identity() -> None:
    """Show a workload's certificates (``pillion identity WORKLOAD``), or look at and rotate what signs them."""


def _certificates(where: Where, namespace: str, workload: str) -> dict[str, Any]:
    """What ``/certs`` of each sidecar says, by ``namespace/pod``."""
    asked = Asked(where)
    return {f"{pod.namespace}/{pod.name}": msgspec.json.decode(asked.sidecar(pod, "/certs")) for pod in asked.pods(namespace, workload)}


@identity.command()
@click.argument("workload")
@click.option("-n", "--namespace", default="default", show_default=True, help="The workload's namespace.")
@where_options
@output_option
def show(workload: str, namespace: str, where: Where, output: str) -> None:
    """Show what every pod of WORKLOAD proves itself with.

    Its certificate, and the trust anchors by which it believes others.
    """
    found = _certificates(where, namespace, workload)
    if output == "json":
        print_json(found)
    else:
        print_table(
            ("POD", "IDENTITY", "SERIAL", "VALID UNTIL", "ISSUER", "ANCHORS"), [_row(name, certs) for name, certs in found.items()], ""
        )
    missing = [name for name, certs in found.items() if certs is None]
    if missing:
        logs = "pillion local logs" if where.local else f"kubectl logs -n {namespace}"
        raise CommandFailed(f"not certified: {', '.join(missing)}", f"{logs} POD -c {SIDECAR_NAME}")


def _row(name: str, certs: dict[str, Any] | None) -> tuple[str, ...]:
    if certs is None:
        return (name, "(none yet)", "-", "-", "-", "-")
    leaf = certs["chain"][0]
    return (name, certs["identity"], leaf["serial"][:16], _time(certs["not_after"]), leaf["issuer"], str(len(certs["trust_anchors"])))


@identity.command()
@where_options
@output_option
def status(where: Where, output: str) -> None:
    """Show trust anchors, issuer and rotation.

    Which step is due, and which workload has picked up what.
    """
    with _asking(where):
        found = where.admin().status()
    _print_status(found, output)


@identity.command()
@click.option("--step", type=click.Choice(["add", "switch", "drop", "abort"]), help="Default: the step that is due.")
@click.option("--through", is_flag=True, help="Do every step, waiting for the workloads in between.")
@click.option("--wait", "wait_s", default=120.0, show_default=True, help="With --through: seconds to wait for workloads at each step.")
@click.option("--ignore-absent", is_flag=True, help="Do not wait for workloads that are no longer heard of.")
@click.option("--force", is_flag=True, help="Do the step even if it breaks workloads that have not picked up the last one.")
@where_options
@output_option
def rotate(step: str | None, through: bool, wait_s: float, ignore_absent: bool, force: bool, where: Where, output: str) -> None:
    """Replace the trust anchor, one step a call.

    Add the new one, switch the issuer, drop the old one. A step that would break a workload that has not picked up the last one is refused.
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
def _asking(where: Where) -> Iterator[None]:
    """Turn the service's refusals, and its absence, into errors of the command."""
    try:
        yield
    except AdminRefused as refused:
        blocking = "".join(f"\n  not yet: {who}" for who in refused.blocking)
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
        click.echo(f"the next step waits: {who}")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
