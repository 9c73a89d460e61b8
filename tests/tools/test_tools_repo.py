"""The repository's own tools: what they choose, what they refuse, and that ranges, pins and help fit each other."""

from __future__ import annotations

import configparser
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
pytest_plugins = ["pytester"]


def tool(name: str) -> ModuleType:
    """A module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interpreter(version: tuple[int, ...], **facts: Any) -> dict[str, Any]:
    base = {"path": f"/x/python{version}", "base": f"/x/python{version}", "version": list(version), "missing": ""}
    return {**base, "configured": False, "distribution": False, "cpython": True, "free_threaded": False, **facts}


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([interpreter((3, 13, 0)), interpreter((3, 11, 2), distribution=True)], (3, 11, 2)),
        ([interpreter((3, 12, 1)), interpreter((3, 13, 0)), interpreter((3, 11, 7))], (3, 13, 0)),
        ([interpreter((3, 12, 1), configured=True), interpreter((3, 11, 2), distribution=True)], (3, 12, 1)),
        ([interpreter((3, 13, 0), configured=True, missing="No module named 'ensurepip'"), interpreter((3, 11, 7))], (3, 11, 7)),
    ],
)
def test_an_optimised_interpreter_is_preferred_to_a_newer_one(
    monkeypatch: pytest.MonkeyPatch, found: list[dict[str, Any]], chosen: tuple[int, ...]
) -> None:
    prepare = tool("prepare")
    monkeypatch.setattr(prepare, "candidates", lambda: [one["path"] for one in found])
    monkeypatch.setattr(prepare, "probe", {one["path"]: one for one in found}.get)
    assert tuple(prepare.choose()["version"]) == chosen


def test_no_usable_interpreter_names_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = tool("prepare")
    monkeypatch.delenv("PILLION_PYTHON", raising=False)
    monkeypatch.setattr(prepare, "candidates", list)
    with pytest.raises(SystemExit, match=r"no CPython 3\.11 to 3\.14 found"):
        prepare.choose()


def test_a_chosen_interpreter_that_is_of_no_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pyenv shim of a version that is not enabled: it is there, and does not run."""
    monkeypatch.setenv("PILLION_PYTHON", "/bin/false")
    with pytest.raises(SystemExit, match=r"PILLION_PYTHON=/bin/false does not run as CPython 3\.11 to 3\.14"):
        tool("prepare").choose()


def test_a_checkout_that_root_made_things_in_is_named_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = tool("prepare")
    monkeypatch.setattr(prepare.os, "access", lambda path, _: path != str(prepare.ROOT))
    monkeypatch.setattr(prepare, "prepare", lambda: pytest.fail("goes on"))
    with pytest.raises(SystemExit, match=r"may not write to .*: run make as its owner, take it over \(sudo chown"):
        prepare.main()


def test_a_virtual_environment_that_cannot_be_made_is_told_with_the_next_step() -> None:
    prepare = tool("prepare")
    with pytest.raises(SystemExit, match=r"`/bin/false -m venv .*` failed with 1; see above\. .* remove .*\.venv and try again"):
        prepare.make_venv("/bin/false")


def test_an_interpreter_says_what_it_is() -> None:
    facts = tool("prepare").probe(sys.executable)
    assert facts["version"] == list(sys.version_info[:3])
    assert tool("prepare").probe("/bin/false") is None


def test_every_requirement_is_pinned_within_its_range_and_with_hashes() -> None:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    wanted = [Requirement(line) for block in lines for line in block.splitlines() if line.strip() and not line.strip().startswith("#")]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)((?:.*\\\n)(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", lock, re.MULTILINE)
    pins = {canonicalize_name(name): version for name, version, _ in entries}
    assert len(pins) == len(re.findall(r"^\S+==", lock, re.MULTILINE))
    assert "://" not in lock
    assert len(wanted) > 20
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


def test_every_requirement_says_why_in_a_comment_or_needs_no_reason() -> None:
    config = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    block = config.partition("install_requires =\n")[2].partition("\n\n")[0].splitlines()
    for before, line in zip(["", *block], block, strict=False):
        assert line.strip().startswith("#") or before.strip().startswith("#"), f"{line.strip()} has no reason"


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())  # type: ignore[union-attr]
    assert targets == set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    shown = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in shown.splitlines()} == targets


def architecture_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    check = tool("check_architecture")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "PAGE", tmp_path / "ARCHITECTURE.md")
    monkeypatch.setattr(sys, "argv", ["check_architecture.py"])
    (tmp_path / "core").mkdir()
    (tmp_path / "core/__init__.py").write_text('"""The vocabulary. More."""\n')
    (tmp_path / "core/refs.py").write_text('"""References: what decided.\n\nMore."""\n')
    (tmp_path / "setup.cfg").write_text(
        "[importlinter]\nroot_packages =\n    core\n[importlinter:contract:pure]\nsource_modules =\n    core.refs\n"
    )
    (tmp_path / "ARCHITECTURE.md").write_text("before\n" + check.BEGIN + check.END + "after\n")
    return check


def test_the_architecture_page_follows_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = architecture_tree(tmp_path, monkeypatch)
    assert check.main() == 1
    monkeypatch.setattr(sys, "argv", ["check_architecture.py", "--write"])
    assert check.main() == 0
    page = (tmp_path / "ARCHITECTURE.md").read_text()
    assert "### core/\n\nThe vocabulary.\n\n- `core/refs.py` ●: References: what decided.\n" in page
    assert page.startswith("before\n") and page.endswith("after\n")
    monkeypatch.setattr(sys, "argv", ["check_architecture.py"])
    assert check.main() == 0
    (tmp_path / "core/env.py").write_text('"""Settings."""\n')
    assert check.main() == 1
    assert "would change: - `core/env.py`: Settings." in capsys.readouterr().err


def test_a_module_without_docstring_and_an_empty_promise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = architecture_tree(tmp_path, monkeypatch)
    (tmp_path / "core/env.py").write_text("x = 1\n")
    (tmp_path / "core/refs.py").unlink()
    assert check.main() == 1
    told = capsys.readouterr().err
    assert "core/env.py: has no docstring" in told
    assert "core.refs is pure, but there is no such module" in told


@pytest.mark.slow
def test_what_a_machine_lacks_skips_on_a_laptop_and_fails_in_ci(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    pytester.makeini(f"[pytest]\npythonpath = {ROOT}\nmarkers =\n    needs(program): x\n")  # it imports tests.traces
    pytester.makepyfile("import pytest\n@pytest.mark.needs('no-such-program')\ndef test_x():\n    pass\n")
    monkeypatch.delenv("CI", raising=False)
    laptop = pytester.runpytest_subprocess("-rs", "-p", "no:cacheprovider")
    laptop.assert_outcomes(skipped=1)
    laptop.stdout.fnmatch_lines(["*needs the Debian package no-such-program*"])
    monkeypatch.setenv("CI", "true")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(errors=1)
