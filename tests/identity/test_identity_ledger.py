"""Which leaves an instance counts as holding, from what it was given and what it reported."""

from __future__ import annotations

from identity.ledger import LEAVES_MAX, Leaf, Ledger

CART = ("uid-1", "spiffe://cluster.local/ns/shop/sa/cart", "shop/cart-0")


def leaf(issuer: str, not_after: float = 100.0) -> Leaf:
    return Leaf(issuer, f"root-of-{issuer}", not_after)


def issuers(ledger: Ledger, now: float = 0.0) -> list[list[str]]:
    return [[held.issuer_id for held in holding.leaves] for holding in ledger.live(now)]


def test_a_leaf_that_was_handed_out_counts_until_a_newer_one_is_reported() -> None:
    ledger = Ledger()
    ledger.certified(*CART, leaf("a"), 0)
    ledger.certified(*CART, leaf("b"), 1)
    assert issuers(ledger) == [["a", "b"]]
    assert ledger.reported(*CART, 1, leaf("a"), 2) is not None
    assert issuers(ledger) == [["a", "b"]]  # b may be on its way
    ledger.reported(*CART, 1, leaf("b"), 3)
    assert issuers(ledger) == [["b"]]


def test_a_report_that_changes_nothing_needs_no_journal_but_counts_as_heard() -> None:
    ledger = Ledger()
    ledger.certified(*CART, leaf("a"), 0)
    assert ledger.reported(*CART, 3, leaf("a"), 5) is not None
    assert ledger.reported(*CART, 3, leaf("a"), 9) is None
    assert [(holding.generation, holding.heard_at) for holding in ledger.live(0)] == [(3, 9)]


def test_an_unknown_instance_that_reports_is_known_from_then_on() -> None:
    ledger = Ledger()
    ledger.reported(*CART, 2, leaf("a", 50), 0)
    assert issuers(ledger, 49) == [["a"]]
    assert issuers(ledger, 50) == []


def test_a_reported_issuer_that_we_never_gave_is_added_once() -> None:
    ledger = Ledger()
    ledger.certified(*CART, leaf("a"), 0)
    for _ in range(5):
        ledger.reported(*CART, 1, leaf("x"), 1)
    assert issuers(ledger) == [["x", "a"]]


def test_an_instance_cannot_grow_without_bound_and_keeps_its_newest_leaves() -> None:
    ledger = Ledger()
    for number in range(100):
        ledger.certified(*CART, leaf(str(number)), 0)
    assert issuers(ledger) == [[str(number) for number in range(100 - LEAVES_MAX, 100)]]


def test_instances_that_exist_no_more_are_forgotten_until_they_are_heard_again() -> None:
    ledger = Ledger()
    ledger.certified(*CART, leaf("a", 10), 0)
    ledger.certified("uid-2", CART[1], "shop/cart-1", leaf("a", 20), 0)
    assert ledger.keep(frozenset({"uid-2", "uid-3"})) == 1
    assert [holding.instance for holding in ledger.live(0)] == ["uid-2"]
    ledger.reported(*CART, 2, leaf("a", 10), 0)
    assert len(ledger) == 2


def test_expired_instances_are_forgotten() -> None:
    ledger = Ledger()
    ledger.certified(*CART, leaf("a", 10), 0)
    ledger.certified("uid-2", CART[1], "shop/cart-1", leaf("a", 20), 0)
    assert ledger.prune(10) == 1
    assert [holding.instance for holding in ledger.live(0)] == ["uid-2"]


def test_a_certification_keeps_the_generation_that_was_reported() -> None:
    ledger = Ledger()
    ledger.certified(*CART, leaf("a"), 0)
    ledger.reported(*CART, 4, leaf("a"), 1)
    assert ledger.certified(*CART, leaf("b"), 2).generation == 4


def test_a_leaf_of_the_issuer_in_force_that_another_replica_gave_replaces_what_we_knew() -> None:
    ledger = Ledger()
    ledger.certified(*CART, leaf("a"), 0)
    ledger.reported(*CART, 1, leaf("b"), 1, newest_issuer=True)
    assert issuers(ledger) == [["b"]]
