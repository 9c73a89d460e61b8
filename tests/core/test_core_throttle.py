"""What strangers can cause is written so many times a second, and what was held back is counted."""

from __future__ import annotations

from typing import Any

from core.runtime.throttle import LINES_PER_S, Throttle


def test_of_each_kind_so_many_lines_pass_in_a_second_and_the_next_tells_of_the_others() -> None:
    now = [7.9]
    throttle = Throttle(lambda: now[0])
    assert [throttle.pass_("a") for _ in range(LINES_PER_S + 5)] == [0] * LINES_PER_S + [None] * 5
    assert throttle.pass_("b") == 0
    now[0] = 8.0
    assert [throttle.pass_("a"), throttle.pass_("a")] == [5, 0]


def test_a_line_that_passes_says_how_many_did_not() -> None:
    now = [0.0]
    throttle, written = Throttle(lambda: now[0]), []

    def write(event: str, **fields: Any) -> None:
        written.append((event, fields))

    for _ in range(LINES_PER_S + 3):
        throttle.say(write, "401", "refused", client="10.0.0.1")
    now[0] = 1.0
    throttle.say(write, "401", "refused", client="10.0.0.2")
    assert len(written) == LINES_PER_S + 1
    assert written[0] == ("refused", {"client": "10.0.0.1"})
    assert written[-1] == ("refused", {"client": "10.0.0.2", "held_back": 3})
