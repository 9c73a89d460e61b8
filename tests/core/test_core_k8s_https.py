"""Who must leave when too many connections are open: the bounds of the HTTPS front."""

from __future__ import annotations

import trio
import trio.testing

from core.k8s.https import _Rooms


async def test_the_oldest_of_a_client_leaves_for_its_next_and_others_stay() -> None:
    rooms, left = _Rooms(4, 2), []

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
