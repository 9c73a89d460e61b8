"""Who leaves when the memory for subscriptions is taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policy.index import PodKey
from policy.shares import Shares, bytes_of

A, B, C = (PodKey("shop", name) for name in ("a", "b", "c"))


def held(**subscriptions: int) -> Shares:
    shares = Shares(0)
    for name, count in subscriptions.items():
        shares.change(PodKey("shop", name), bytes_of(count))
    return shares


def test_the_one_that_holds_most_leaves_for_one_with_less_than_half() -> None:
    shares = held(a=1000, b=2000, c=100)
    assert shares.who_leaves(C, 2048) == B
    assert shares.who_leaves(A, bytes_of(1000)) is None
    assert shares.who_leaves(B, 2048) is None


def test_nobody_leaves_who_holds_little() -> None:
    assert held(a=16, b=50).who_leaves(C, 1) is None


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(0, 9000)), max_size=30))
def test_what_is_taken_is_the_sum_of_what_each_has(steps: list[tuple[PodKey, int]]) -> None:
    shares, now = Shares(1 << 20), dict.fromkeys((A, B, C), 0)
    for pod, subscriptions in steps:
        wanted = bytes_of(subscriptions) if subscriptions else 0
        shares.change(pod, wanted - now[pod])
        now[pod] = wanted
    assert shares.taken == sum(now.values())
    assert shares.fits((1 << 20) - shares.taken) and not shares.fits((1 << 20) - shares.taken + 1)
    most = max(now.values())
    leaves = shares.who_leaves(PodKey("shop", "new"), 1)
    assert (leaves is not None) == (most > 256 * 1024)
    assert leaves is None or now[leaves] == most
