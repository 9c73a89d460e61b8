"""How a pod is captured: the rung of the ladder that works here, and the steps that lead there without a gap. Pure.

    1  connect + sk_lookup + sockmap   eBPF captures, and the hop between app and sidecar skips the TCP stack
    2  nftables + sockmap              nftables captures, the hop is shortened
    3  nftables
    4  refused                         nothing captures: the pod's containers must not start

Which rungs work is found out by really loading and attaching (ebpf.loader, ebpf.agent), never from a version number. Acceleration fails
open, to TCP; capture fails closed. Called by ebpf.pods.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

CONNECT, NFT_SOCKMAP, NFT, REFUSED = 1, 2, 3, 4
NAMES = {CONNECT: "connect + sk_lookup + sockmap", NFT_SOCKMAP: "nftables + sockmap", NFT: "nftables", REFUSED: "refused"}


class Ability(NamedTuple):
    """What the node can do: "" for what works, else a sentence with the program, the helper or file, and the kernel's words.

    connect: capture of connect(2), the original destination, and marking for the short cut. steer: sk_lookup, and taking the sidecar's
    listener. sockmap: pairing and redirecting. nft: the nftables program and redirect. to_app: redirecting what the app reads; without it
    the short cut is for what the app sends.
    """

    connect: str = ""
    steer: str = ""
    sockmap: str = ""
    nft: str = ""
    to_app: str = ""


class Choice(NamedTuple):
    """level: 1 to 4. accelerated: whether the short cut is on. why: what kept the pod from rung 1, a sentence each, empty on rung 1.

    one_way: it is on for what the app sends alone.
    """

    level: int
    accelerated: bool
    why: tuple[str, ...]
    one_way: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return name_of(self.level, one_way=self.one_way)


def name_of(level: int, *, one_way: bool = False) -> str:
    """A rung for people, and where its short cut ends."""
    return NAMES[level] + (", from the app" if one_way else "")


def choose(ability: Ability, *, accelerate: bool = True, lowest: int = CONNECT, highest: int = REFUSED) -> Choice:
    """The best rung. accelerate: the pod's wish. lowest, highest: what the node's owner restricted it to (``--capture``)."""
    why: list[str] = []
    if lowest > CONNECT:
        why.append("capture by eBPF is switched off")
    for problem in (ability.connect, ability.steer, ability.sockmap):
        if problem and problem not in why:
            why.append(problem)
    rungs: dict[int, bool] = {
        CONNECT: not (ability.connect or ability.steer or ability.sockmap),
        NFT_SOCKMAP: accelerate and not (ability.connect or ability.sockmap or ability.nft),
        NFT: not ability.nft,
    }
    for level, works in rungs.items():
        if works and lowest <= level <= highest:
            accelerated = accelerate and level <= NFT_SOCKMAP
            return Choice(level, accelerated, () if level == CONNECT else tuple(why), one_way=accelerated and bool(ability.to_app))
    if ability.nft:
        why.append(ability.nft)
    elif highest < NFT:
        why.append("capture by nftables is switched off")
    return Choice(REFUSED, False, tuple(why))


class Entry(NamedTuple):
    """What the programs know of a pod, beside its ports. nat: nftables captures, only the short cut is wanted. one_way: see Choice."""

    capture: bool
    accelerate: bool
    nat: bool
    caller: bool
    one_way: bool = False


class Seen(NamedTuple):
    """What a pod has. steered: sk_lookup leads what arrives (or drops it). rules: our nftables table is in its namespace."""

    steered: bool = False
    entry: Entry | None = None
    rules: bool = False


Step = Literal["steer", "entry", "rules", "no rules", "no entry", "no steer"]


def entry_for(choice: Choice, *, caller: bool) -> Entry | None:
    """The entry that a rung needs, None for those without programs."""
    if choice.level == CONNECT:
        return Entry(capture=True, accelerate=choice.accelerated, nat=False, caller=caller, one_way=choice.one_way)
    if choice.level == NFT_SOCKMAP:
        return Entry(capture=False, accelerate=True, nat=True, caller=caller, one_way=choice.one_way)
    return None


def steps(choice: Choice, entry: Entry | None, seen: Seen) -> list[Step]:
    """What brings a pod from what it has to its rung. What captures is put in place before anything that captures is taken away.

    The entry comes after the steering on the way to rung 1: it is what makes outbound capture work, so that whoever sees its own
    connection captured (ebpf.validator) knows that inbound capture is there too. A refused pod keeps what it has.
    """
    if choice.level == REFUSED:
        return []
    found: list[Step] = []
    by_bpf = choice.level == CONNECT
    if by_bpf and not seen.steered:
        found.append("steer")
    if not by_bpf and not seen.rules:
        found.append("rules")
    if entry is not None and entry != seen.entry:
        found.append("entry")
    if by_bpf and seen.rules:
        found.append("no rules")
    if entry is None and seen.entry is not None:
        found.append("no entry")
    if not by_bpf and seen.steered:
        found.append("no steer")
    return found


def after(step: Step, seen: Seen, entry: Entry | None) -> Seen:
    """What a pod has once a step is done."""
    changes: dict[Step, Seen] = {
        "steer": seen._replace(steered=True),
        "entry": seen._replace(entry=entry),
        "rules": seen._replace(rules=True),
        "no rules": seen._replace(rules=False),
        "no entry": seen._replace(entry=None),
        "no steer": seen._replace(steered=False),
    }
    return changes[step]
