"""What the demo prints: chapters, tables and lines that are as they should be or not. Counts the latter, decides nothing.

Reads well on a terminal and in a plain log: the words ``ok`` and ``FAIL`` say it all, colour only repeats them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

_LOG_WIDTH = 160  # a pipe has no width; lines of a log may be long
_TABLE_WIDTH_MIN = 120


class Show:
    """The screen. failures: every line that was not as it should be. checks: how many lines could fail."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or (Console(highlight=False) if sys.stdout.isatty() else Console(width=_LOG_WIDTH, highlight=False))
        self._started = time.monotonic()
        self.failures: list[str] = []
        self.checks = 0

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def chapter(self, title: str) -> None:
        """A heading."""
        self._console.print(f"\n[bold]{escape(title)}[/bold]")

    def say(self, text: str) -> None:
        """A remark that cannot fail."""
        self._console.print(Padding(escape(text), (0, 0, 0, 2), expand=False))

    def check(self, ok: object, text: str, why: str = "") -> bool:
        """A line that can fail. why: shown, and kept, when it did."""
        self.checks += 1
        good = bool(ok)
        if not good:
            self.failures.append(f"{text}: {why}" if why else text)
        more = "" if good or not why else f": {why}"
        self._console.print(Padding(f"{mark(good)}  {escape(text + more)}", (0, 0, 0, 2), expand=False))
        return good

    def table(self, columns: Sequence[str], rows: Sequence[tuple[bool, Sequence[str], str]]) -> None:
        """Rows of (as it should be, cells, why not); the last column is prose. On a narrow terminal each row becomes a paragraph."""
        for good, cells, why in rows:
            self.checks += 1
            if not good:
                self.failures.append(f"{' '.join(cells[:-1])}: {why}")
        shown = [(good, [*cells[:-1], cells[-1] if good else f"{cells[-1]} -- NOT AS IT SHOULD BE: {why}"]) for good, cells, why in rows]
        if self._console.width < _TABLE_WIDTH_MIN:
            for good, cells in shown:
                self._console.print(Padding(f"{mark(good)}  {escape('  '.join(cells[:-1]))}", (0, 0, 0, 2), expand=False))
                self._console.print(Padding(escape(cells[-1]), (0, 0, 0, 8), expand=False))
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("", *columns[:-1]):
            table.add_column(column, no_wrap=True)
        table.add_column(columns[-1], overflow="fold")
        for good, cells in shown:
            table.add_row(mark(good), *map(escape, cells))
        self._console.print(Padding(table, (0, 0, 0, 2), expand=False))

    def plain(self, text: str) -> None:
        """As it is, for copying from."""
        self._console.print(text, markup=False, soft_wrap=True)


def mark(good: bool) -> str:
    """``ok`` or ``FAIL``, four columns wide."""
    return "[green]ok[/green]  " if good else "[bold red]FAIL[/bold red]"
