"""Pods do not meet: equal addresses in two pods at once, shared maps that are full, and ports that opted out."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import hop_checks
import pytest
from lab import ACCELERATED, CAPTURED, OUT_PORT, PATIENCE_S, SIDECAR_UID, TARGET, Lab, LabPod, rounds, sysctl

from ebpf import attach, layout
from ebpf.layout import Counter, PodFlag, PortKind

pytestmark = pytest.mark.kernel

_TCP_DEFER_ACCEPT, _TCP_FASTOPEN, _MSG_FASTOPEN = 9, 23, 0x20000000
HOSTS = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]


def _abort(*socks: socket.socket) -> None:
    """Close with a reset, so that the same addresses are free at once."""
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        sock.close()


def _same_tuples(family: int, host: str, mark: bytes, number: int, steps: tuple[int, int]) -> tuple[int, int]:
    """Hold the connection host:20000+n -> host:4200 in step with another pod; (exchanges, bytes of others seen)."""
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, 4200))
    listener.listen(8)
    done = foreign = 0
    for turn in range(number):
        _step(steps)
        c = socket.socket(family)
        c.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        c.bind((host, 20000 + turn))
        c.connect((host, 4200))
        s, _ = listener.accept()
        _step(steps)  # both pods hold the same four numbers now
        for one, other in ((c, s), (s, c), (c, s)):
            message = mark + struct.pack("=I", turn) * 20
            one.sendall(message)
            other.settimeout(PATIENCE_S)
            got = hop_checks.read_exactly(other, len(message))
            foreign += got != message
            done += 1
        _abort(c, s)
    return done, foreign


def _step(steps: tuple[int, int]) -> None:
    os.write(steps[1], b"x")
    assert os.read(steps[0], 1), "the other pod ended"


def _stolen(role: str, number: int, steps: tuple[int, int]) -> int:
    """Two pods with equal addresses; the thief's accepting end is missing from the map (TCP_DEFER_ACCEPT). How often it read the secret."""
    listener = socket.socket()
    if role == "thief":
        listener.setsockopt(socket.IPPROTO_TCP, 9, 30)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 4200))
    listener.listen(8)
    stolen = 0
    for turn in range(number):
        if role == "thief":
            _step(steps)  # the victim's connection stands
        c = socket.socket()
        c.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        c.bind(("127.0.0.1", 20000 + turn))
        c.connect(("127.0.0.1", 4200))
        if role == "victim":
            s, _ = listener.accept()
            _step(steps)
        _step(steps)
        c.settimeout(0.03)
        if role == "victim":
            s.sendall(b"secret")
            _step(steps)
        else:
            _step(steps)
            with contextlib.suppress(TimeoutError):
                stolen += c.recv(100) == b"secret"
        _step(steps)
        _abort(c)
        if role == "victim":
            s.close()
    return stolen


@contextlib.contextmanager
def _in_step() -> Iterator[list[tuple[int, int]]]:
    (a_reads, b_writes), (b_reads, a_writes) = os.pipe(), os.pipe()
    try:
        yield [(a_reads, a_writes), (b_reads, b_writes)]
    finally:
        for fd in (a_reads, a_writes, b_reads, b_writes):
            os.close(fd)


@pytest.mark.parametrize(("family", "host"), HOSTS)
def test_equal_tuples_in_two_pods_exchange_no_byte(lab: Lab, family: int, host: str) -> None:
    """As the sidecar, whose own loopback connections are accelerated at both ends with the addresses that it chose."""
    pods = [lab.pod(), lab.pod()]
    number = rounds(500)
    with _in_step() as steps:
        processes = []
        for pod, mark, step in zip(pods, (b"A", b"B"), steps, strict=True):
            pod.attach(ACCELERATED)
            processes.append(pod.start(_same_tuples, family, host, mark, number, step, uid=SIDECAR_UID))
        for process in processes:
            assert process.result() == (3 * number, 0)
    for pod in pods:
        counts = pod.counts()
        assert counts[Counter.MESSAGES] == 3 * number, counts


