"""The pods of this node, each brought to the best rung of the ladder and kept there. Called by ebpf.agent.

Knows pods by what registered them and by what the kernel still holds of them; decides with ebpf.plan; acts through `Programs` (the pinned
maps), ebpf.nft (rulesets) and ebpf.procs (namespaces, listeners). Holds no descriptor of a pod's namespace: that would keep it alive.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ebpf import bpfsys, nft, procs
from ebpf.plan import CONNECT, NFT, REFUSED, Ability, Choice, Entry, Seen, Step, after, choose, entry_for, steps
from ebpf.redirect import capture, no_capture
from ebpf.wire import BadMessage, PodFacts, pod_facts

LOOK_AGAIN_S = 0.1  # while a sidecar is expected to listen any moment
LOOK_AFTER_S = 1.0  # at everything that is in place
_EXPECTED_S = 120.0  # a sidecar's startup probe allows it two minutes


class Programs(Protocol):
    """The pinned programs and maps, as ebpf.maps has them. Everything raises OSError."""

    def seen(self, cookie: int) -> tuple[bool, Entry | None]:
        """Is sk_lookup attached, and the pod's entry."""

    def steer(self, cookie: int, netns: int) -> None:
        """Attach sk_lookup to the namespace; what arrives is refused until there is a listener."""

    def unsteer(self, cookie: int) -> None:
        """Detach it."""

    def enter(self, cookie: int, entry: Entry, facts: PodFacts) -> None:
        """Write ports and addresses, then the entry."""

    def leave(self, cookie: int) -> None:
        """Remove the entry, then what belongs to it."""

    def listens(self, cookie: int) -> bool:
        """Is there a listener for what arrives?"""

    def set_listener(self, cookie: int, listener: socket.socket) -> None:
        """What arrives goes there."""

    def gone(self, cookie: int) -> bool:
        """Has the namespace that sk_lookup was attached to ended?"""

    def counters(self, cookie: int) -> dict[str, int]:
        """Name -> value since the pod was entered."""


class Pod:
    """A registered pod. rules: our nftables table is in it. message: what is wrong at present, for people."""

    __slots__ = ("choice", "cookie", "facts", "inode", "listens", "message", "rules", "since")

    def __init__(self, facts: PodFacts, cookie: int, inode: int) -> None:
        self.facts, self.cookie, self.inode = facts, cookie, inode
        self.choice = Choice(REFUSED, False, ())
        self.rules = False
        self.listens = False
        self.message = ""
        self.since = time.monotonic()

    def record(self) -> dict[str, Any]:
        """What must survive a restart of the agent and is not in the kernel's own memory."""
        return {"facts": self.facts._asdict(), "cookie": self.cookie, "inode": self.inode, "rules": self.rules}


