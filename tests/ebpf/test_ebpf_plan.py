"""The ladder, and the steps along it: the best rung that works, and never a moment without capture."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf.plan import CONNECT, NFT, NFT_SOCKMAP, REFUSED, Ability, Choice, Entry, Seen, after, choose, entry_for, steps

LOOKUP = "sk_lookup: the kernel has no such program type"
BTF = "/sys/kernel/btf/vmlinux does not exist"
HOOKS = "connect4: Operation not permitted"
NO_NFT = "the program nft is not installed"


@pytest.mark.parametrize(
    ("ability", "level", "accelerated"),
    [
        (Ability(), CONNECT, True),
        (Ability(steer=LOOKUP), NFT_SOCKMAP, True),
        (Ability(sockmap=BTF), NFT, False),
        (Ability(connect=HOOKS, steer=HOOKS, sockmap=HOOKS), NFT, False),
        (Ability(connect=HOOKS), NFT, False),
        (Ability(connect=HOOKS, steer=HOOKS, sockmap=HOOKS, nft=NO_NFT), REFUSED, False),
        (Ability(nft=NO_NFT), CONNECT, True),
        (Ability(steer=LOOKUP, nft=NO_NFT), REFUSED, False),
    ],
)
def test_the_best_rung_that_works_is_taken_and_the_others_are_explained(ability, level, accelerated):
    choice = choose(ability)
    assert (choice.level, choice.accelerated) == (level, accelerated)
    explained = {problem for problem in ability[:3] if problem} if level != CONNECT else set()
    assert explained <= set(choice.why)
    assert bool(choice.why) == (level != CONNECT)


def test_a_pod_that_does_not_want_acceleration_is_captured_by_the_same_programs():
    assert choose(Ability(), accelerate=False) == Choice(CONNECT, False, ())
    assert choose(Ability(steer=LOOKUP), accelerate=False).level == NFT


def test_where_the_kernel_tells_apps_of_tcps_bytes_alone_only_what_they_send_is_accelerated():
    choice = choose(Ability(to_app="FIONREAD tells of 0 bytes"))
    assert (choice.level, choice.accelerated, choice.why) == (CONNECT, True, ())
    assert choice.name == "connect + sk_lookup + sockmap, from the app"
    assert choose(Ability()).name == "connect + sk_lookup + sockmap"
    assert choose(Ability(to_app="no"), accelerate=False).name == "connect + sk_lookup + sockmap", "nothing is accelerated, nothing is said"
    for ability, way in ((Ability(to_app="no"), True), (Ability(), False), (Ability(to_app="no", steer=LOOKUP), True)):
        entry = entry_for(choose(ability), caller=True)
        assert entry is not None and entry.one_way == way
    seen = Seen(steered=True, entry=entry_for(choose(Ability()), caller=True))
    assert steps(choice, entry_for(choice, caller=True), seen) == ["entry"], "pods of an agent that did not know are changed"


def test_the_owner_of_a_node_may_forbid_rungs():
    assert choose(Ability(), lowest=NFT_SOCKMAP) == Choice(NFT_SOCKMAP, True, ("capture by eBPF is switched off",))
    refused = choose(Ability(sockmap=BTF), highest=CONNECT)
    assert refused == Choice(REFUSED, False, (BTF, "capture by nftables is switched off"))


abilities = st.builds(Ability, *(st.sampled_from(["", "no"]) for _ in range(5)))
entries = st.one_of(st.none(), st.builds(Entry, *(st.booleans() for _ in range(5))))
seens = st.builds(Seen, st.booleans(), entries, st.booleans())


def captures_outbound(seen: Seen) -> bool:
    """Nothing leaves around the sidecar."""
    return seen.rules or (seen.entry is not None and seen.entry.capture)


def captures_inbound(seen: Seen) -> bool:
    """Nothing arrives around the sidecar."""
    return seen.rules or seen.steered


@given(abilities, st.booleans(), st.booleans(), seens)
def test_on_no_way_along_the_ladder_is_there_a_moment_without_capture(ability, accelerate, caller, seen):
    choice = choose(ability, accelerate=accelerate)
    entry = entry_for(choice, caller=caller)
    outbound, inbound = captures_outbound(seen), captures_inbound(seen)
    for step in steps(choice, entry, seen):
        seen = after(step, seen, entry)
        assert captures_outbound(seen) >= outbound and captures_inbound(seen) >= inbound, step
        outbound, inbound = captures_outbound(seen), captures_inbound(seen)
    if choice.level != REFUSED:
        assert captures_outbound(seen) and captures_inbound(seen)
        assert steps(choice, entry, seen) == [], "one round is enough"


@given(abilities, st.booleans())
def test_whoever_sees_outbound_captured_may_rely_on_inbound(ability, accelerate):
    choice = choose(ability, accelerate=accelerate)
    seen, entry = Seen(), entry_for(choice, caller=True)
    for step in steps(choice, entry, seen):
        seen = after(step, seen, entry)
        assert captures_inbound(seen) or not captures_outbound(seen)
