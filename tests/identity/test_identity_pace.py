"""How many certificates a pod gets in a minute."""

from __future__ import annotations

from identity.pace import Pace


def test_a_pod_waits_until_a_minute_after_its_first_and_others_do_not() -> None:
    pace = Pace(2, pods=10)
    for now in (100.0, 130.0):
        assert pace.wait_s("a", now) == 0
        pace.had_one("a", now)
    assert (pace.wait_s("a", 140.0), pace.wait_s("b", 140.0)) == (20.0, 0.0)
    assert pace.wait_s("a", 160.0) == 0
    pace.had_one("a", 160.0)
    assert pace.wait_s("a", 161.0) == 0
    pace.had_one("a", 161.0)
    assert pace.wait_s("a", 170.0) == 50.0


def test_so_many_pods_are_remembered_and_the_first_is_forgotten() -> None:
    pace = Pace(1, pods=2)
    for pod in ("a", "b", "c"):
        pace.had_one(pod, 0.0)
    assert [pace.wait_s(pod, 1.0) for pod in ("a", "b", "c")] == [0.0, 59.0, 59.0]
