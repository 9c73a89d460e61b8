"""Puts the programs in place on this node and finds out what works: ``python -m ebpf.prepare``, a child of the agent that ends.

Takes over what is pinned when it is ours and complete, else loads (ebpf.loader) and tries what can only be tried (ebpf.probe); attaches in
both cases. A process of its own because the agent's memory is a headline number, and what this needs is needed once. Reads the last agent's
state from its standard input, writes one line of JSON, which is a `Found`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ebpf import attach, bpfsys, layout, loader, probe
from ebpf.maps import PinnedPrograms
from ebpf.plan import Ability

_SYS_PTRACE = 19
_CLONE_NEWNET = 0x40000000
_CONNECT = [program.name for program in layout.CGROUP_PROGRAMS if program.name != "sockops"]


class Found(NamedTuple):
    """ability: of eBPF; its ``nft`` says nothing. fingerprint: of the sources that the pinned programs were made from, "" without pins.

    problems: of loading them, "" for what worked.
    """

    ability: Ability
    fingerprint: str
    problems: list[str]


def fingerprint() -> str:
    """Changes with the programs, the layout and the kernel: the same one means that what is pinned is what would be loaded.

    Against confusion, not against forgery: whoever can write pins or state is root.
    """
    found = zlib.crc32(f"{layout.VERSION} {os.uname().release}".encode())
    for path in sorted((Path(__file__).resolve().parent / "bpf").iterdir()):
        found = zlib.crc32(path.name.encode() + path.read_bytes(), found)
    return f"{found:08x}"


def prepare(root: Path, cgroup: Path | None, before: Mapping[str, Any]) -> Found:
    """Never raises for what is missing. before: the state of the agent before this one."""
    ours = fingerprint()
    try:
        attach.prepare(root)
    except OSError as error:
        return _nothing(f"there is no bpf file system at {root.parent}, and it cannot be mounted: {os.strerror(error.errno or 0)}")
    to_app = before.get("to_app")  # a kernel stays as it is: what it lacks alone is no reason to try again
    if before.get("fingerprint") == ours and not any(before.get("loaded") or ["unknown"]) and isinstance(to_app, str):
        # everything worked for the agent before us; what failed is tried again at every start
        with contextlib.suppress(attach.NotInstalled, OSError):
            return Found(_really(PinnedPrograms(root), cgroup, Ability(to_app=to_app)), ours, list(before["loaded"]))
    try:
        report = loader.install(root)
    except (loader.LoaderFailed, OSError, subprocess.TimeoutExpired) as error:
        report = loader.Report(os.uname().release, problem=f"the loader failed: {error}")
    tried = probe.find()  # a program that loads may still not keep what it promises on this kernel
    ability = Ability(
        report.why_not(_CONNECT) or tried.connect,
        report.why_not(["inbound"]) or tried.steer,
        report.why_not(["sockops", "redirect"]) or tried.sockmap,
        to_app=tried.to_app,
    )
    try:
        programs = PinnedPrograms(root)
    except (attach.NotInstalled, OSError) as error:
        return _nothing(report.problem or str(error))
    return Found(_really(programs, cgroup, ability), ours, list(ability[:3]))


def _nothing(problem: str) -> Found:
    return Found(Ability(problem, problem, problem), "", [problem])


def _really(programs: PinnedPrograms, cgroup: Path | None, ability: Ability) -> Ability:
    """Attach: what was loaded may still be refused its place."""
    cgroup = cgroup or bpfsys.cgroup2()
    if not ability.connect and not ability.sockmap:
        try:
            if cgroup is None:
                raise OSError("no unified cgroup hierarchy (cgroup2) is mounted")
            programs.attach_node(cgroup)
            programs.upgrade()
        except OSError as error:
            ability = ability._replace(connect=f"the programs cannot be attached to {cgroup}: {error}")
    if not ability.steer:
        ability = ability._replace(steer=_steering_problem(programs) or _listener_problem())
    return ability


def _steering_problem(programs: PinnedPrograms) -> str:
    """Attach sk_lookup to a namespace of our own, which is gone afterwards."""
    found: list[str] = []

    def trial() -> None:
        try:
            bpfsys.unshare(_CLONE_NEWNET)
            netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                cookie = bpfsys.netns_cookie()
                programs.steer(cookie, netns)
                programs.leave(cookie)
            finally:
                os.close(netns)
        except OSError as error:
            found.append(f"sk_lookup cannot be attached to a network namespace: {error}")

    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    return found[0] if found else ""


def _listener_problem() -> str:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next((int(line.split()[1], 16) for line in file if line.startswith("CapEff:")), 0)
    return "" if effective >> _SYS_PTRACE & 1 else "sidecars' listeners cannot be taken (pidfd_getfd): the agent needs CAP_SYS_PTRACE"


def main() -> int:
    """Exit code 0 whatever was found."""
    parser = argparse.ArgumentParser(prog="python -m ebpf.prepare", description=__doc__)
    parser.add_argument("--pins", type=Path, required=True)
    parser.add_argument("--cgroup", type=Path)
    asked = parser.parse_args()
    found = prepare(asked.pins, asked.cgroup, json.load(sys.stdin))
    print(json.dumps(found._asdict() | {"ability": found.ability._asdict()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
