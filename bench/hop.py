"""P8: the hop between app and sidecar by each way of capture, with a relay in C that does nothing else.

    app (client) ==== capture ====> relay (uid 2102) ==== the pod's own address ====> app (server)

Every way has a pod of its own: plain nftables REDIRECT, eBPF capture without and with acceleration, the same where bytes towards the app
go back from TCP without a look at who reads (bulk only), and no capture or relay at all. Rounds are interleaved. The relay waits by epoll,
as sidecars do. Round trips are measured with one connection, where four switches between processes are a third of what the accelerated way
takes, and with sixteen that all have a message under way, where a relay that is woken finds several, as a sidecar in use does. Both with
all processes of a way on one processor, where the way itself is all that there is, and once more wherever the scheduler puts them, as in a
pod: waking an idle processor is then most of what is measured, and whether that happens differs from run to run. Bulk goes to a server
that waits by poll(2), as event loops do, and to one that waits inside recv(2), which the programs treat differently (``reader`` in
ebpf/bpf/mesh.h). Where it runs is the scheduler's choice. CPU is that of client, relay and server, and of the kernel's workers. The same
with Pillion's own sidecars in place of the relay is `bench.levels`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from bench.measure import Series, interleaved, median
from bench.rig import Bench
from bench.stage import PROXY_UID, ROOT, StageError
from ebpf import bpfsys, client
from ebpf.redirect import capture
from ebpf.wire import PodFacts, Register, Status

ROW = "P8"
WAYS = ("nftables", "connect", "connect+sockmap", "connect+sockmap, trusting", "direct")
_TRUSTING = WAYS[3]
SIZES = (100, 1024, 16384)
ONE, ANY = "one processor", "any processor"
CONNECTIONS = 16
_BULK = {"bulk, 64 KiB writes": "bulk", "bulk, 64 KiB writes, blocking reader": "blocking"}
"""Work -> role of the client."""
_RUNS = {1: 9, CONNECTIONS: 3}  # of a round: each finds other places for the three processes, which is a factor of four
_MESSAGES = {1: 1000, CONNECTIONS: 300}  # of a run, on each connection
WARM_UP = 200  # messages that hop sends before those it times
_APP_UID = 1000
T = TypeVar("T")
_PORT, _RELAY_PORT = 9000, 4140
_FAR, _OWN = "198.18.0.1", "10.6.0.1"  # of nobody (RFC 2544): dialled, captured, never reached


@dataclass
class Way:
    """One way of capture, ready to be measured. address: what the client dials. pids: server and relay."""

    name: str
    netns: str
    address: str
    series: dict[str, Series]
    cgroup: Path
    pids: list[int] = field(default_factory=list)

    def command(self, uid: int, *words: str) -> list[str]:
        """hop in the pod, as this user."""
        return [
            "nsenter",
            f"--net=/run/netns/{self.netns}",
            "setpriv",
            f"--reuid={uid}",
            f"--regid={uid}",
            "--clear-groups",
            _binary(),
            *words,
        ]

    def join(self) -> None:
        """In the child: the cgroup that the programs hang on."""
        (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def on_one_processor(pids: Sequence[int]) -> Iterator[None]:
    """These processes, and whatever this one starts meanwhile."""
    allowed = os.sched_getaffinity(0)
    try:
        _allow(pids, {min(allowed)})
        yield
    finally:
        _allow(pids, allowed)


def _allow(pids: Sequence[int], processors: set[int]) -> None:
    for pid in (0, *pids):
        with contextlib.suppress(ProcessLookupError):  # it ended: what is measured says so better
            os.sched_setaffinity(pid, processors)


def relayed(bench: Bench) -> None:
    """The first half of the row; a way that does not work here leaves a failed round."""
    with contextlib.ExitStack() as stack:
        try:
            ways = _start(bench, stack)
        except StageError as error:
            series = Series(ROW, "hop", "connect+sockmap")
            series.fail(str(error))
            bench.series.append(series)
            bench.say(f"P8 does not start: {error}")
            return
        for way in interleaved(ways, bench.plan.rounds):
            if way.name != _TRUSTING:
                with on_one_processor(way.pids):
                    _round_trips(bench, way, ONE)
                _round_trips(bench, way, ANY)
            for work, role in _BULK.items():
                _attempt(bench, way, work, partial(_bulk, bench, way, role))
        _ratios(bench, ways)


def trip_work(size: int, where: str, connections: int = 1) -> str:
    return f"round trip, {size:,} bytes, " + (f"{connections} connections, " if connections > 1 else "") + where


def _works(way: str) -> list[str]:
    return [*_BULK] if way == _TRUSTING else [*_trips(), *_BULK]


def _trips() -> list[str]:
    return [trip_work(size, where, connections) for connections in (1, CONNECTIONS) for where in (ONE, ANY) for size in SIZES]


def _round_trips(bench: Bench, way: Way, where: str) -> None:
    for connections in (1, CONNECTIONS):
        for size in SIZES:
            work = trip_work(size, where, connections)
            _attempt(bench, way, work, partial(_latency, bench, way, size, connections, _RUNS[connections]))


def _attempt(bench: Bench, way: Way, work: str, measure: Callable[[], dict[str, float]]) -> None:
    series = way.series[work]
    try:
        figures = measure()
    except StageError as error:
        series.fail(str(error))
        bench.say(f"P8 {work:38} {way.name}: {error}")
        return
    series.add(figures)
    bench.say(f"P8 {work:38} {way.name:22} " + " ".join(f"{name}={value:,.4g}" for name, value in figures.items()))


def _latency(bench: Bench, way: Way, size: int, connections: int, runs: int) -> dict[str, float]:
    words = trip(size, connections, _MESSAGES[connections] // (10 if bench.plan.quick else 1))
    measured = [list(map(float, _run(way, *words).split())) for _ in range(runs)]
    p50, p99 = (median(values) for values in zip(*measured, strict=True))
    return {"latency_p50": p50, "latency_p99": p99}


def trip(size: int, connections: int, messages: int) -> tuple[str, ...]:
    """What hop is told to measure round trips, without the address. messages: on each connection."""
    count = str(messages * connections)
    return ("latency", str(size), count) if connections == 1 else ("busy", str(size), count, str(connections))


def _bulk(bench: Bench, way: Way, role: str) -> dict[str, float]:
    size = (128 << 20) if bench.plan.quick else (1 << 30)
    said, spent_s = with_cpu(way.pids, partial(_run, way, role, str(size), "65536"))
    return {"bandwidth": float(said) / 1e9, "cpu_per_gb": spent_s / (size / 1e9)}


def with_cpu(pids: Sequence[int], run: Callable[[], T]) -> tuple[T, float]:
    """What ``run`` returns, and the CPU seconds of these processes, of those it ran to their end, and of the kernel's workers."""
    before, mine = cpu_s(pids), os.times()
    result = run()
    after = os.times()
    children = after.children_user - mine.children_user + after.children_system - mine.children_system
    return result, cpu_s(pids) - before + children


