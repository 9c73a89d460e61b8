"""Injected pods as they are stored, so that a change of the patch is seen as a change of what runs: `make manifests` writes them anew."""

from __future__ import annotations

import yaml

from injector.mark import unmark
from injector.undo import uninject
from tools.manifests import GOLDEN, injected


def test_the_golden_pods_are_current() -> None:
    found = injected()
    assert len(found) == 3
    for path, text in found.items():
        assert path.read_text("utf-8") == text, f"{path.name} differs: `make manifests` writes it anew; is the change meant?"


def test_the_golden_pods_can_be_taken_out_again() -> None:
    before = yaml.safe_load((GOLDEN / "injection-before.yaml").read_text("utf-8"))
    for path in injected():
        assert unmark(uninject(yaml.safe_load(path.read_text("utf-8")))) == before