class Pods:
    """All pods of the node. lowest, highest: the rungs that the node's owner allows. changed: called when `records` differ."""

    def __init__(
        self,
        programs: Programs | None,
        ability: Ability,
        lowest: int = CONNECT,
        highest: int = REFUSED,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.programs, self.ability = programs, ability
        self.lowest, self.highest = lowest, highest
        self.pods: dict[str, Pod] = {}
        self.failures: dict[str, str] = {}
        self._changed = changed
        self._home = os.stat(f"{procs.PROC}/self/ns/net").st_ino

    # --- coming and going ------------------------------------------------------------------------------------------------

    def register(self, facts: PodFacts, netns: int) -> Pod:
        """Capture a pod, or change its options; ``choice.level`` is REFUSED when nothing captures it. Raises OSError, BadMessage."""
        inode = procs.inode_of(netns)
        if inode == self._home:
            raise BadMessage("the pod is in the node's own network namespace, which cannot be captured for one pod")
        cookie = bpfsys.netns_cookie(netns)
        for other in [pod for pod in self.pods.values() if pod.cookie == cookie and pod.facts.id != facts.id]:
            raise BadMessage(f"this network namespace is registered for pod {other.facts.namespace}/{other.facts.name} already")
        if not facts.addresses:
            facts = facts._replace(addresses=tuple(procs.inside(netns, procs.own_addresses)))
        pod = self.pods.get(facts.id)
        if pod is None or pod.cookie != cookie:
            if pod is not None:
                self.unregister(facts.id)  # its sandbox was made anew
            pod = Pod(facts, cookie, inode)
            pod.rules = nft.captures(netns)
        else:
            pod.facts = facts
        self._bring(pod, netns, self.lowest, again=True)
        self.pods[facts.id] = pod
        self._changed()
        return pod

    def unregister(self, pod_id: str) -> bool:
        """Forget a pod and remove what the kernel holds of it; False when there is no such pod."""
        pod = self.pods.pop(pod_id, None)
        if pod is None:
            return False
        if self.programs is not None:
            self.programs.leave(pod.cookie)
            self.programs.unsteer(pod.cookie)
        self._changed()
        return True

    def restore(self, records: list[Any]) -> None:
        """Pods of an agent before us, with what they have; nothing of them is touched unless a rung must be left."""
        for record in records:
            try:
                pod = Pod(pod_facts(record["facts"]), int(record["cookie"]), int(record["inode"]))
                pod.rules = bool(record["rules"])
            except (KeyError, TypeError, ValueError) as error:
                self.failures["state"] = f"a record of the state file is unreadable: {error}"
                continue
            self.pods[pod.facts.id] = pod
        for pod in list(self.pods.values()):
            self._take_up(pod)

    def _take_up(self, pod: Pod) -> None:
        seen = self._seen(pod)
        entry, one_way = seen.entry, bool(self.ability.to_app)
        captured = seen.steered and entry is not None and entry.capture and self.lowest == CONNECT and not self.ability.connect
        if captured and entry is not None and entry.one_way == (entry.accelerate and one_way):
            pod.choice = Choice(CONNECT, entry.accelerate, (), entry.one_way)
            return
        netns = self._open(pod)
        if netns is None:
            self.unregister(pod.facts.id)  # nobody is in it any more
            return
        try:
            self._bring(pod, netns, self.lowest)
        finally:
            os.close(netns)

    def records(self) -> list[dict[str, Any]]:
        """For the state file."""
        return [pod.record() for pod in self.pods.values()]

    # --- the ladder ------------------------------------------------------------------------------------------------------

    def _bring(self, pod: Pod, netns: int, lowest: int, *, again: bool = False) -> None:
        """To the best rung that works for this pod; a step that fails rules its rung out. Never without capture in between.

        again: its options may have changed, so rules that are there are written anew.
        """
        ability = self.ability
        while True:
            choice = choose(ability, accelerate=pod.facts.accelerate, lowest=lowest, highest=self.highest)
            entry = entry_for(choice, caller=pod.facts.real_caller)
            seen = self._seen(pod)
            failed: tuple[Step, str] | None = None
            for step in [*steps(choice, entry, seen), *self._refresh(choice, entry, seen, again)]:
                try:
                    self._do(step, pod, netns, entry)
                except (OSError, nft.RulesFailed) as error:
                    failed = step, str(error)
                    break
                seen = after(step, seen, entry)
            if failed is None:
                break
            ability = _without(ability, *failed)
        pod.choice = choice
        pod.message = "; ".join(choice.why)
        if choice.level == CONNECT:
            self._find_listener(pod, procs.members(pod.inode))

    def _refresh(self, choice: Choice, entry: Entry | None, seen: Seen, again: bool) -> list[Step]:
        """Ports and addresses are written again even when the pod has what its rung needs: they may have changed."""
        if choice.level == REFUSED:
            return []
        found: list[Step] = ["rules"] if again and seen.rules and choice.level != CONNECT else []
        return [*found, "entry"] if entry is not None and entry == seen.entry else found

    def _do(self, step: Step, pod: Pod, netns: int, entry: Entry | None) -> None:
        facts, programs = pod.facts, self.programs
        if step == "rules":
            ruleset = capture(
                facts.skip_inbound,
                facts.skip_outbound,
                outbound_port=facts.outbound_port,
                inbound_port=facts.inbound_port,
                sidecar_uid=facts.sidecar_uid,
            )
            nft.apply(netns, ruleset)
            pod.rules = True
        elif step == "no rules":
            nft.apply(netns, no_capture())
            pod.rules = False
        elif programs is None:
            raise OSError("no programs are loaded")
        elif step == "steer":
            programs.steer(pod.cookie, netns)
        elif step == "no steer":
            programs.unsteer(pod.cookie)
        elif step == "entry":
            assert entry is not None
            programs.enter(pod.cookie, entry, facts)
        elif step == "no entry":
            programs.leave(pod.cookie)

    def _seen(self, pod: Pod) -> Seen:
        steered, entry = self.programs.seen(pod.cookie) if self.programs is not None else (False, None)
        return Seen(steered, entry, pod.rules)

    def _open(self, pod: Pod) -> int | None:
        for pid in procs.members(pod.inode):
            try:
                netns = procs.open_netns(pid)
            except OSError:
                continue
            try:
                if bpfsys.netns_cookie(netns) == pod.cookie:  # the inode's number may be another namespace's by now
                    return netns
            except OSError:
                pass
            os.close(netns)
        return None

    # --- listeners -------------------------------------------------------------------------------------------------------

    def waiting(self) -> bool:
        """Does a sidecar start any moment?"""
        now = time.monotonic()
        return any(pod.choice.level == CONNECT and not pod.listens and now - pod.since < _EXPECTED_S for pod in self.pods.values())

    def steered(self, pod_id: str) -> bool | None:
        """Does what arrives at a pod reach its sidecar now? None: there is no such pod."""
        pod = self.pods.get(pod_id)
        if pod is None:
            return None
        if pod.choice.level == CONNECT and not pod.listens:
            self._find_listener(pod, procs.members(pod.inode))
        return pod.listens or pod.choice.level != CONNECT

    def look_after(self) -> None:
        """Find listeners that are missing, forget pods that are gone."""
        missing = []
        for pod in list(self.pods.values()):
            if self.programs is None or pod.choice.level != CONNECT:
                continue
            if self.programs.gone(pod.cookie):
                self.unregister(pod.facts.id)
                continue
            pod.listens, before = self.programs.listens(pod.cookie), pod.listens
            if before and not pod.listens:
                pod.since = time.monotonic()  # the sidecar ended: its container starts again
            if not pod.listens:
                missing.append(pod)
        if missing:
            inodes = {pod.inode: pod for pod in missing}
            found: dict[int, list[int]] = {}
            for pid in procs.pids():
                if (inode := procs.netns_inode(pid)) in inodes:
                    found.setdefault(inode, []).append(pid)
            for inode, pod in inodes.items():
                self._find_listener(pod, found.get(inode, []))

    def forget_empty(self) -> None:
        """Pods behind nftables leave no trace in the kernel when they end: look whether anybody is in them."""
        inodes = {procs.netns_inode(pid) for pid in procs.pids()}
        for pod in list(self.pods.values()):
            if pod.choice.level != CONNECT and pod.inode not in inodes:
                self.unregister(pod.facts.id)

    def _find_listener(self, pod: Pod, pids: list[int]) -> None:
        assert self.programs is not None
        for pid in pids:
            if procs.uid_of(pid) != pod.facts.sidecar_uid:
                continue
            try:
                taken = procs.take_listeners(pid, pod.facts.inbound_port, pod.facts.sidecar_uid, pod.cookie)
            except PermissionError as error:
                self._without_listeners(pod, f"pidfd_getfd: {error.strerror}: the agent needs CAP_SYS_PTRACE")
                return
            except OSError as error:
                pod.message = f"the sidecar's listener cannot be taken: {error}"
                continue
            for listener in taken:
                with listener:  # our copy must not keep the port open once the sidecar is gone
                    self._lead_to(pod, listener)
            if pod.listens:
                return

    def _lead_to(self, pod: Pod, listener: socket.socket) -> None:
        """What arrives goes there, or is refused as before: the map is full, or the sidecar stopped listening a moment ago."""
        assert self.programs is not None
        try:
            self.programs.set_listener(pod.cookie, listener)
        except OSError as error:
            pod.message = f"nothing can be led to the sidecar's listener: {error}"
            return
        pod.listens, pod.message = True, ""

    def _without_listeners(self, pod: Pod, problem: str) -> None:
        """Nobody's listener can be taken here: this rung does not work, for this pod and those that come."""
        self.ability = self.ability._replace(steer=problem)
        netns = self._open(pod)
        if netns is not None:
            try:
                self._bring(pod, netns, self.lowest)
            finally:
                os.close(netns)

    # --- the end ---------------------------------------------------------------------------------------------------------

    def hand_over(self) -> list[str]:
        """Bring every pod to nftables, so that eBPF can be taken away; returns the pods for which that does not work, with the reason."""
        stuck = []
        for pod in list(self.pods.values()):
            netns = self._open(pod)
            if netns is None:
                self.unregister(pod.facts.id)
                continue
            try:
                self._bring(pod, netns, NFT)
            finally:
                os.close(netns)
            if pod.choice.level == REFUSED:
                stuck.append(f"{pod.facts.namespace}/{pod.facts.name}: {pod.message}")
        return stuck

    def status(self) -> list[dict[str, Any]]:
        """Every pod, for `pillion check` and the socket."""
        return [self.pod_status(pod) for pod in sorted(self.pods.values(), key=lambda pod: (pod.facts.namespace, pod.facts.name))]

    def pod_status(self, pod: Pod) -> dict[str, Any]:
        """level, its name, whether accelerated (towards the app too) and steered, counters, and what is wrong."""
        counters: Mapping[str, int] = {}
        if self.programs is not None and pod.choice.level < NFT:
            counters = self.programs.counters(pod.cookie)
        return {
            "id": pod.facts.id,
            "namespace": pod.facts.namespace,
            "name": pod.facts.name,
            "cookie": pod.cookie,
            "level": pod.choice.level,
            "level_name": pod.choice.name,
            "accelerated": pod.choice.accelerated,
            "accelerated_to_app": pod.choice.accelerated and not pod.choice.one_way,
            "listens": pod.listens or pod.choice.level != CONNECT,
            "message": pod.message,
            "counters": dict(counters),
        }


def _without(ability: Ability, step: Step, words: str) -> Ability:
    """What is left when a step failed for one pod."""
    if step == "steer":
        return ability._replace(steer=words)
    if step in ("rules", "no rules"):
        return ability._replace(nft=words)
    return ability._replace(connect=words)