def _run(way: Way, role: str, *words: str) -> str:
    command = way.command(_APP_UID, role, way.address, str(_PORT), *words)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=way.join, check=False)
    except subprocess.TimeoutExpired:
        raise StageError(f"{role} did not end") from None
    if done.returncode:
        raise StageError(f"{role}: {done.stderr.strip()}")
    return done.stdout


def cpu_s(pids: Sequence[int]) -> float:
    """Of these processes and of the kernel's workers, in seconds: acceleration moves work there, which must not go uncounted."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if int(entry.name) in pids or (entry / "comm").read_text().startswith(("kworker", "ksoftirqd")):
                total += int((entry / "schedstat").read_text().split()[0])
    return total / 1e9


# --- pods ---------------------------------------------------------------------------------------------------------------------------------


def _start(bench: Bench, stack: contextlib.ExitStack) -> list[Way]:
    folder = Path(tempfile.mkdtemp(prefix="hop-", dir=bench.context.workdir))
    folder.chmod(0o755)
    build(folder)
    root = bpfsys.cgroup2()
    if root is None:
        raise StageError("eBPF capture needs a mounted cgroup2 hierarchy")
    cgroup = root / f"pillion-hop-{os.getpid()}"
    cgroup.mkdir()
    stack.callback(cgroup.rmdir)
    agent = stack.enter_context(_agent(folder, cgroup))
    return [stack.enter_context(_way(bench, name, number, agent, cgroup)) for number, name in enumerate(WAYS)]


def build(folder: Path) -> Path:
    """Compile hop.c; raises StageError."""
    binary = folder / "hop"
    source = ROOT / "bench" / "load" / "hop.c"
    try:
        done = subprocess.run(["gcc", "-O2", "-Wall", "-o", str(binary), str(source)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise StageError("gcc is not installed") from None
    if done.returncode:
        raise StageError(f"hop.c does not compile: {done.stderr[-500:]}")
    _built.append(str(binary))
    return binary


_built: list[str] = []


def _binary() -> str:
    return _built[-1]


@contextlib.contextmanager
def _agent(folder: Path, cgroup: Path) -> Iterator[Path]:
    """An agent for this run; yields its socket."""
    pins = folder / "bpf"
    pins.mkdir()
    reading, writing = os.pipe()
    words = [
        sys.executable,
        "-m",
        "ebpf.agent",
        "--socket",
        folder / "agent.sock",
        "--state",
        folder / "agent.json",
        "--pins",
        pins / "pillion",
    ]
    words += ["--cgroup", cgroup, "--admin", "", "--capture", "ebpf", "--ready-fd", writing]
    with (folder / "agent.log").open("ab") as log:
        process = subprocess.Popen(list(map(str, words)), stdout=log, stderr=log, cwd=ROOT, pass_fds=[writing])
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], 60)
        said = os.read(reading, 65536) if ready else b""
        if not said or json.loads(said)["level"] != 1:
            raise StageError(f"eBPF capture does not work here: {said.decode()} {(folder / 'agent.log').read_text()[-500:]}")
        yield folder / "agent.sock"
    finally:
        os.close(reading)
        process.kill()
        process.wait()
        while os.path.ismount(pins):
            bpfsys.unmount(pins)


@contextlib.contextmanager
def _way(bench: Bench, name: str, number: int, agent: Path, cgroup: Path) -> Iterator[Way]:
    netns = f"hop{os.getpid()}x{number}"
    series = {work: Series(ROW, work, name) for work in _works(name)}
    bench.series += series.values()
    with contextlib.ExitStack() as stack:
        _ip("netns", "add", netns)
        stack.callback(_ip, "netns", "del", netns)
        for words in (
            "link set lo up",
            "link add far type veth peer name away",  # not every kernel has dummy devices
            "link set away up",
            f"addr add {_OWN}/32 dev far",
            "link set far up",
            f"route add default dev far src {_OWN}",
        ):
            _ip("-n", netns, *words.split())
        _capture(name, netns, agent)

        way = Way(name, netns, _OWN if name == "direct" else _FAR, series, cgroup)

        def spawn(uid: int, *words: str) -> None:
            process = subprocess.Popen(way.command(uid, *words), stdout=subprocess.PIPE, text=True, preexec_fn=way.join)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            if process.stdout is None or process.stdout.readline() != "listening\n":
                raise StageError(f"hop {' '.join(words)} does not listen")
            way.pids.append(process.pid)

        spawn(_APP_UID, "server", str(_PORT))
        if name != "direct":
            spawn(PROXY_UID, "relay", str(_RELAY_PORT), _OWN, str(_PORT))
        yield way
        if name.startswith("connect"):
            counters = _check(name, netns, agent)
            causes = (f"{cause}={counters[f'by_tcp_{cause}']:,}" for cause in ("order", "memory", "unpaired"))
            bench.say(f"P8 {name}: {counters['messages']:,} messages past TCP, by TCP {' '.join(causes)}")


def _capture(name: str, netns: str, agent: Path) -> None:
    if name == "nftables":
        rules = subprocess.run(
            ["ip", "netns", "exec", netns, "nft", "-f", "-"], input=capture(), capture_output=True, text=True, check=False
        )
        if rules.returncode:
            raise StageError(f"nft: {rules.stderr}")
    elif name != "direct":
        with open(f"/run/netns/{netns}", "rb") as file:
            facts = PodFacts(netns, "bench", netns, addresses=(_OWN,), accelerate="sockmap" in name, resume="trusting" in name)
            answer = client.ask(agent, Register(facts), (file.fileno(),))
        if not answer["ok"] or answer["pod"]["level"] != 1:
            raise StageError(f"{name}: {answer}")


def _check(name: str, netns: str, agent: Path) -> dict[str, int]:
    """That what was measured is what it is called, by the pod's counters; raises StageError."""
    counters: dict[str, int] = next(pod["counters"] for pod in client.ask(agent, Status())["pods"] if pod["id"] == netns)
    if not counters["captured"] or bool(counters["bytes"]) != ("sockmap" in name):
        raise StageError(f"{name} did not measure what it says: {counters}")
    return counters


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _ratios(bench: Bench, ways: list[Way]) -> None:
    """Each way beside nftables, for who looks at the run."""
    base = next(way for way in ways if way.name == "nftables")
    for way in ways:
        for work, series in way.series.items():
            for metric, values in series.samples.items():
                reference = base.series[work].samples.get(metric)
                if metric != "latency_p99" and reference and way is not base:
                    ratio = median(values) / median(reference)
                    bench.say(f"P8 {work:38} {way.name:22} {metric} x{ratio:.2f} of nftables")
