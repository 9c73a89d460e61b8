"""What the programs cost those they are not for, and what they leave behind: nothing."""

from __future__ import annotations

import os
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import hop_checks
import pytest
from lab import ACCELERATED, CAPTURED, PATIENCE_S, SCALE, Lab, LabPod, join

from ebpf import bpfsys
from tests import traces

pytestmark = pytest.mark.kernel


def _ours() -> dict[str, set[str]]:
    """Names on this machine that a test of this process made."""
    mine = f"ptk{os.getpid()}-"
    cgroups = bpfsys.cgroup2() or Path("/nowhere")
    return {
        "cgroups": {path.name for path in cgroups.glob(f"{mine}*")},
        "namespaces": {path.name for path in Path("/run/netns").glob(f"{mine}*")},
        "links": {path.name for path in Path("/sys/class/net").glob(f"k{os.getpid()}[ab]*")},
    }


def _mounts() -> set[str]:
    return {line for line in Path("/proc/self/mounts").read_text().splitlines() if "pillion-bpffs-" in line}


def test_nothing_is_left(lab: Lab) -> None:
    """Programs, maps, links, pins, mounts, cgroups and namespaces, after connections were captured, accelerated and cut."""
    before, mounts = _ours(), _mounts()
    other = Lab()
    try:
        one, two = other.pod(), other.pod()
        join(one, two, 9)
        one.attach(ACCELERATED, ("10.98.9.1",), inbound=True)
        one.run(hop_checks.run_check, "reset")
        made = traces.pinned(other.root)
        assert all(made.values()), made
        assert all(made[kind] <= bpfsys.ids(kind) for kind in made)
        assert _ours() != before
    finally:
        other.close()
    end = time.monotonic() + PATIENCE_S
    while any(made[kind] & bpfsys.ids(kind) for kind in made) and time.monotonic() < end:
        time.sleep(0.05)  # the kernel frees programs a grace period later
    assert {kind: made[kind] & bpfsys.ids(kind) for kind in made} == {"map": set(), "prog": set(), "link": set()}
    assert _ours() == before
    assert _mounts() == mounts


def test_a_pod_that_went_is_noticed_and_forgotten(lab: Lab) -> None:
    """Deleted in the middle of a connection: its link says so, and its entries can go."""
    pod = lab.pod()
    pod.attach(ACCELERATED, inbound=True)
    before = dict(lab.node.pods())
    assert not lab.node.ended(pod.cookie)
    pod.start(_blast).result()
    for process in pod.running:
        process.kill()
    subprocess.run(["ip", "netns", "del", pod.name], check=True)
    end = time.monotonic() + PATIENCE_S
    while not lab.node.ended(pod.cookie):
        assert time.monotonic() < end
        time.sleep(0.02)
    lab.node.forget(pod.cookie)
    assert set(before) - set(lab.node.pods()) == {pod.cookie}
    assert pod.cookie not in lab.node.linked()
    subprocess.run(["ip", "netns", "add", pod.name], check=True)  # for the lab's own cleaning


def _blast(tell: Callable[..., None]) -> None:
    c, s = hop_checks.Hop().pair()
    tell(None)
    while True:
        c.sendall(b"x" * 60000)
        hop_checks.read_exactly(s, 60000)


def _connections(number: int) -> float:
    """Microseconds of processor for connect, accept and close; loopback does the other end's work in the same process."""
    listener = socket.create_server(("127.0.0.1", 9000), backlog=64)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))  # inherited: no TIME_WAIT
    began = time.process_time()
    for _ in range(number):
        c = socket.socket()
        c.connect(("127.0.0.1", 9000))
        s, _ = listener.accept()
        s.close()
        c.close()
    return (time.process_time() - began) / number * 1e6


def test_what_connections_cost_that_are_not_ours(
    lab: Lab, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Connect, accept and close, interleaved: no programs; programs attached, pod not registered; a registered pod's own loopback.

    The ratios are printed, not asserted: time on a shared machine says nothing alone. That the programs do nothing for such connections
    is asserted by their counters (test_connections_that_are_not_ours_are_not_touched).
    """
    pods: dict[str, LabPod] = {"without programs": lab.pod(), "not registered": lab.pod(), "registered, own loopback": lab.pod()}
    pods["not registered"].attach(CAPTURED)
    lab.node.forget(pods["not registered"].cookie)
    pods["registered, own loopback"].attach(ACCELERATED)
    times: dict[str, list[float]] = {name: [] for name in pods}
    names = list(pods)
    for turn in range(21):
        for name in names[turn % 3 :] + names[: turn % 3]:
            times[name].append(pods[name].run(_connections, max(50, int(800 * SCALE))))
    with capsys.disabled():
        for name, values in times.items():
            ratio = statistics.median(value / plain for value, plain in zip(values, times["without programs"], strict=True))
            record_property(f"connection, {name}", f"x{ratio:.3f}")
            print(f"\n  connect + accept + close, {name}: {statistics.median(values):.1f} us, x{ratio:.3f}", end="")
    assert pods["not registered"].counts() == pods["without programs"].counts()