def _thief_gets(lab: Lab, number: int) -> int:
    victim, thief = lab.pod(), lab.pod()
    with _in_step() as steps:
        processes = []
        for pod, role, step in zip((victim, thief), ("victim", "thief"), steps, strict=True):
            pod.attach(ACCELERATED)
            processes.append(pod.start(_stolen, role, number, step, uid=SIDECAR_UID))
        return [int(process.result()) for process in processes][1]


def test_a_pod_that_copies_anothers_addresses_reads_nothing(lab: Lab) -> None:
    assert _thief_gets(lab, 50) == 0


def test_the_usual_program_hands_a_pods_bytes_to_another(naive: Lab) -> None:
    try:
        assert _thief_gets(naive, 10) > 0
    finally:
        naive.close_pods()


# --- full maps ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[Lab]:
    """The real programs with maps for very few."""
    lab = Lab({"PODS_MAX": 2, "PAIRS_MAX": 8, "SOCKS_MAX": 8})
    try:
        yield lab
    finally:
        lab.close()


@pytest.fixture
def small_lab(small: Lab) -> Iterator[Lab]:
    try:
        yield small
    finally:
        small.close_pods()


def test_a_pod_too_many_is_not_registered_and_the_others_stay(small_lab: Lab) -> None:
    pods = [small_lab.pod() for _ in range(3)]
    for pod in pods[:2]:
        pod.attach(CAPTURED)
    with pytest.raises(attach.Full, match=r"full \(2 entries\)"):
        pods[2].attach(CAPTURED)
    assert set(small_lab.node.pods()) == {pod.cookie for pod in pods[:2]}
    small_lab.node.forget(pods[0].cookie)
    pods[2].attach(CAPTURED)


def _many(number: int) -> int:
    """Hold so many connections and use all of them, both ways; how many were right."""
    hop = hop_checks.Hop()
    pairs = [hop.pair() for _ in range(number)]
    right = 0
    for turn in range(3):
        for at, (c, s) in enumerate(pairs):
            for one, other in ((c, s), (s, c)):
                message = struct.pack("=II", turn, at) * 50
                one.sendall(message)
                right += hop_checks.read_exactly(other, len(message)) == message
    return right


def test_connections_beyond_the_map_of_sockets_go_by_tcp(small_lab: Lab) -> None:
    pod = small_lab.pod()
    pod.attach(ACCELERATED)
    assert pod.run(_many, 20) == 3 * 20 * 2
    counts = pod.counts()
    assert counts[Counter.BY_TCP_FULL] >= 12, counts
    assert 0 < counts[Counter.MESSAGES] < 3 * 20 * 2, counts
    assert pod.run(_many, 3) == 18, "room again once those are closed"
    assert pod.counts()[Counter.MESSAGES] > counts[Counter.MESSAGES]


def _flood(number: int) -> int:
    """Connections that nobody accepts fill the map of pairs; then one that is."""
    from proxy.transport.original_dst import original_dst

    listener = hop_checks.listen(((socket.IPPROTO_TCP, 9, 30),), backlog=256)  # its sockets appear with the first data only
    waiting = []
    for _ in range(number):
        c = socket.create_connection((TARGET, 80), PATIENCE_S)
        waiting.append(c)
    unknown = 0
    for c in waiting:
        c.send(b"x")
    for _ in waiting:
        s, _ = listener.accept()
        unknown += str(original_dst(s)) == f"127.0.0.1:{OUT_PORT}"
        s.close()
    return unknown


def test_a_target_that_was_pushed_out_is_unknown_not_wrong(small_lab: Lab) -> None:
    """The sidecar sees its own address then, which its loop guard refuses: fail closed."""
    pod = small_lab.pod()
    pod.attach(ACCELERATED)
    unknown = pod.run(_flood, 64)
    assert 0 < unknown <= 64
    assert pod.run(_flood, 1) == 0


# --- opting out -----------------------------------------------------------------------------------------------------------------------


def _serve(port: int, tell: Callable[..., None]) -> None:
    listener = socket.create_server(("127.0.0.1", port))
    tell(None)
    while True:
        sock, _ = listener.accept()
        while data := hop_checks.receive(sock):
            sock.sendall(data)
        sock.close()


def _dial(host: str, port: int) -> bytes:
    with socket.create_connection((host, port), PATIENCE_S) as sock:
        sock.settimeout(None)
        sock.sendall(b"hello")
        return hop_checks.read_exactly(sock, 5)


