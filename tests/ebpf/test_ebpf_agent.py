"""The parts of the agent's program that need no kernel; the whole is in tests/netns."""

from __future__ import annotations

import fcntl

import pytest

from ebpf import agent


@pytest.mark.parametrize("left_by_another", [False, True])
def test_nobody_else_can_hold_the_agents_lock(tmp_path, left_by_another):
    path = tmp_path / "agent.json.lock"
    if left_by_another:
        path.touch(0o666)
    with agent.lock(tmp_path / "agent.json") as held:
        assert path.stat().st_mode & 0o777 == 0o600
        with open(path, encoding="ascii") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert held.fileno() >= 0
