"""The mesh that the attacking suites share: started with the first test that wants it, gone with the session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from arena import Arena, Outside


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """Meshed web, db, client, admin; unmeshed stranger; see arena.POLICY."""
    found = Arena(f"arena-{os.getpid()}", tmp_path_factory.mktemp("arena"))
    try:
        found.start()
        yield found
    finally:
        found.run("down")


@pytest.fixture(scope="session")
def outside(arena: Arena) -> Iterator[Outside]:
    """A machine beyond the mesh."""
    found = Outside(arena)
    yield found
    found.close()
