"""docs/injection.md lists every option, reason and key, with the defaults of the code."""

from __future__ import annotations

import re
from pathlib import Path

from injector import decide, patch, webhook
from injector.mesh import KEYS
from injector.options import NAMES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "injection.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> set[str]:
    """What stands in backquotes in the first column of the tables of a section."""
    (section,) = [part for part in re.split(r"^#+ ", PAGE, flags=re.MULTILINE) if part.startswith(heading + "\n")]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_every_option_is_there() -> None:
    assert first_cells("Options") == set(NAMES)


def test_every_key_of_the_mesh_settings_is_there() -> None:
    assert first_cells("Mesh settings") == set(KEYS)


def test_every_reason_is_there() -> None:
    found: set[str] = set()
    for module in (decide, patch, webhook):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        found |= set(re.findall(r"(?:Skip|Refuse)\(\s*f?\"([a-z{}_-]+)\"", text))
    found.remove("invalid-inject-annotation-at-{id_}")
    found |= {"invalid-inject-annotation-at-workload", "invalid-inject-annotation-at-namespace"}
    assert first_cells("Who gets none, and who is told") == found


def test_who_is_told_is_who_the_webhook_tells() -> None:
    told = {row.split("|")[1].strip(" `") for row in PAGE.splitlines() if row.startswith("| `") and "warning, Event" in row}
    assert told == set(webhook.TELLING)
