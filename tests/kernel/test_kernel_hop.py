"""One hop between app and sidecar: what applications see is the same by TCP and past it. The naive program fails the same checks."""

from __future__ import annotations

import contextlib
import socket
import threading

import hop_checks
import pytest
from lab import ACCELERATED, CAPTURED, Failed, Lab, LabPod, rounds, sysctl

from ebpf.layout import Counter, PodFlag
from proxy.transport.pace import unread_by_app

pytestmark = pytest.mark.kernel

BREAKS_NAIVE = ("defer_accept", "fast_open", "unread_receiver_to_sidecar", "unread_receiver_to_app", "slow_reader")
"""What a program without the order-and-memory check gets wrong: reordering in the first two, unbounded memory in the others."""

NEEDS_FIONREAD = "epoll_edge_believing_fionread"
PAST_TCP = [name for name in hop_checks.CHECKS if name != NEEDS_FIONREAD]


def _hop(pod: LabPod, name: str, flags: PodFlag) -> None:
    if name in ("fast_open", "syn_cookies"):
        pod.run(sysctl, "tcp_fastopen" if name == "fast_open" else "tcp_syncookies", "3" if name == "fast_open" else "2", uid=0)
    pod.attach(flags)
    pod.run(hop_checks.run_check, name)


@pytest.mark.parametrize("name", hop_checks.CHECKS)
def test_bytes_by_tcp(pod: LabPod, name: str) -> None:
    """The checks themselves are right: TCP passes them."""
    _hop(pod, name, CAPTURED)
    counts = pod.counts()
    assert counts[Counter.CAPTURED] > 0
    assert counts[Counter.MESSAGES] == 0


@pytest.mark.parametrize("name", PAST_TCP)
def test_bytes_past_tcp(pod: LabPod, name: str) -> None:
    _hop(pod, name, ACCELERATED)
    counts = pod.counts()
    if name not in ("fast_open", "defer_accept"):  # bait that keeps most connections on TCP
        assert counts[Counter.ACCELERATED] > 0
        assert counts[Counter.MESSAGES] > 0, counts
    if name in BREAKS_NAIVE:
        assert counts[Counter.BY_TCP_ORDER] + counts[Counter.BY_TCP_UNPAIRED] + counts[Counter.BY_TCP_MEMORY] > 0, counts


@pytest.mark.parametrize("name", PAST_TCP)
def test_bytes_past_tcp_resuming_towards_the_app(pod: LabPod, name: str) -> None:
    _hop(pod, name, ACCELERATED | PodFlag.RESUME)


@pytest.mark.parametrize("name", ["half_close", "epoll_edge_far_behind", "unread_receiver_to_app", "reset_amid_a_body", "peek"])
def test_what_the_app_reads_by_tcp_and_what_it_sends_past_it(pod: LabPod, name: str) -> None:
    """Where FIONREAD does not know the queue."""
    _hop(pod, name, ACCELERATED | PodFlag.ONE_WAY)
    counts = pod.counts()
    assert counts[Counter.ACCELERATED] > 0
    assert (counts[Counter.MESSAGES] > 0) == (name != "unread_receiver_to_app"), counts


def test_who_believes_fionread_gets_all_on_the_way_that_the_probe_chose(lab: Lab, accelerated: PodFlag) -> None:
    """It tells of TCP's bytes alone or of the redirected alone, as old as the kernel is, and so there is one right way for each."""
    chosen, other = lab.pod(), lab.pod()
    _hop(chosen, NEEDS_FIONREAD, accelerated)
    assert chosen.counts()[Counter.ACCELERATED] > 0
    with pytest.raises(Failed, match="no event for the last"):
        _hop(other, NEEDS_FIONREAD, accelerated ^ PodFlag.ONE_WAY)


def _each_way() -> None:
    c, s = hop_checks.Hop().pair()
    for writer, reader in ((c, s), (s, c)):
        writer.sendall(b"word")
        assert hop_checks.read_exactly(reader, 4) == b"word"


def _unread_by_app() -> int:
    """What the sidecar is told."""
    _, s = hop_checks.Hop().pair()
    s.sendall(b"word")
    return unread_by_app(s)


def test_one_way_is_the_apps(lab: Lab) -> None:
    """The other is TCP's as if there were nothing, and the sidecar need not ask how much of it is unread."""
    both, one = lab.pod(), lab.pod()
    both.attach(ACCELERATED)
    one.attach(ACCELERATED | PodFlag.ONE_WAY)
    for pod, messages in ((both, 2), (one, 1)):
        pod.run(_each_way)
        assert pod.counts()[Counter.MESSAGES] == messages
    assert not any(one.counts()[counter] for counter in (Counter.BY_TCP_ORDER, Counter.BY_TCP_MEMORY, Counter.BY_TCP_UNPAIRED))
    assert both.run(_unread_by_app) == 4
    with pytest.raises(Failed, match="OSError"):
        one.run(_unread_by_app)
    short, long = one.run(_buffers)
    assert short == 128 << 10 < long


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
