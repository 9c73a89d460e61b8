"""Who must leave when too many connections are open."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from core.runtime.rooms import Full, Rooms


async def test_the_oldest_of_a_client_leaves_for_its_next_and_others_stay() -> None:
    rooms, left = Rooms(4, 2), []

    async def visit(name: str) -> None:
        with rooms.one(name[0]):
            await trio.sleep_forever()
        left.append(name)

    async with trio.open_nursery() as nursery:
        for name, gone in (
            ("a1", []),
            ("b1", []),
            ("a2", []),
            ("a3", ["a1"]),
            ("b2", ["a1"]),
            ("c1", ["a1", "a2"]),
            ("c2", ["a1", "a2", "b1"]),
        ):
            nursery.start_soon(visit, name)
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(left) == sorted(gone), name
        nursery.cancel_scope.cancel()
    assert (rooms._open, +rooms._held) == ({}, {})


async def test_a_crowd_of_which_nobody_holds_much_stays_and_the_next_is_refused() -> None:
    rooms = Rooms(2, 2, few=1)
    with rooms.one("a"), rooms.one("b"), pytest.raises(Full), rooms.one("c"):
        raise AssertionError
    with rooms.one("a") as first, rooms.one("a"), rooms.one("b"):
        assert len(rooms) == 2
        assert first.cancel_called
