"""How commands speak: tables or JSON on stdout, errors on stderr with the next step, and the exit codes documented in docs/cli.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import msgspec

F = TypeVar("F", bound=Callable[..., Any])
WHICH_CLUSTER = "kubectl config get-contexts; for a mesh on this machine: pillion local status"
"""The next step of commands that need a cluster and were told of none."""


class CommandFailed(click.ClickException):
    """The command could not do what was asked. The text names the object; next_step is what the reader can do about it. Exit code 1."""

    exit_code = 1

    def __init__(self, text: str, next_step: str = "") -> None:
        super().__init__(text)
        self.next_step = next_step

    def show(self, file: Any = None) -> None:
        """Two lines on stderr."""
        say(f"error: {self.message}", err=True)
        if self.next_step:
            say(f"  try: {self.next_step}", err=True)


def output_option(command: F) -> F:
    """``-o table|json``, passed as ``output``."""
    choice = click.Choice(["table", "json"])
    return click.option("-o", "--output", type=choice, default="table", show_default=True, help="For people, or for programs.")(command)


def namespace_option(command: F) -> F:
    """``-n NAMESPACE``."""
    return click.option("-n", "--namespace", default="default", show_default=True, help="The workload's namespace.")(command)


def say(text: str, *, err: bool = False) -> None:
    """Lines that may repeat what pods, sidecars or objects of a cluster say: they cannot steer a terminal."""
    click.echo("\n".join(printable(line) for line in text.split("\n")), err=err)


def print_json(value: object) -> None:
    """Indented, keys in the order given."""
    click.echo(msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """One line a row, columns aligned; ``empty`` when there is no row. Cells are text, never markup, and cannot steer a terminal."""
    if not rows:
        click.echo(empty)
        return
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(line[at]) for line in [list(columns), *cells]) for at in range(len(columns))]
    for line in [list(columns), *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """One line without control characters, and without what turns the direction of writing."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def ref_text(ref: Any) -> str:
    """``server shop/cart`` from a Ref as JSON, ``-`` for none."""
    if not isinstance(ref, dict):
        return "-"
    where = f"{ref['namespace']}/" if ref.get("namespace") else ""
    return f"{str(ref.get('kind', '')).lower()} {where}{ref.get('name', '')}"
