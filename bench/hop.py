"""P8: the hop between app and sidecar by each way of capture, with a relay in C that does nothing else.

    app (client) ==== capture ====> relay (uid 2102) ==== the pod's own address ====> app (server)

Every way has a pod of its own: plain nftables REDIRECT, eBPF capture without and with acceleration, the same where bytes towards the app
go back from TCP without a look at who reads, and no capture or relay at all. Rounds are interleaved. Round trips are measured with one
connection, where four switches between processes are a third of what the accelerated way takes, and with sixteen that all have a message
under way, where a relay that is woken finds several, as a sidecar in use does. Both with all processes of a way on one processor, where
the way itself is all that there is, and once more wherever the scheduler puts them, as in a pod: waking an idle processor is then most of
what is measured, and whether that happens differs from run to run. Bulk goes to a server
that waits by poll(2), as event loops do, and to one that waits inside recv(2), which the programs treat differently (``reader`` in
ebpf/bpf/mesh.h). Where it runs is the scheduler's choice. CPU is that of client, relay and server, and of the kernel's workers. The same
rows with Pillion's own sidecars are P1 to P4 of the contestants ``pillion`` and ``pillion-ebpf``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.measure import Series, interleaved, median
from bench.rig import Bench
from bench.stage import PROXY_UID, ROOT, StageError
from ebpf import bpfsys, client
from ebpf.redirect import capture
from ebpf.wire import PodFacts, Register, Status

ROW = "P8"
WAYS = ("nftables", "connect", "connect+sockmap", "connect+sockmap, trusting", "direct")
_SIZES = (100, 1024, 16384)
_ONE, _ANY = "one processor", "any processor"
_CONNECTIONS = 16
_BULK = {"bulk, 64 KiB writes": "bulk", "bulk, 64 KiB writes, blocking reader": "blocking"}
"""Work -> role of the client."""
_RUNS = 9  # of a round: each finds other places for the three processes, one or two processors, which is a factor of four
_APP_UID = 1000
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
    def on_one_processor(self) -> Iterator[None]:
        """Server, relay, and whatever this process starts meanwhile."""
        allowed = os.sched_getaffinity(0)
        everybody = [0, *self.pids]
        try:
            for pid in everybody:
                os.sched_setaffinity(pid, {min(allowed)})
            yield
        finally:
            for pid in everybody:
                os.sched_setaffinity(pid, allowed)


def p8(bench: Bench) -> None:
    """The row; a way that does not work here leaves a failed round."""
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
            with way.on_one_processor():
                _round_trips(bench, way, _ONE)
            _round_trips(bench, way, _ANY)
            for work, role in _BULK.items():
                _attempt(bench, way, work, lambda way=way, role=role: _bulk(bench, way, role))  # type: ignore[misc]
        _ratios(bench, ways)


def _work(size: int, where: str, connections: int = 1) -> str:
    return f"round trip, {size:,} bytes, " + (f"{connections} connections, " if connections > 1 else "") + where


def _trips() -> list[str]:
    return [_work(size, where, connections) for connections in (1, _CONNECTIONS) for where in (_ONE, _ANY) for size in _SIZES]


def _round_trips(bench: Bench, way: Way, where: str) -> None:
    for connections in (1, _CONNECTIONS):
        for size in _SIZES:
            work = _work(size, where, connections)
            _attempt(bench, way, work, lambda size=size, connections=connections: _latency(bench, way, size, connections))  # type: ignore[misc]


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


def _latency(bench: Bench, way: Way, size: int, connections: int) -> dict[str, float]:
    count = str((100 if bench.plan.quick else 1000) * connections)
    words = ("latency", str(size), count) if connections == 1 else ("busy", str(size), count, str(connections))
    runs = [list(map(float, _run(way, *words).split())) for _ in range(_RUNS)]
    p50, p99 = (median(values) for values in zip(*runs, strict=True))
    return {"latency_p50": p50, "latency_p99": p99}


def _bulk(bench: Bench, way: Way, role: str) -> dict[str, float]:
    size = (128 << 20) if bench.plan.quick else (1 << 30)
    before = cpu_s(way.pids)
    mine = os.times()
    rate = float(_run(way, role, str(size), "65536"))
    after = os.times()
    spent = cpu_s(way.pids) - before + after.children_user - mine.children_user + after.children_system - mine.children_system
    return {"bandwidth": rate / 1e9, "cpu_per_gb": spent / (size / 1e9)}


def _run(way: Way, role: str, *words: str) -> str:
    command = way.command(_APP_UID, role, way.address, str(_PORT), *words)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=way.join, check=False)
    except subprocess.TimeoutExpired:
        raise StageError(f"{role} did not end") from None
    if done.returncode:
        raise StageError(f"{role}: {done.stderr.strip()}")
    return done.stdout


def cpu_s(pids: list[int]) -> float:
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
    series = {work: Series(ROW, work, name) for work in (*_trips(), *_BULK)}
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
    for work, reference in base.series.items():
        for way in ways:
            for metric, values in way.series[work].samples.items():
                if metric != "latency_p99" and reference.samples.get(metric) and way is not base:
                    ratio = median(values) / median(reference.samples[metric])
                    bench.say(f"P8 {work:38} {way.name:22} {metric} x{ratio:.2f} of nftables")
