"""`pillion stat`: success, rate and latency of workloads, from two looks at their sidecars' metrics. Needs no Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from cli import traffic
from cli.output import CommandFailed, namespace_option, output_option, print_json, print_table, say
from cli.traffic import Group, Samples, Traffic
from cli.where import Asked, FoundPods, Where, where_options

_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@click.command()
@click.argument("workloads", metavar="[WORKLOAD]...", nargs=-1)
@click.option("--by", type=click.Choice(["client", "route", "destination"]), help="A line for each caller, route, or destination dialled.")
@click.option("--window", type=click.IntRange(1, 3600), default=5, show_default=True, help="Seconds between the two looks.")
@namespace_option
@where_options
@output_option
def stat(workloads: tuple[str, ...], by: Group | None, window: int, namespace: str, where: Where, output: str) -> None:
    """Show success, rate and latency of the requests to WORKLOADs, in the next seconds; without a name, to all of the namespace.

    SUCCESS is the share of answers that were no failure. DENIED: requests and connections a second that no policy let in, or no route
    wanted. With `--by destination` it is about what the workloads ask of others.
    """
    running = Asked(where)
    asked = {name: running.pods(namespace, name) for name in workloads} or running.workloads(namespace)
    first = dict(_look(running, asked))
    time.sleep(window)
    found: dict[str, dict[str, Traffic]] = {}
    seen: dict[str, int] = dict.fromkeys(asked, 0)
    for (workload, pod), (then, after) in _look(running, asked):
        if (workload, pod) in first:
            now, before = first[workload, pod]
            traffic.add(found.setdefault(workload, {} if by else {"": Traffic()}), before, after, then - now, by)
            seen[workload] += 1
    if not any(seen.values()):
        raise CommandFailed("no sidecar answered", "pillion check --proxy, or for a local mesh: pillion local status")
    if output == "json":
        print_json([_as_json(workload, seen[workload], group, by, one) for workload, group, one in _rows(found)])
        return
    columns = ("WORKLOAD", *([by.upper()] if by else []), "PODS", "SUCCESS", "RPS", "DENIED", "P50", "P95", "P99", "CONNECTIONS")
    rows = [(workload, *([group] if by else []), seen[workload], *_cells(one, by)) for workload, group, one in _rows(found)]
    print_table(columns, rows, f"nothing was asked of them yet: {', '.join(seen)}")


def _look(running: Asked, asked: Mapping[str, FoundPods]) -> Iterator[tuple[tuple[str, str], tuple[float, Samples]]]:
    """(workload, pod) -> when, and what its metrics were then. A pod that does not answer is named and left out: others may."""
    for workload, pods in asked.items():
        for pod in pods:
            try:
                samples = traffic.read(running.sidecar(pod, "/metrics").decode(errors="replace"))
            except CommandFailed as error:
                say(f"left out: {error.message}", err=True)
            except ValueError as error:
                say(f"left out: the metrics of {pod.namespace}/{pod.name} cannot be read: {error}", err=True)
            else:
                yield (workload, pod.name), (time.monotonic(), samples)


def _rows(found: Mapping[str, Mapping[str, Traffic]]) -> list[tuple[str, str, Traffic]]:
    return [(workload, group, one) for workload, groups in sorted(found.items()) for group, one in sorted(groups.items())]


def _cells(one: Traffic, by: Group | None) -> Sequence[str]:
    success = "-" if one.success is None else f"{one.success * 100:.2f}%"
    times = ["-" if (ms := one.quantile(share)) is None else f"{ms:.0f}ms" for share in _QUANTILES.values()]
    denied = "-" if by == "destination" else f"{one.denied:.1f}"
    return (success, f"{one.rate:.1f}", denied, *times, "-" if by == "route" else str(one.connections))


def _as_json(workload: str, pods: int, group: str, by: Group | None, one: Traffic) -> dict[str, Any]:
    return {
        "workload": workload,
        **({by: group} if by else {}),
        "pods": pods,
        "success": one.success,
        "requests_per_second": one.rate,
        "denied_per_second": one.denied,
        "latency_ms": {name: one.quantile(share) for name, share in _QUANTILES.items()},
        "connections": one.connections,
    }