def test_single_ports_can_stay_on_tcp(pod: LabPod) -> None:
    """Of the app as the sidecar dials it, and of what the app dials."""
    pod.node.write_ports(pod.cookie, PortKind.NOT_ACCELERATED, [(6000, 6000), (5432, 5433)])
    pod.attach(ACCELERATED)
    for port in (6000, 6001):
        pod.start(_serve, port).result()
    assert pod.run(_dial, "127.0.0.1", 6000, uid=SIDECAR_UID) == b"hello"
    assert pod.counts()[Counter.MESSAGES] == 0
    assert pod.run(_dial, "127.0.0.1", 6001, uid=SIDECAR_UID) == b"hello"
    assert pod.counts()[Counter.MESSAGES] == 2
    pod.start(_serve, OUT_PORT, uid=SIDECAR_UID).result()
    assert pod.run(_dial, TARGET, 5433) == b"hello"
    assert pod.counts()[Counter.MESSAGES] == 2
    assert pod.counts()[Counter.CAPTURED] == 1, "captured all the same"
    assert pod.run(_dial, TARGET, 5434) == b"hello"
    assert pod.counts()[Counter.MESSAGES] == 4


def test_connections_that_are_not_ours_are_not_touched(pod: LabPod) -> None:
    """The app's own loopback connections stay on TCP."""
    pod.attach(ACCELERATED)
    pod.start(_serve, 6001).result()
    for _ in range(20):
        assert pod.run(_dial, "127.0.0.1", 6001) == b"hello"
    counts = pod.counts()
    assert not any(counts.values()), counts


def test_bytes_are_counted(pod: LabPod) -> None:
    pod.attach(ACCELERATED)
    pod.start(_serve, OUT_PORT, uid=SIDECAR_UID).result()
    pod.run(_dial, TARGET, 80)
    counts = pod.counts()
    expected = {Counter.CAPTURED: 1, Counter.PAIRED: 1, Counter.ACCELERATED: 1, Counter.MESSAGES: 2, Counter.BYTES: 10}
    assert {name: value for name, value in counts.items() if value} == expected


# --- the state a restart finds --------------------------------------------------------------------------------------------------------


def _talk(number: int, ends: int, tell: Callable[..., None]) -> None:
    """Until there is something to read from the descriptor ``ends``."""
    hop = hop_checks.Hop()
    pairs = [hop.pair() for _ in range(number)]
    for c, _ in pairs:
        c.sendall(b"unread")
    tell(None)
    turn = 0
    for _, s in pairs:
        assert hop_checks.read_exactly(s, 6) == b"unread"
    while not select.select([ends], [], [], 0)[0]:
        for c, s in pairs:
            message = struct.pack("=Q", turn) * 30
            c.sendall(message)
            assert hop_checks.read_exactly(s, len(message)) == message
            s.sendall(message)
            assert hop_checks.read_exactly(c, len(message)) == message
            turn += 1
    tell(turn)


def test_programs_can_be_exchanged_and_removed_under_load() -> None:
    """New programs over the same maps, then everything removed: running connections keep their bytes, new ones are as the state says."""
    from ebpf import loader

    lab = Lab()
    ends, end = os.pipe()
    try:
        pod = lab.pod()
        pod.attach(ACCELERATED, inbound=True)
        talking = pod.start(_talk, 20, ends)
        talking.result()
        before = set(lab.node.pods())
        report = loader.install(lab.root)
        assert not report.refused
        lab.node.upgrade()
        with attach.Node(attach.Pins(lab.root)) as restarted:
            assert set(restarted.pods()) == before == restarted.linked()
            assert restarted.pods()[pod.cookie] == layout.Pod(SIDECAR_UID, ACCELERATED, OUT_PORT, 4143)
        attach.remove(lab.root)
        os.write(end, b"x")
        assert talking.result() > 0
        assert isinstance(pod.counts()[Counter.MESSAGES], int)
    finally:
        lab.close()
        os.close(ends)
        os.close(end)


