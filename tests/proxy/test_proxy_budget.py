"""proxy.budget: retries stay a share of the requests, and a few are always allowed."""

from __future__ import annotations

from proxy.budget import RetryBudget


def spent(budget: RetryBudget, now: float) -> int:
    count = 0
    while budget.spend(now):
        count += 1
    return count


def test_a_few_a_second_are_allowed_without_any_request():
    budget = RetryBudget(0.0)
    assert spent(budget, 0.0) == 100
    assert spent(budget, 0.05) == 0
    assert spent(budget, 1.0) == 10


def test_a_fifth_of_the_requests_may_be_sent_again():
    budget = RetryBudget(0.0)
    spent(budget, 0.0)
    for _ in range(300):
        budget.earn()
    assert 59 <= spent(budget, 0.0) <= 60


def test_what_was_not_used_is_not_kept_for_ever():
    budget = RetryBudget(0.0)
    for _ in range(1_000_000):
        budget.earn()
    assert spent(budget, 1_000_000.0) == 100


def test_a_backend_that_always_fails_gets_a_fifth_more_and_no_multiple():
    budget, sent = RetryBudget(0.0), 0
    for number in range(10_000):  # a thousand a second, each of which would be sent again nine times
        budget.earn()
        sent += 1
        while sent < 10 * (number + 1) and budget.spend(number / 1000):
            sent += 1
    assert sent <= 10_000 * 1.2 + 200
