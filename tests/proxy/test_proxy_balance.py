"""The balancer: spread, latency, load, failures, changing endpoints. Randomness is a seeded generator."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from policy.wire import Endpoint
from proxy import balance
from proxy.balance import Balancer

ENDPOINTS = [Endpoint(f"10.0.0.{n}:80") for n in range(1, 5)]


def balancer(endpoints=ENDPOINTS) -> Balancer:
    made = Balancer(random.Random(7).random)
    made.replace(endpoints, 0.0)
    return made


def shares(made: Balancer, now: float = 0.0, rounds: int = 4000) -> Counter:
    return Counter(made.choose(now).endpoint.addr for _ in range(rounds))


def test_without_endpoints_nothing_is_chosen():
    assert balancer([]).choose(0.0) is None


def test_equal_endpoints_share_alike():
    assert all(800 < count < 1200 for count in shares(balancer()).values())


def test_the_slowest_of_all_is_never_preferred_and_a_fast_one_gets_half():
    made = balancer()
    for _ in range(40):
        load = made.choose(0.0)
        load.observe(1.0 if load.endpoint is ENDPOINTS[0] else 0.001, 0.0)
    counts = shares(made)
    assert counts[ENDPOINTS[0].addr] == 0


def test_what_is_in_flight_counts():
    made = balancer(ENDPOINTS[:2])
    first = made.choose(0.0)
    first.active += 1
    assert all(made.choose(0.0) is not first for _ in range(50))


def test_a_slow_endpoint_gets_another_chance_after_some_time():
    made = balancer(ENDPOINTS[:2])
    slow = made.choose(0.0)
    slow.observe(2.0, 0.0)
    assert all(made.choose(0.0) is not slow for _ in range(50))
    other = made.choose(0.0)
    other.observe(0.030, 60.0)
    assert any(made.choose(60.0) is slow for _ in range(50))


def test_a_failed_endpoint_is_left_alone_at_first():
    made = balancer(ENDPOINTS[:2])
    failed = made.choose(0.0)
    failed.failed(0.0)
    assert all(made.choose(1.0) is not failed for _ in range(50))


def test_an_endpoint_to_avoid_is_not_chosen_even_when_it_is_the_last():
    made = balancer(ENDPOINTS[:1])
    assert made.choose(0.0, avoid=frozenset([ENDPOINTS[0].addr])) is None


def test_a_replaced_list_keeps_averages_and_marks_the_gone():
    made = balancer(ENDPOINTS[:2])
    kept = next(load for load in iter(lambda: made.choose(0.0), None) if load.endpoint is ENDPOINTS[0])
    gone = next(load for load in iter(lambda: made.choose(0.0), None) if load.endpoint is ENDPOINTS[1])
    made.replace([ENDPOINTS[0], ENDPOINTS[2]], 0.0)
    assert gone.gone and not kept.gone
    assert {made.choose(0.0).endpoint.addr for _ in range(50)} == {ENDPOINTS[0].addr, ENDPOINTS[2].addr}
    assert any(made.choose(0.0) is kept for _ in range(50))


def test_an_endpoint_that_changes_its_identity_is_another_one():
    made = balancer(ENDPOINTS[:1])
    before = made.choose(0.0)
    made.replace([Endpoint(ENDPOINTS[0].addr, "spiffe://cluster.local/ns/a/sa/b")], 0.0)
    assert before.gone
    assert made.choose(0.0) is not before


MANY = [Endpoint(f"10.1.{n // 250}.{n % 250}:80") for n in range(1000)]


def test_of_very_many_endpoints_only_some_are_drawn_from_at_a_time():
    assert len(shares(balancer(MANY))) == balance.APERTURE_MIN


def test_in_the_course_of_time_every_endpoint_gets_its_share():
    made = balancer(MANY)
    counts: Counter = Counter()
    for now in range(2 * len(MANY)):
        counts += shares(made, now * balance.ROTATE_S, 32)
    assert set(counts) == {one.addr for one in MANY}
    assert max(counts.values()) < 2 * 64  # two whole turns, 64 on average


def test_two_sidecars_have_different_apertures():
    one, other = Balancer(random.Random(1).random), Balancer(random.Random(2).random)
    for made in (one, other):
        made.replace(MANY, 0.0)
    assert len(set(shares(one)) & set(shares(other))) < balance.APERTURE_MIN / 2


def test_the_aperture_grows_until_it_can_bear_the_load():
    made = balancer(MANY)
    for _ in range(500):
        made.choose(0.0).active += 1
    busy = [load.active for load in made._loads if load.active]
    assert len(busy) >= 500 / (balance.EXCHANGES_EACH + 1)
    assert max(busy) <= balance.EXCHANGES_EACH + 2


def test_the_aperture_shrinks_when_there_is_less_to_do():
    made = balancer(MANY)
    for load in [made.choose(100.0) for _ in range(100)]:
        load.active += 1
    assert len(set(shares(made, 100.5))) > balance.APERTURE_MIN
    for load in made._loads:
        load.active = 0
    widths = [len(set(shares(made, now))) for now in range(101, 200)]
    assert widths[0] > widths[5] and widths[-1] == balance.APERTURE_MIN


def test_two_busy_endpoints_among_idle_ones_do_not_widen_the_aperture():
    made = balancer(MANY)
    for _ in range(2):
        made.choose(0.0).active += balance.EXCHANGES_EACH + 1
    assert len(shares(made)) == balance.APERTURE_MIN


def test_when_the_aperture_fails_endpoints_outside_of_it_are_found():
    made = balancer(MANY)
    failed = set(shares(made))
    for load in made._loads:
        if load.endpoint.addr in failed:
            load.failed(0.0)
    later = shares(made, 0.5)
    assert sum(later[addr] for addr in failed) < 0.1 * later.total()


def test_replaced_endpoints_do_not_move_the_aperture():
    made = balancer(MANY)
    for now in range(100, 110):  # a rolling update, one pod a second
        before = set(shares(made, now))
        gone = sorted(before)[0]
        made.replace([one for one in MANY if one.addr != gone] + [Endpoint(f"10.2.0.{now}:80")], now)
        assert len(set(shares(made, now + 0.5)) & before) >= balance.APERTURE_MIN - 3


STEPS = st.one_of(
    st.tuples(st.just("begin"), st.integers(1, 60)),
    st.tuples(st.just("end"), st.integers(1, 60)),
    st.tuples(st.just("wait"), st.integers(1, 40)),
    st.tuples(st.just("replace"), st.integers(0, 80)),
)


@given(st.lists(STEPS, max_size=30), st.randoms(use_true_random=False))
def test_what_is_in_flight_in_the_aperture_is_always_the_sum_of_its_endpoints(steps, chance):
    made = Balancer(chance.random)
    made.replace(MANY[:40], 0.0)
    now, open_exchanges = 0.0, []
    for what, count in steps:
        if what == "begin":
            for _ in range(count):
                if (load := made.choose(now)) is not None:
                    load.active += 1
                    open_exchanges.append(load)
        elif what == "end":
            for _ in range(min(count, len(open_exchanges))):
                open_exchanges.pop(chance.randrange(len(open_exchanges))).active -= 1
        elif what == "wait":
            now += count / 10
        else:
            made.replace(chance.sample(MANY[:80], count), now)
        assert made.in_flight == sum(load.active for load in made.aperture())
    for load in open_exchanges:  # those of endpoints that are gone as well
        load.active -= 1
    assert made.in_flight == 0
