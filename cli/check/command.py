"""The command `pillion check`: which checks, how they are shown, and the exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from itertools import groupby
from typing import Any, Literal

import click
import trio
from rich.console import Console
from rich.status import Status
from rich.text import Text

from cli.check.catalogue import CONTROL_PLANE, DATA_PLANE, PRE
from cli.check.cluster import Cluster
from cli.check.model import Category, Check, Result, succeeded
from cli.check.run import run_checks
from cli.output import WHICH_CLUSTER, CommandFailed, print_json, printable
from core.k8s.cluster import NoCluster, connect

Output = Literal["table", "json", "short"]
_MARKS = {"success": ("√", "green"), "warning": ("‼", "yellow"), "error": ("×", "red"), "skipped": ("-", "dim")}


@click.command()
@click.option("--pre", is_flag=True, help="Before installing: may you, and can this cluster take it.")
@click.option("--proxy", is_flag=True, help="The sidecars too.")
@click.option("-n", "--namespace", default="", help="With --proxy: only this namespace's workloads.")
@click.option("--wait", "wait_s", type=click.IntRange(0, 3600), default=300, show_default=True, help="Seconds for what settles by itself.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "short"]), default="table", show_default=True)
@click.option("--kubeconfig", default="", help="Default: KUBECONFIG, else ~/.kube/config.")
@click.option("--context", default="", help="Of the kubeconfig.")
def check(pre: bool, proxy: bool, namespace: str, wait_s: int, output: Output, kubeconfig: str, context: str) -> None:
    """Look for what is wrong with an installation, and say what to do about it.

    Exit code 0 when nothing is wrong (warnings may be there), 1 when something is, 2 for wrong usage.
    """
    if pre and proxy:
        raise click.UsageError("--pre is before the installation, --proxy after it: one of the two")
    categories = PRE if pre else [*CONTROL_PLANE, *(DATA_PLANE if proxy else ())]
    screen = _Screen(output)
    try:
        results = trio.run(_check, categories, namespace, float(wait_s), screen, kubeconfig, context)
    except NoCluster as error:
        raise CommandFailed(str(error), WHICH_CLUSTER) from None
    finally:
        screen.close()
    if output == "json":
        print_json(as_json(results))
    else:
        click.echo(f"\n{summary(results)}")
    sys.exit(0 if succeeded(results) else 1)


async def _check(
    categories: Sequence[Category], namespace: str, wait_s: float, screen: _Screen, kubeconfig: str, context: str
) -> list[Result]:
    async with connect(kubeconfig, context, user_agent="pillion-check") as api:
        cluster = Cluster(api, metadata.version("pillion"), namespace)
        return await run_checks(categories, cluster, wait_s, screen.tell, screen.done)


class _Screen:
    """Lines as they come, under each category's heading, with a spinner while a check is asked (on a terminal only)."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._console = Console(highlight=False, soft_wrap=True)
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._heading = ""
        self._waits_for = ""

    def tell(self, category: Category, check: Check, cause: str) -> None:
        """Shown while waiting, and gone afterwards; where nothing can go away, one line for each check that is waited for."""
        if not self._errors.is_terminal:
            if cause and self._waits_for != check.id:
                self._waits_for = check.id
                self._errors.print(Text(f"waiting: {category.title}: {check.sentence} ({printable(cause.splitlines()[0])})"))
            return
        line = Text(
            f"{category.title}: {check.sentence}" + (f" ({printable(cause.splitlines()[0])})" if cause else ""), overflow="ellipsis"
        )
        if self._status is None:
            self._status = self._errors.status(line)
            self._status.start()
        else:
            self._status.update(line)

    def done(self, result: Result) -> None:
        """One line, and the cause and what to do when there is something to do."""
        if self._output == "json" or (self._output == "short" and result.outcome in ("success", "skipped")):
            return
        if self._heading != result.category.id:
            self._console.print(("\n" if self._heading else "") + result.category.title, style="bold", markup=False)
            self._heading = result.category.id
        for line in lines(result):
            self._console.print(line)

    def close(self) -> None:
        """End the spinner."""
        if self._status is not None:
            self._status.stop()


def lines(result: Result) -> list[Text]:
    """What is printed about one result; text of the cluster is never markup, nor can it steer a terminal."""
    mark, colour = _MARKS[result.outcome]
    remark = f" ({printable(result.text)})" if result.text and result.outcome in ("success", "skipped") else ""
    found = [Text.assemble((mark, colour), f" {result.check.sentence}{remark}")]
    if result.outcome in ("error", "warning"):
        found += [Text(f"    {printable(line)}") for line in result.text.splitlines()]
        found.append(Text.assemble("    ", ("try: ", "bold"), printable(result.hint)))
    return found


def summary(results: Sequence[Result]) -> str:
    """The last line."""
    count = {outcome: sum(result.outcome == outcome for result in results) for outcome in _MARKS}
    stopped = " (stopped at the first that nothing works without)" if results and _stopped(results[-1]) else ""
    return f"{count['success']} as they should be, {count['warning']} warnings, {count['error']} errors{stopped}"


def _stopped(last: Result) -> bool:
    return last.outcome == "error" and last.check.severity == "fatal"


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """For programs: fields are only added."""
    return {
        "success": succeeded(results),
        "categories": [
            {"categoryName": category.id, "checks": [_row(result) for result in group]}
            for category, group in groupby(results, lambda result: result.category)
        ],
    }


def _row(result: Result) -> dict[str, str]:
    row = {"id": result.check.id, "description": result.check.sentence, "severity": result.check.severity, "result": result.outcome}
    if result.outcome in ("error", "warning"):
        return {**row, "error": result.text, "hint": result.hint}
    return {**row, "detail": result.text} if result.text else row
