"""`pillion authz WORKLOAD`: who may use which port of a workload, and which object says so."""

from __future__ import annotations

import click

from cli.output import namespace_option, output_option, print_json, print_table, ref_text
from cli.where import Asked, Where, where_options
from injector.fixed import ADMIN_PORT, INBOUND_PORT, OUTBOUND_PORT

_OWN_PORTS = frozenset({OUTBOUND_PORT, INBOUND_PORT, ADMIN_PORT})
"""The sidecar's, which it declares as every container does; no policy of the workload applies to them."""


@click.command()
@click.argument("workload")
@namespace_option
@where_options
@output_option
def authz(workload: str, namespace: str, where: Where, output: str) -> None:
    """Show who may use which port of WORKLOAD (``cart``, ``deploy/cart`` or a pod), and by which policy."""
    running = Asked(where)
    pod = running.pods(namespace, workload)[0]  # the others have the same labels, and so the same policy
    rows = running.policy("/diagnostics/authz", namespace=pod.namespace, pod=pod.name)
    rows = [row for row in rows if row["port"] not in _OWN_PORTS]
    if output == "json":
        print_json(rows)
        return
    cells = [(row["port"], ref_text(row["server"]), ref_text(row["route"]), ref_text(row["authorization"]), row["clients"]) for row in rows]
    columns = ("PORT", "SERVER", "ROUTE", "AUTHORIZED BY", "CLIENTS")
    print_table(columns, cells, f"{workload} in namespace {namespace} declares no port, and no Server gives it one")
