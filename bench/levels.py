"""P8, second half: Pillion's own sidecars on each rung of the ladder, and with eBPF capture where acceleration is switched off.

    app (client) ==== outbound sidecar ==== mutual TLS ==== inbound sidecar ==== app (server)

Each rung has a pair of pods with a node's agent of their own, the same programs as the contestants `pillion` and `pillion-ebpf` run. The
apps of opaque TCP are those of `bench.hop`, and so is the CPU: that of both apps, both sidecars and the kernel's workers. HTTP/1.1 is P1's
work, with P1's CPU, the sidecars' alone. Round trips are measured with everybody on one processor and wherever the scheduler puts them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import hop
from bench.contestants.agent import Led
from bench.contestants.base import BULK_RULES, Setup
from bench.contestants.pillion import Pillion
from bench.measure import Outcome, median
from bench.rig import Bench, Entry, check_http1, listens, nginx, per_request, rounds, started, wrk_load
from bench.stage import APP_PORT, Pod, Proc, StageError, wait_until

LEVELS = {
    "nftables": Led("nft", accelerate=False),
    "nftables+sockmap": Led("nft"),
    "connect": Led("ebpf", accelerate=False),
    "connect+sockmap": Led("ebpf"),
}
"""By the names of `bench.hop`'s ways: level 3 of the ladder, level 2, level 1 of a pod whose acceleration is switched off, level 1."""

_PAIR = "sidecar pair"
HTTP = f"HTTP/1.1, 32 connections, {_PAIR}"
BULK = f"bulk, 64 KiB writes, {_PAIR}"
TRIPS = {
    f"{hop.trip_work(size, where, connections)}, {_PAIR}": (size, where, connections)
    for size, connections in (*((size, 1) for size in hop.SIZES), (1024, hop.CONNECTIONS))
    for where in (hop.ONE, hop.ANY)
}
"""Work -> size of a message, where everybody runs, connections."""
_RUNS = {hop.ONE: 1, hop.ANY: 3}
_SHARE = 0.5  # of a full round: a second of HTTP


def through_sidecars(bench: Bench) -> None:
    """The rows; a level that does not work here leaves failed rounds."""
    narrowed = replace(bench, contestants=[Pillion(name, led) for name, led in LEVELS.items()])
    folder = Path(tempfile.mkdtemp(prefix="pair-", dir=bench.context.workdir))
    try:
        binary = hop.build(folder)
    except StageError as error:
        bench.say(f"P8 through sidecars does not start: {error}")
        return
    works = [*TRIPS, BULK]
    with started(narrowed, hop.ROW, works, Setup("opaque", BULK_RULES), partial(_server, binary), partial(_carries, binary)) as entries:
        for work, (size, where, connections) in TRIPS.items():
            rounds(narrowed, entries[work], partial(_round_trips, binary, size, where, connections, bench.plan.quick), _all_of_it)
        rounds(narrowed, entries[BULK], partial(_bulk, binary, bench.plan.quick), _all_of_it)
    with started(narrowed, hop.ROW, [HTTP], Setup(), nginx, check_http1) as entries:
        rounds(narrowed, entries[HTTP], wrk_load(narrowed, 32), per_request, share=_SHARE)


def _server(binary: Path, bench: Bench, pod: Pod, workdir: Path) -> Proc:
    proc = pod.spawn("hop", [str(binary), "server", str(APP_PORT)])
    with pod.inside():
        wait_until(lambda: listens(APP_PORT), "the server of round trips listens", 10, [proc])
    return proc


def _carries(binary: Path, entry: Entry) -> None:
    """That messages go past TCP in both pods, or in none, as the level's name says; raises StageError."""
    assert entry.running.redirected is not None
    _run(binary, entry, hop.trip(100, 1, 10))
    past = {name: count > 0 for name, count in entry.running.redirected().items() if name in ("client", "server")}
    if past != dict.fromkeys(("client", "server"), LEVELS[entry.contestant.name].accelerate):
        raise StageError(f"{entry.contestant.name} does not do what it says; messages past TCP: {past}")


def _round_trips(binary: Path, size: int, where: str, connections: int, quick: bool, entry: Entry, seconds: float) -> Outcome:
    messages = 20 if quick else 600 if connections == 1 else 150
    pids, runs = _pids(entry), _RUNS[where]
    run = partial(_run, binary, entry, hop.trip(size, connections, messages))
    with hop.on_one_processor(pids) if where == hop.ONE else contextlib.nullcontext():
        said, spent_s = hop.with_cpu(pids, lambda: [list(map(float, run().split())) for _ in range(runs)])
    p50, p99 = (median(values) for values in zip(*said, strict=True))
    count = runs * messages * connections
    each = spent_s * 1e6 / (count + runs * hop.WARM_UP)
    return Outcome(count, 0, {"latency_p50": p50, "latency_p99": p99, "cpu_per_request": each})


def _bulk(binary: Path, quick: bool, entry: Entry, seconds: float) -> Outcome:
    size = (32 << 20) if quick else (256 << 20)
    said, spent_s = hop.with_cpu(_pids(entry), partial(_run, binary, entry, ("bulk", str(size), "65536")))
    return Outcome(size, 0, {"bandwidth": float(said) / 1e9, "cpu_per_gb": spent_s / (size / 1e9)})


def _all_of_it(outcome: Outcome, cpu_s: float) -> dict[str, float]:
    return outcome.metrics  # their CPU is that of everybody who takes part, not of the sidecars alone


def _pids(entry: Entry) -> list[int]:
    return [proc.pid for pod in (entry.stage.client, entry.stage.server) for proc in pod.procs]


def _run(binary: Path, entry: Entry, words: Sequence[str]) -> str:
    """What hop's client printed; raises StageError."""
    host, port = entry.running.dial
    role, *rest = words
    code, out, err = entry.stage.client.output([str(binary), role, host, str(port), *rest], 60)
    if code:
        raise StageError(f"hop {role}: {err.strip()}")
    return out
