"""The rotation of trust, step by step: what each changes, and which workload a step waits for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.bundle import ABSENT_AFTER_S, Anchor, IssuerRef, Step, TrustState, aborted, added, check_step, dropped, due_step, switched
from identity.ledger import Holding, Leaf

NOW = 1000.0
OLD, NEW = IssuerRef("issuer-old", "root-old", 9e9), IssuerRef("issuer-new", "root-new", 9e9)
STEADY = TrustState(7, (Anchor("root-old", b"old", 1, 9e9),), OLD)
ADDED = added(STEADY, b"new", 9e9, NEW)
SWITCHED = switched(ADDED)


def holding(generation: int, *leaves: Leaf, heard_at: float = NOW, pod: str = "shop/cart-0") -> Holding:
    return Holding("uid", "spiffe://cluster.local/ns/shop/sa/cart", pod, generation, leaves, heard_at)


OLD_LEAF, NEW_LEAF = Leaf("issuer-old", "root-old", NOW + 100), Leaf("issuer-new", "root-new", NOW + 100)


def test_the_steps_lead_from_one_anchor_to_the_other() -> None:
    assert due_step(STEADY) is Step.ADD
    assert (ADDED.generation, ADDED.bundle_pem, ADDED.issuer, due_step(ADDED)) == (8, b"oldnew", OLD, Step.SWITCH)
    assert (SWITCHED.generation, SWITCHED.bundle_pem, SWITCHED.issuer, due_step(SWITCHED)) == (8, b"oldnew", NEW, Step.DROP)
    end = dropped(SWITCHED)
    assert (end.generation, end.bundle_pem, end.issuer, due_step(end)) == (9, b"new", NEW, Step.ADD)


def test_an_added_anchor_can_be_taken_back_until_the_switch() -> None:
    assert check_step(ADDED, Step.ABORT, [], NOW) is None
    back = aborted(ADDED)
    assert (back.generation, back.bundle_pem, back.issuer, due_step(back)) == (9, b"old", OLD, Step.ADD)
    for state in (STEADY, SWITCHED):
        refusal = check_step(state, Step.ABORT, [], NOW)
        assert refusal is not None
        assert "no added anchor" in refusal.sentence


@pytest.mark.parametrize(("state", "due"), [(STEADY, Step.ADD), (ADDED, Step.SWITCH), (SWITCHED, Step.DROP)])
def test_only_the_step_that_is_due_is_allowed_even_by_force(state: TrustState, due: Step) -> None:
    for step in (Step.ADD, Step.SWITCH, Step.DROP):
        refusal = check_step(state, step, [], NOW, force=True)
        assert (refusal is None) == (step is due)
        if refusal is not None:
            assert f"next step of the rotation is {due.value!r}" in refusal.sentence


def test_the_switch_waits_for_a_workload_that_does_not_trust_the_new_anchor() -> None:
    refusal = check_step(ADDED, Step.SWITCH, [holding(7, OLD_LEAF), holding(8, OLD_LEAF, pod="shop/web-0")], NOW)
    assert refusal is not None
    assert refusal.workloads == ("shop/cart-0 (spiffe://cluster.local/ns/shop/sa/cart) trusts bundle generation 7, 8 is needed",)
    assert "shop/cart-0" in refusal.sentence
    assert "shop/web-0" not in refusal.sentence
    assert check_step(ADDED, Step.SWITCH, [holding(8, OLD_LEAF)], NOW) is None


def test_the_drop_waits_for_a_workload_that_may_still_present_an_old_leaf() -> None:
    for leaves in ((OLD_LEAF,), (OLD_LEAF, NEW_LEAF)):
        refusal = check_step(SWITCHED, Step.DROP, [holding(8, *leaves)], NOW)
        assert refusal is not None
        assert "below the old anchor for 100 s more" in refusal.sentence
    assert check_step(SWITCHED, Step.DROP, [holding(8, NEW_LEAF)], NOW) is None


def test_the_drop_waits_for_a_workload_whose_issuer_nobody_knows() -> None:
    assert check_step(SWITCHED, Step.DROP, [holding(8, Leaf("somebody", "", NOW + 5))], NOW) is not None


def test_a_workload_whose_leaves_have_expired_blocks_nothing() -> None:
    expired = holding(1, Leaf("issuer-old", "root-old", NOW - 1))
    assert check_step(ADDED, Step.SWITCH, [expired], NOW) is None
    assert check_step(SWITCHED, Step.DROP, [expired], NOW) is None


def test_an_absent_workload_blocks_unless_it_is_passed_over_and_the_refusal_says_it_is_absent() -> None:
    absent = holding(7, OLD_LEAF, heard_at=NOW - ABSENT_AFTER_S - 1)
    refusal = check_step(ADDED, Step.SWITCH, [absent], NOW)
    assert refusal is not None
    assert "not heard for 91 s" in refusal.sentence
    assert check_step(ADDED, Step.SWITCH, [absent], NOW, ignore_absent=True) is None
    assert check_step(ADDED, Step.SWITCH, [holding(7, OLD_LEAF)], NOW, ignore_absent=True) is not None
    assert check_step(ADDED, Step.SWITCH, [holding(7, OLD_LEAF)], NOW, force=True) is None


def test_a_refusal_names_five_and_counts_the_rest() -> None:
    many = [holding(7, OLD_LEAF, pod=f"shop/cart-{number}") for number in range(9)]
    refusal = check_step(ADDED, Step.SWITCH, many, NOW)
    assert refusal is not None
    assert "would break 9 workload instance(s)" in refusal.sentence
    assert "and 4 more" in refusal.sentence
    assert len(refusal.workloads) == 9


def test_anchors_that_the_files_keep_are_never_surplus() -> None:
    kept = TrustState(3, SWITCHED.anchors, NEW, None, ("root-old", "root-new"))
    assert due_step(kept) is Step.ADD


generations = st.integers(0, 9)
leaves = st.lists(st.sampled_from([OLD_LEAF, NEW_LEAF]), min_size=1, max_size=3)


@given(st.lists(st.tuples(generations, leaves), max_size=6))
def test_no_allowed_step_leaves_a_pair_of_live_workloads_that_do_not_verify_each_other(fleet: list[tuple[int, list[Leaf]]]) -> None:
    holdings = [holding(generation, *held) for generation, held in fleet]

    def trusts(generation: int) -> set[str]:
        return {"root-old", "root-new"} if generation >= 8 else {"root-old"}

    if check_step(ADDED, Step.SWITCH, holdings, NOW) is None:
        assert all("root-new" in trusts(entry.generation) for entry in holdings)
    if check_step(SWITCHED, Step.DROP, holdings, NOW) is None:
        assert all(leaf.anchor_id == "root-new" for entry in holdings for leaf in entry.leaves)
        assert all("root-new" in trusts(entry.generation) for entry in holdings)
