"""When certificates are renewed and failures retried."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from identity.schedule import follow_after_s, renew_after_s, retry_after_s

chances = st.floats(0, 1, exclude_max=True)


def test_renewal_is_at_70_percent_and_up_to_a_tenth_of_the_life_earlier() -> None:
    assert renew_after_s(0, 86400, 0) == 0.7 * 86400
    assert 0.6 * 86400 <= renew_after_s(0, 86400, 0.999) < 0.61 * 86400
    assert renew_after_s(1000, 1000 + 30, 0) == 21


@given(st.floats(0, 1e7), chances)
def test_renewal_is_never_after_70_percent_of_what_is_left(left: float, chance: float) -> None:
    assert 0 <= renew_after_s(0, left, chance) <= max(0.7 * left, 1e-9)


def test_a_certificate_that_is_past_is_renewed_at_once() -> None:
    assert renew_after_s(100, 50, 0.5) == 0


def test_retries_double_up_to_the_cap() -> None:
    pauses = [retry_after_s(failures, 86400, 0) for failures in range(1, 12)]
    assert pauses[:4] == [0.25, 0.5, 1, 2]
    assert pauses[-1] == 30


@given(st.integers(1, 10**9), st.floats(-1e6, 1e6), chances)
def test_retries_are_bounded_whatever_happened(failures: int, left: float, chance: float) -> None:
    assert 0.1 <= retry_after_s(failures, left, chance) <= 30


def test_a_short_life_is_retried_more_often() -> None:
    assert retry_after_s(20, 20, 0) == 1


@given(st.floats(0, 1e6), chances)
def test_an_issuer_change_is_followed_within_two_seconds(left: float, chance: float) -> None:
    assert 0 <= follow_after_s(left, chance) <= 2
