"""Pauses between attempts grow, within bounds."""

from __future__ import annotations

import pytest

from core.runtime.backoff import Backoff


def test_pauses_double_up_to_the_longest_and_are_cut_by_at_most_half() -> None:
    whole = Backoff(1, 5, draw=lambda: 0.0)
    assert [whole.next_s() for _ in range(4)] == [1, 2, 4, 5]
    whole.reset()
    assert whole.next_s() == 1
    assert Backoff(1, 5, draw=lambda: 0.999).next_s() == pytest.approx(0.5, abs=0.01)
