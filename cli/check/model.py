"""What a check is, and what came of it. Pure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cli.check.cluster import Cluster

Severity = Literal["fatal", "error", "warning"]
Outcome = Literal["success", "warning", "error", "skipped"]


class Failed(Exception):
    """What was found instead. text: names the object, several lines when several. hint: stronger than the check's own.
    final: waiting will not help, also where the check settles.
    """

    def __init__(self, text: str, hint: str = "", *, final: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.hint = hint
        self.final = final


class Skipped(Exception):
    """The question does not arise here; the text says why."""


@dataclass(frozen=True)
class Check:
    """One question about a cluster.

    id: stable, an anchor of docs/check.md. sentence: what holds when all is well. severity: fatal ends the run, a warning leaves the
    exit code alone. hint: a command, or where to read on. look: raises Failed or Skipped, returns a remark or None.
    settles: may become true by itself, so it is asked again until ``--wait`` is over.
    """

    id: str
    sentence: str
    severity: Severity
    look: Callable[[Cluster], Awaitable[str | None]] = field(repr=False)
    hint: str = ""
    settles: bool = False

    @property
    def where(self) -> str:
        """What to do or read when it fails."""
        return self.hint or f"docs/check.md#{self.id}"


@dataclass(frozen=True)
class Category:
    """Checks of one subject, in the order in which they are asked. id: stable. title: for people."""

    id: str
    title: str
    checks: Sequence[Check]


@dataclass(frozen=True)
class Result:
    """What came of a check. text: cause of a failure, reason of a skip, remark of a success. final: see `Failed`."""

    category: Category
    check: Check
    outcome: Outcome
    text: str = ""
    hint: str = ""
    final: bool = False


def succeeded(results: Sequence[Result]) -> bool:
    """No error among them."""
    return not any(result.outcome == "error" for result in results)
