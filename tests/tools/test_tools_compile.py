"""Compiled libraries are made anew for what they are made of, and for nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import compile as tool


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the compiler could see."""
    for package in tool.PACKAGES:
        shutil.copytree(tool.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(tool.ROOT / "setup.cfg", tmp_path)
    return tmp_path


def edit(file: Path) -> None:
    file.write_text(file.read_text("utf-8") + "\n# edited\n", "utf-8")


def test_the_same_sources_elsewhere_have_the_same_libraries(tree: Path) -> None:
    assert tool.key(tree) == tool.key(tool.ROOT)


@pytest.mark.parametrize("file", [tool.MODULES[0], "core/names.py", "proxy/__init__.py"])
def test_a_compiled_module_and_what_it_imports_decide(tree: Path, file: str) -> None:
    before = tool.key(tree)
    edit(tree / file)
    assert tool.key(tree) != before


def test_how_types_are_checked_decides(tree: Path) -> None:
    before = tool.key(tree)
    settings = (tree / "setup.cfg").read_text()
    (tree / "setup.cfg").write_text(settings.replace("warn_unreachable = True", "warn_unreachable = False"))
    assert tool.key(tree) != before


@pytest.mark.parametrize("file", ["policy/controller.py", "identity/serve.py", "core/k8s/apiserver.py"])
def test_what_no_compiled_module_imports_decides_nothing(tree: Path, file: str) -> None:
    before = tool.key(tree)
    edit(tree / file)
    edit(tree / "setup.cfg")
    assert tool.key(tree) == before


def test_an_import_is_followed_whatever_way_it_is_written(tree: Path) -> None:
    module = tree / tool.MODULES[0]
    module.write_text(module.read_text("utf-8") + "\nif False:\n    import identity.serve\n    from policy import controller\n", "utf-8")
    needed = {str(path.relative_to(tree)) for path in tool.needed(tree)}
    assert {"identity/__init__.py", "identity/serve.py", "policy/__init__.py", "policy/controller.py"} <= needed
