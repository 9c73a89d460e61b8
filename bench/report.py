"""What a run leaves behind: a table on the terminal, JSON, and for whole full runs the charts and docs/performance.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from bench.charts import CHARTS, chart, number
from bench.facts import Facts
from bench.measure import Result
from bench.page import performance_page
from bench.targets import judge

HERE = Path(__file__).resolve().parent
LATEST = HERE / "results" / "latest.json"
DOCS = HERE.parent / "docs"


def as_json(facts: Facts, rows: Sequence[Result]) -> str:
    """The whole run as one JSON object: the facts, then ``rows``."""
    return json.dumps({**dataclasses.asdict(facts), "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"


def from_json(text: str) -> tuple[Facts, list[Result]]:
    """Read what `as_json` wrote."""
    said = json.loads(text)
    rows = [Result(**row) for row in said.pop("rows")]
    return Facts(**said), rows


def publish(facts: Facts, rows: Sequence[Result], out: Path, *, page: bool) -> None:
    """Print the table and write the JSON to ``out``; with ``page`` also docs/performance.md and its charts."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_json(facts, rows))
    print_table(rows)
    print(f"written: {out}")
    if page:
        write_page(facts, rows)


def write_page(facts: Facts, rows: Sequence[Result], docs: Path = DOCS) -> None:
    """docs/performance.md and docs/performance/*.svg, none of an earlier run among them."""
    pictures = docs / "performance"
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("P*.svg"):
        old.unlink()
    for picture in CHARTS:
        drawn = chart(rows, picture)
        if drawn is not None:
            (pictures / picture.file).write_text(drawn)
    notes = HERE / "notes.md"
    (docs / "performance.md").write_text(performance_page(facts, rows, notes.read_text() if notes.exists() else ""))
    print(f"written: {docs / 'performance.md'}")


def print_table(rows: Sequence[Result]) -> None:
    """Medians and ratios, then Pillion against its targets."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="medians of interleaved rounds; ratios to Envoy and HAProxy in the same run")
    for heading in ("row", "work", "contestant", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in ("median", "unit", "spread", "x Envoy", "x HAProxy", "failed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.row,
            row.work,
            row.contestant,
            row.metric,
            number(row.median),
            row.unit,
            "" if row.spread is None else f"{row.spread:.0%}",
            "" if row.ratio_to_envoy is None else f"{row.ratio_to_envoy:.2f}",
            "" if row.ratio_to_haproxy is None else f"{row.ratio_to_haproxy:.2f}",
            f"{row.failed}/{row.rounds}" if row.failed else "",
            style="bold" if row.contestant == "pillion" else "",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(table)
    for verdict in judge(rows):
        if verdict.figure is not None:
            target = verdict.target
            sign, unit = (">=" if target.at_least else "<="), (f"x {target.against}" if target.against else f" {verdict.unit}")
            mark = "[green]reached[/]" if verdict.met else "[red]not yet[/]"
            console.print(
                f"{mark} {target.row} {verdict.work} {target.metric}: {verdict.figure:.3g}{unit}, must be {sign} {target.value:g}"
            )
