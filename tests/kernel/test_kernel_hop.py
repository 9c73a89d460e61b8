"""One hop between app and sidecar: what applications see is the same by TCP and past it. The naive program fails the same checks."""

from __future__ import annotations

import contextlib
import socket
import threading

import hop_checks
import pytest
from lab import ACCELERATED, CAPTURED, Failed, Lab, LabPod, rounds

from ebpf.layout import Counter, PodFlag

pytestmark = pytest.mark.kernel

BREAKS_NAIVE = ("defer_accept", "fast_open", "unread_receiver_to_sidecar", "unread_receiver_to_app", "slow_reader")
"""What a program without the order-and-memory check gets wrong: reordering in the first two, unbounded memory in the others."""


def _hop(pod: LabPod, name: str, flags: PodFlag) -> None:
    if name in ("fast_open", "syn_cookies"):
        pod.run(_sysctl, "tcp_fastopen" if name == "fast_open" else "tcp_syncookies", "3" if name == "fast_open" else "2", uid=0)
    pod.attach(flags)
    pod.run(hop_checks.run_check, name)


def _sysctl(name: str, value: str) -> None:
    with open(f"/proc/sys/net/ipv4/{name}", "w", encoding="ascii") as file:
        file.write(value)


@pytest.mark.parametrize("name", hop_checks.CHECKS)
def test_bytes_by_tcp(pod: LabPod, name: str) -> None:
    """The checks themselves are right: TCP passes them."""
    _hop(pod, name, CAPTURED)
    counts = pod.counts()
    assert counts[Counter.CAPTURED] > 0
    assert counts[Counter.MESSAGES] == 0


@pytest.mark.parametrize("name", hop_checks.CHECKS)
def test_bytes_past_tcp(pod: LabPod, name: str) -> None:
    _hop(pod, name, ACCELERATED)
    counts = pod.counts()
    if name not in ("fast_open", "defer_accept"):  # bait that keeps most connections on TCP
        assert counts[Counter.ACCELERATED] > 0
        assert counts[Counter.MESSAGES] > 0, counts
    if name in BREAKS_NAIVE:
        assert counts[Counter.BY_TCP_ORDER] + counts[Counter.BY_TCP_UNPAIRED] + counts[Counter.BY_TCP_MEMORY] > 0, counts


@pytest.mark.parametrize("name", hop_checks.CHECKS)
def test_bytes_past_tcp_resuming_towards_the_app(pod: LabPod, name: str) -> None:
    _hop(pod, name, ACCELERATED | PodFlag.RESUME)


def _buffers() -> list[int]:
    return [end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for end in hop_checks.Hop().pair()]


def test_tcp_is_kept_short_where_messages_go_past_it_and_there_only(lab: Lab) -> None:
    plain, accelerated = lab.pod(), lab.pod()
    plain.attach(CAPTURED)
    accelerated.attach(ACCELERATED)
    assert accelerated.run(_buffers) == [128 << 10] * 2
    assert plain.run(_buffers) != [128 << 10] * 2


def _outrun(number: int) -> None:
    c, s = hop_checks.Hop().pair()
    piece = bytes(64 << 10)
    ahead = 0
    c.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ahead += c.send(piece)
    c.setblocking(True)
    writer = threading.Thread(target=lambda: [c.sendall(piece) for _ in range(number)])
    writer.start()
    left = ahead + number * len(piece)
    while left:
        left -= len(hop_checks.receive(s, 256 << 10))
    writer.join()


def test_a_writer_that_outran_its_reader_comes_back_to_the_short_way(pod: LabPod) -> None:
    pod.attach(ACCELERATED)
    pod.run(_outrun, max(1000, rounds(3000)))
    counts = pod.counts()
    assert counts[Counter.BY_TCP_MEMORY] > 0, counts
    assert counts[Counter.MESSAGES] > counts[Counter.BY_TCP_ORDER], counts


def _exchanges(number: int, size: int) -> int:
    """Messages that meet the bound on memory, read in small pieces; how many segments the reader's kernel dropped for want of room."""
    c, s = hop_checks.Hop().pair()
    ahead = threading.Event()  # a reader as fast as its writer would never meet the bound

    def serve() -> None:
        ahead.wait()
        for _ in range(number):
            left = size
            while left:
                left -= len(hop_checks.receive(s, min(16 << 10, left)))
            s.sendall(b"!")

    server = threading.Thread(target=serve)
    server.start()
    left = memoryview(bytes(size))
    c.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while left:
            left = left[c.send(left) :]
    c.setblocking(True)
    ahead.set()
    for _ in range(number):
        c.sendall(left)
        hop_checks.read_exactly(c, 1)
        left = memoryview(bytes(size))
    server.join()
    with open("/proc/net/netstat", encoding="ascii") as file:
        names, values = (line.split() for line in file if line.startswith("TcpExt:"))
    return int(dict(zip(names, values, strict=True))["RcvPruned"])


def test_what_goes_by_tcp_finds_room(pod: LabPod) -> None:
    """What is dropped comes again after up to 200 ms."""
    pod.attach(ACCELERATED)
    assert pod.run(_exchanges, rounds(40), 12 << 20) == 0
    assert pod.counts()[Counter.BY_TCP_MEMORY] > 0


@pytest.mark.parametrize("name", BREAKS_NAIVE)
def test_the_usual_program_fails(naive: Lab, name: str) -> None:
    pod = naive.pod()
    try:
        with pytest.raises(Failed):
            _hop(pod, name, ACCELERATED)
        assert pod.counts()[Counter.MESSAGES] > 0, "it failed by something else than redirecting"
    finally:
        naive.close_pods()