def test_flags_change_for_the_next_connection(pod: LabPod) -> None:
    pod.attach(PodFlag.CAPTURE)
    pod.start(_serve, OUT_PORT, uid=SIDECAR_UID).result()
    pod.run(_dial, TARGET, 80)
    assert pod.counts()[Counter.MESSAGES] == 0
    pod.attach(ACCELERATED)
    pod.run(_dial, TARGET, 80)
    assert pod.counts()[Counter.MESSAGES] == 2


def _wait_for_all(seconds: float) -> int:
    """An app's reader that took a first part by TCP and waits for the rest with MSG_WAITALL: bytes of its one call, -1 when it hangs."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 6000))
    listener.listen(8)
    sidecar = socket.create_connection(("127.0.0.1", 6000))
    app, _ = listener.accept()
    ahead = 0
    while hop_checks.held(app) <= layout.QUEUE_LIMIT:
        ahead += sidecar.send(bytes(1 << 16))
    sidecar.sendall(b"a" * 100)  # by TCP, for its queue is full
    assert hop_checks.read_exactly(app, ahead) == bytes(ahead)
    assert hop_checks.held(app) > 0
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(len(app.recv(200, socket.MSG_WAITALL))), daemon=True)
    thread.start()
    while hop_checks.held(app):  # until the reader has the first part, and sleeps
        time.sleep(0.001)
    sidecar.sendall(b"b" * 100)
    thread.join(seconds)
    return got[0] if got else -1


def test_a_reader_that_waits_for_all_does_not_hang(pod: LabPod) -> None:
    """It sleeps inside TCP's recv(2), which does not look into the queue of redirected messages: the rest must come by TCP too."""
    pod.attach(ACCELERATED)
    for turn in range(1, 21):
        assert pod.run(_wait_for_all, PATIENCE_S, uid=SIDECAR_UID) == 200
        assert pod.counts()[Counter.BY_TCP_MEMORY] == turn, "the first part"


def test_an_app_said_never_to_wait_for_all_must_not(pod: LabPod) -> None:
    """The control: without looking at the reader it hangs, which is the price of RESUME."""
    pod.attach(ACCELERATED | PodFlag.RESUME)
    assert pod.run(_wait_for_all, 1.0, uid=SIDECAR_UID) == -1


def _before_it_is_accepted(option: int, number: int) -> tuple[int, int]:
    """The sidecar writes to an app whose socket the first bytes make; (what FIONREAD tells of them, of what follows)."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, option, 30)
    listener.bind(("127.0.0.1", 6000))
    listener.listen(8)
    for _ in range(number):
        sidecar = socket.socket()
        if option == _TCP_FASTOPEN:
            sidecar.sendto(b"a" * 100, _MSG_FASTOPEN, ("127.0.0.1", 6000))
        else:
            sidecar.connect(("127.0.0.1", 6000))
            sidecar.sendall(b"a" * 100)
        app, _ = listener.accept()
        select.select([app], [], [])
        first = hop_checks.unread(app)
        assert hop_checks.read_exactly(app, 100) == b"a" * 100
        sidecar.sendall(b"b" * 50)
        select.select([app], [], [])
        then = hop_checks.unread(app)
        assert hop_checks.read_exactly(app, 50) == b"b" * 50
        app.sendall(b"c" * 50)
        assert hop_checks.read_exactly(sidecar, 50) == b"c" * 50
        if (first, then) != (100, 50):
            break
        app.close()
        sidecar.close()
    return first, then


@pytest.mark.parametrize("option", [_TCP_DEFER_ACCEPT, _TCP_FASTOPEN], ids=["deferred", "fast open"])
def test_a_connection_that_began_before_the_app_had_a_socket_stays_on_tcp(pod: LabPod, option: int) -> None:
    """FIONREAD may tell of the queue alone, and the first bytes are not in it: an app that believes it would never read them all."""
    pod.run(sysctl, "tcp_fastopen", "3", uid=0)
    pod.attach(ACCELERATED)
    assert pod.run(_before_it_is_accepted, option, 20, uid=SIDECAR_UID) == (100, 50)
    counts = pod.counts()
    assert counts[Counter.MESSAGES] == 0, counts
    if option == _TCP_DEFER_ACCEPT:
        assert counts[Counter.PAIRED] == 20 and counts[Counter.BY_TCP_UNPAIRED] == 2 * 20, counts
