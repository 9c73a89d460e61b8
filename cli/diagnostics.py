"""`pillion diagnostics`: what sidecars and the policy controller know, as they know it."""

from __future__ import annotations

import re
from typing import Any

import click
import msgspec

from cli.output import CommandFailed, namespace_option, output_option, print_json, print_table, ref_text, say
from cli.where import Asked, Where, where_options
from core.addrs import InvalidAddr, parse_addr

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")  # a Service's begins with a letter: no address does


@click.group()
def diagnostics() -> None:
    """Look into sidecars and the policy controller."""


@diagnostics.command("proxy-metrics")
@click.argument("workload")
@namespace_option
@where_options
@output_option
def proxy_metrics(workload: str, namespace: str, where: Where, output: str) -> None:
    """Print the metrics of a workload's sidecars.

    As a table: in Prometheus' text format.
    """
    running = Asked(where)
    found = {f"{pod.namespace}/{pod.name}": running.sidecar(pod, "/metrics").decode() for pod in running.pods(namespace, workload)}
    if output == "json":
        print_json({name: _samples(text) for name, text in found.items()})
        return
    for name, text in found.items():
        say(f"# pod {name}\n{text.rstrip()}")


def _samples(text: str) -> list[dict[str, Any]]:
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(text)
    return [{"name": sample.name, "labels": sample.labels, "value": sample.value} for family in families for sample in family.samples]


@diagnostics.command()
@click.argument("workload")
@click.option("-p", "--port", type=click.IntRange(1, 65535), help="Default: every port the sidecar knows.")
@namespace_option
@where_options
@output_option
def policy(workload: str, port: int | None, namespace: str, where: Where, output: str) -> None:
    """Show the policy of a workload's ports.

    With -p how the controller came to it, without what the sidecar holds.
    """
    running = Asked(where)
    pod = running.pods(namespace, workload)[0]
    if port is not None:
        report = running.policy("/diagnostics/policy", namespace=pod.namespace, pod=pod.name, port=str(port))
        print_json(report) if output == "json" else _print_report(report)
        return
    held = msgspec.json.decode(running.sidecar(pod, "/policy"))
    if output == "json":
        print_json(held)
        return
    rows = [(number, *_policy_row(found)) for number, found in held.items()]
    print_table(
        ("PORT", "SERVER", "PROTOCOL", "ROUTES", "AUTHORIZATIONS"), rows, f"the sidecar of {pod.name} was not told about any port yet"
    )


def _policy_row(found: dict[str, Any] | None) -> tuple[object, ...]:
    if found is None:
        return ("(not known yet: connections wait, then are refused)", "-", "-", "-")
    places = found["routes"] or [found]  # beside routes, the port's own authorizations let no request in
    names = dict.fromkeys(ref_text(one["ref"]) for place in places for one in place["authorizations"])
    return (ref_text(found["server"]), found["protocol"], len(found["routes"]), ", ".join(names) or "nobody")


def _print_report(report: dict[str, Any]) -> None:
    say(report["why"])
    for shadowed in report["shadowed"]:
        say(f"without effect, because an older Server selects the port too: {ref_text(shadowed)}")
    rows = [("all requests", *_grant_row(grant)) for grant in report["grants"]]
    for route in report["routes"]:
        name = ref_text(route["route"]) + (" (narrowed)" if route["narrowed"] else "")
        rows += [(name, *_grant_row(grant)) for grant in route["grants"]] or [(name, "-", "-", route["problem"])]
    if rows:
        print_table(("FOR", "POLICY", "CLIENTS", "PROBLEM"), rows, "")


def _grant_row(grant: dict[str, Any]) -> tuple[str, ...]:
    return (ref_text(grant["policy"]), grant["clients"], grant.get("problem", ""))


@diagnostics.command()
@click.argument("address", required=False)
@click.option("--of", "workload", help="What the sidecar of this workload knows, instead of the controller.")
@namespace_option
@where_options
@output_option
def endpoints(address: str | None, workload: str | None, namespace: str, where: Where, output: str) -> None:
    """Show what stands behind ADDRESS: IP:PORT, or a Service's NAME:PORT, NAME.NAMESPACE:PORT or full name.

    For the controller, or with --of for a workload's sidecar: then without ADDRESS every one that it has dialled.
    """
    if not (address or workload):
        raise click.UsageError("name an ADDRESS (IP:PORT or SERVICE.NAMESPACE:PORT), or --of WORKLOAD")
    meant = _read_address(address, namespace, where) if address else None
    running = Asked(where)
    addresses = running.service_addresses(*meant) if isinstance(meant, tuple) else [meant] if meant else []
    if workload:
        pod = running.pods(namespace, workload)[0]
        held = msgspec.json.decode(running.sidecar(pod, "/endpoints"))
        known = {addr: found for addr, found in held.items() if not address or addr in addresses}
    else:
        known = {addr: running.policy("/diagnostics/endpoints", addr=addr) for addr in addresses}
    if output == "json":
        print_json(known)
        return
    rows = [row for addr, found in known.items() for row in _destination_rows(addr, found)]
    print_table(("ADDRESS", "KIND", "OBJECT", "ENDPOINT", "POD", "IDENTITY"), rows, "nothing was dialled yet")


def _read_address(text: str, namespace: str, where: Where) -> str | tuple[str, str, int]:
    """An address, or (namespace, name, port) of a Service's name as an app in ``namespace`` would dial it; raises CommandFailed."""
    try:
        return str(parse_addr(text))
    except InvalidAddr:
        host, _, port = text.rpartition(":")
        name, *further = host.split(".")
        a_port = port.isascii() and port.isdigit() and len(port) <= 5
        if _NAME.fullmatch(host) and a_port and further[1:2] in ([], ["svc"]):
            return further[0] if further else namespace, name, int(port)
        source = "pillion local status" if where.local else "kubectl get services -A"
        raise CommandFailed(f"{text!r}: expected IP:PORT, an IPv6 address in brackets, or SERVICE.NAMESPACE:PORT", source) from None


def _destination_rows(addr: str, found: dict[str, Any] | None) -> list[tuple[object, ...]]:
    if found is None:
        return [(addr, "(not known yet)", "-", "-", "-", "-")]
    head = (addr, str(found["kind"]), ref_text(found.get("ref")))
    rows: list[tuple[object, ...]] = []
    rows += [(*head, one["addr"], ref_text(one.get("pod")), one.get("identity") or "(not meshed)") for one in found["endpoints"]]
    return rows or [(*head, "(none)", "-", "-")]


@diagnostics.command()
@click.argument("workload")
@namespace_option
@where_options
@output_option
def config(workload: str, namespace: str, where: Where, output: str) -> None:
    """Show the settings a workload's sidecar runs with.

    Of several pods, the first one's.
    """
    running = Asked(where)
    pod = running.pods(namespace, workload)[0]
    settings = msgspec.json.decode(running.sidecar(pod, "/config"))
    if not isinstance(settings, dict):
        raise CommandFailed(f"the sidecar of {pod.namespace}/{pod.name} gave no settings: is it of another version?")
    if output == "json":
        print_json(settings)
        return
    text = {name: value if isinstance(value, str) else msgspec.json.encode(value).decode() for name, value in settings.items()}
    print_table(("SETTING", "VALUE"), sorted(text.items()), "")
