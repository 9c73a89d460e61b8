"""policy.durations: GEP-2257, and nothing beside it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.k8s.fields import InvalidObject
from policy.durations import seconds_untrusted


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0.0),
        ("0h0m0s", 0.0),
        ("500ms", 0.5),
        ("1s", 1.0),
        ("1m30s", 90.0),
        ("1h1m1s1ms", 3661.001),
        ("30s30s", 60.0),
        ("99999h", 359_996_400.0),
        ("5ms5m", 300.005),
        ("00001s", 1.0),
    ],
)
def test_a_duration_is_the_sum_of_its_numbers(text: str, seconds: float):
    assert seconds_untrusted("x", text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "1", "s", "-1s", "+1s", "1.5s", "1S", "1d", "1us", "1 s", " 1s", "1s\n", "100000s", "1h1m1s1ms1s", "٣s", "1sm", "inf", "0"],
)
def test_what_is_none_is_refused_with_its_place(text: str):
    with pytest.raises(InvalidObject, match=r"^spec\.rules\[0\]\.timeouts\.request: expected a duration"):
        seconds_untrusted("spec.rules[0].timeouts.request", text)


@given(st.lists(st.tuples(st.integers(0, 99999), st.sampled_from(["h", "m", "s", "ms"])), min_size=1, max_size=4))
def test_every_combination_of_units_is_read(parts: list[tuple[int, str]]):
    scale = {"h": 3600_000, "m": 60_000, "s": 1000, "ms": 1}
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert seconds_untrusted("x", text) == sum(number * scale[unit] for number, unit in parts) / 1000
