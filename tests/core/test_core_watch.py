"""Cells hold the latest value: readers may miss values in between, never the newest."""

from __future__ import annotations

import trio
import trio.testing

from core.runtime.watch import Cell


async def test_a_reader_that_was_away_sees_the_newest_value_only(nursery: trio.Nursery):
    cell = Cell(0)
    seen: list[int] = []

    async def read() -> None:
        version = cell.version
        while cell.value < 9:
            version = await cell.wait_newer(version)
            seen.append(cell.value)

    nursery.start_soon(read)
    await trio.testing.wait_all_tasks_blocked()
    cell.set(1)
    cell.set(2)
    await trio.testing.wait_all_tasks_blocked()
    cell.set(9)
    await trio.testing.wait_all_tasks_blocked()
    assert seen == [2, 9]


async def test_an_equal_value_is_a_new_one_all_the_same(nursery: trio.Nursery):
    cell = Cell("same")
    before = cell.version
    cell.set("same")
    assert await cell.wait_newer(before) == before + 1


async def test_waiting_for_a_value_begins_with_the_present_one(nursery: trio.Nursery):
    cell: Cell[str | None] = Cell("here")
    assert await cell.wait_for(lambda value: value is not None) == "here"
    found: list[str | None] = []

    async def wait() -> None:
        found.append(await cell.wait_for(lambda value: value == "there"))

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    cell.set("elsewhere")
    await trio.testing.wait_all_tasks_blocked()
    assert found == []
    cell.set("there")
    await trio.testing.wait_all_tasks_blocked()
    assert found == ["there"]


def test_listeners_hear_every_value_until_they_leave_even_from_within_a_call():
    cell = Cell(0)
    heard: list[tuple[str, int]] = []
    leave = cell.subscribe(lambda value: (heard.append(("once", value)), leave())[0])
    cell.subscribe(lambda value: heard.append(("always", value)))
    cell.set(1)
    cell.set(2)
    assert heard == [("once", 1), ("always", 1), ("always", 2)]
