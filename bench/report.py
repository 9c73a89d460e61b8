"""From results to what people read: a table on the terminal, JSON, SVG charts and docs/performance.md."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Result

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Facts:
    """How and where a run was made. started: seconds since the epoch."""

    machine: dict[str, str]
    versions: dict[str, str]
    commit: str
    pinning: str
    rounds: int
    seconds: float
    quick: bool
    started: float
    took_s: float


def as_json(facts: Facts, rows: Sequence[Result]) -> str:
    """The whole run as one JSON object: the facts, then ``rows``."""
    body = dataclasses.asdict(facts) | {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(facts.started))}
    return json.dumps({**body, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"


def publish(facts: Facts, rows: Sequence[Result], out: Path | None) -> None:
    """Print the table and write the files."""
    path = out or HERE / "results" / ("quick.json" if facts.quick else "latest.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(facts, rows))
    print_table(rows)
    print(f"written: {path}")


def print_table(rows: Sequence[Result]) -> None:
    """Ratios by rich."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="medians of interleaved rounds; ratios to Envoy and HAProxy in the same run")
    for heading in ("row", "work", "contestant", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in ("median", "unit", "spread", "x Envoy", "x HAProxy", "failed"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.row,
            row.work,
            row.contestant,
            row.metric,
            "" if row.median is None else f"{row.median:,.4g}" if row.median < 1000 else f"{row.median:,.0f}",
            row.unit,
            "" if row.spread is None else f"{row.spread:.0%}",
            "" if row.ratio_to_envoy is None else f"{row.ratio_to_envoy:.2f}",
            "" if row.ratio_to_haproxy is None else f"{row.ratio_to_haproxy:.2f}",
            f"{row.failed}/{row.rounds}" if row.failed else "",
        )
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)
