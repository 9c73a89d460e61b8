"""The pages of this repository: their links lead somewhere, and the commands in them exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from cli.main import cli
from core.k8s.manifests import read_manifests
from policy.admission import parse_object

ROOT = Path(__file__).parents[2]
# listed by git, because folders of tools hold pages too; it need not be ours to be read
LISTED = subprocess.run(["git", "-c", "safe.directory=*", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
PAGES = sorted(LISTED.stdout.split())
FENCED = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MANIFESTS = re.compile(r"^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^ *|[`(] ?|\$ |\.venv/bin/)pillion ([^`|#\n)>;]+)", re.MULTILINE)

pytestmark = pytest.mark.skipif(not PAGES, reason="this is no checkout: git knows of no pages")


def anchor(heading: str) -> str:
    """The anchor GitHub gives to a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    prose = FENCED.sub("", page.read_text(encoding="utf-8"))
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)} | set(re.findall(r'<a id="([^"]+)"', prose))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings_that_exist(name: str) -> None:
    page = ROOT / name
    broken = []
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and not (target.exists() and (not fragment or fragment in anchors(target))):
            broken.append(link)
    assert not broken


def test_manifests_on_pages_are_taken() -> None:
    texts = [text for name in PAGES for text in MANIFESTS.findall((ROOT / name).read_text(encoding="utf-8"))]
    manifests = [manifest for text in texts for manifest in read_manifests(text.encode(), is_json=False) if "apiVersion" in manifest]
    assert len(manifests) > 20
    for manifest in manifests:
        parse_object(manifest)  # raises InvalidObject


def words_of_commands(page: str) -> list[list[str]]:
    """The words behind every ``pillion`` of a page, up to what is run in a pod."""
    return [found.partition(" -- ")[0].replace("[", " ").replace("]", " ").split() for found in COMMAND.findall(page)]


def wrong(words: list[str]) -> str:
    """The first word that is no command and no option of its command, "" for none."""
    command: click.Command = cli
    known = {"-h", "--help"}
    with click.Context(cli) as context:
        for word in words:
            if isinstance(command, click.Group) and re.fullmatch("[a-z][a-z-]*", word):
                found = command.get_command(context, word)
                if found is None:
                    return word
                command = found
                known = {"-h", "--help"} | {name for parameter in command.params for name in parameter.opts}
            elif word.startswith("-") and word.partition("=")[0] not in known:
                return word
    return ""


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_options_on_pages_exist(name: str) -> None:
    commands = words_of_commands((ROOT / name).read_text(encoding="utf-8"))
    assert [(words, found) for words in commands if (found := wrong(words))] == []


def test_commands_are_found_on_pages_and_mistakes_in_them_noticed() -> None:
    page = "`pillion local up -f DIR [--detatch]`\n    .venv/bin/pillion local exec -n a b -- ls --all\n$ pillion lcoal up | head -x\n"
    assert [wrong(words) for words in words_of_commands(page)] == ["--detatch", "", "lcoal"]
