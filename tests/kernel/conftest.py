"""The programs are loaded once for the session; every test has pods of its own, and leaves the kernel as it found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, LabPod


@pytest.fixture(scope="session")
def loaded() -> Iterator[Lab]:
    """The real programs."""
    lab = Lab()
    try:
        assert not lab.report.problem, lab.report.problem
        assert not lab.report.refused, lab.report.refused
        yield lab
    finally:
        lab.close()


@pytest.fixture
def lab(loaded: Lab) -> Iterator[Lab]:
    """The same, without pods."""
    try:
        yield loaded
    finally:
        loaded.close_pods()


@pytest.fixture
def pod(lab: Lab) -> LabPod:
    """A pod with nothing attached."""
    return lab.pod()


@pytest.fixture(scope="session")
def naive() -> Iterator[Lab]:
    """The program that one finds everywhere: redirect always, find the peer by addresses."""
    lab = Lab(folder=Path(__file__).parent / "naive")
    try:
        assert not lab.report.problem, lab.report.problem
        yield lab
    finally:
        lab.close()
