"""Every check can be looked up, and the pages name no check that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from cli.check.catalogue import CONTROL_PLANE, DATA_PLANE, PRE
from cli.check.server import GATEWAY_COMMAND

ROOT = Path(__file__).parents[2]
CATEGORIES = {category.id: category for category in [*PRE, *CONTROL_PLANE, *DATA_PLANE]}
CHECKS = [check for category in CATEGORIES.values() for check in category.checks]


def test_every_check_has_an_anchor_and_every_anchor_a_check() -> None:
    page = (ROOT / "docs" / "check.md").read_text("utf-8")
    assert set(re.findall(r'<a id="([^"]+)">', page)) == {check.id for check in CHECKS}


def test_ids_are_unique_and_sentences_say_what_holds() -> None:
    ids = [check.id for check in CHECKS]
    assert len(ids) == len(set(ids))
    for check in CHECKS:
        assert check.sentence[0].islower() or check.sentence.split()[0] in ("HTTPRoute", "Server,"), check.id
        assert not check.sentence.endswith("."), check.id


def test_pages_repeat_the_command_that_check_prints() -> None:
    assert GATEWAY_COMMAND in (ROOT / "docs" / "install.md").read_text("utf-8")
    assert GATEWAY_COMMAND in (ROOT / "README.md").read_text("utf-8")


def test_the_install_page_names_settings_that_exist() -> None:
    from cli.render.chart import load_chart, render
    from cli.render.values import assigned

    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    settings = re.findall(r"--set ([a-z][\w.-]*=[\w.-]+)(?=[`\s])", page)
    assert len(settings) >= 5
    for setting in settings:
        render(load_chart(), assigned([setting]))
