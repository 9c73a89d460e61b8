"""The rows of the result table: one function is one row, from starting its server to its samples.

Called by `bench.__main__`, in the order of SCENARIOS. What the rows have in common is `bench.rig`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from bench import handshake, hop, levels
from bench.certs import dns_name
from bench.contestants.base import API_RULES, BULK_RULES, GRPC_RULES, AppProtocol, Setup, grown_rules
from bench.limits import file_limit
from bench.load import h2, h2load
from bench.measure import Outcome, Series, interleaved, pss_bytes
from bench.peers import Peers
from bench.rig import (
    SIZES,
    Bench,
    Entry,
    Server,
    blobs,
    check_http1,
    nghttpd,
    nginx,
    no_check,
    per_request,
    program,
    rounds,
    start_one,
    started,
    wrk_load,
)
from bench.stage import ROOT, StageError, wait_until

MB = 1e6
# Where neither what the proxies speak between them nor how they are led makes a difference.
_SAME_PROCESS_OR_NONE = ("none", "envoy-h2", "pillion-ebpf")


def p1(bench: Bench) -> None:
    """HTTP/1.1 through the pair, 32 connections."""
    work = "HTTP/1.1, 32 connections"
    with started(bench, "P1", [work], Setup(), nginx, partial(_check_and_note_tls, bench)) as entries:
        rounds(bench, entries[work], wrk_load(bench, 32), per_request)


def _check_and_note_tls(bench: Bench, entry: Entry) -> None:
    with handshake.listening(entry.stage.client) as agreed:
        check_http1(entry)
    if entry.pids:
        bench.tls[entry.contestant.name] = ", ".join(dict.fromkeys(agreed))


def p2(bench: Bench) -> None:
    """HTTP/1.1 through the pair, 1 connection."""
    work = "HTTP/1.1, 1 connection"
    with started(bench, "P2", [work], Setup(), nginx, check_http1) as entries:
        rounds(bench, entries[work], wrk_load(bench, 1), per_request, share=0.5)


def p3(bench: Bench) -> None:
    """HTTP/2 and gRPC unary through the pair."""
    for kind, title, rules in (("http2", "HTTP/2", API_RULES), ("grpc", "gRPC", GRPC_RULES)):
        shapes = [(8, 16)] if bench.plan.quick else [(8, 16), (1, 100), (8, 1)]
        works = {f"{title}, {connections} x {streams}": (connections, streams) for connections, streams in shapes}
        server, check = partial(nghttpd, trailers=kind == "grpc"), partial(_check_http2, kind=kind)
        with started(bench, "P3", list(works), Setup("http2", rules), server, check) as entries:
            for work, (connections, streams) in works.items():
                rounds(bench, entries[work], partial(_http2, kind, connections, streams), per_request, share=0.25)


def _http2(kind: str, connections: int, streams: int, entry: Entry, seconds: float) -> Outcome:
    command = program("h2", *entry.running.dial, kind, connections, streams, seconds)
    return h2.parse(*entry.stage.client.output(command, seconds + 40))


def _check_http2(entry: Entry, kind: str) -> None:
    """The load's requests pass; a path that no rule allows does not."""
    outcome = h2.parse(*entry.stage.client.output(program("h2", *entry.running.dial, kind, 1, 1, 0.2), 20))
    if outcome.failed or not outcome.units:
        raise StageError(f"{entry.contestant.name} does not let the load through: {outcome.note}")
    if entry.running.proxies:
        outcome = h2.parse(*entry.stage.client.output(program("h2", *entry.running.dial, "denied", 1, 1, 0.1), 20))
        if outcome.units:
            raise StageError(f"{entry.contestant.name} answered 200 to a request that no rule allows")


def p4(bench: Bench) -> None:
    """Large bodies through the pair, up and down: GB/s and CPU per GB."""
    kinds: tuple[tuple[AppProtocol, str, Server, tuple[str, ...]], ...] = (
        ("http1", "HTTP/1.1", blobs, ("1 MiB down", "1 MiB up", "64 MiB down", "64 MiB up")),
        ("http2", "HTTP/2", nghttpd, ("1 MiB down", "1 MiB up", "64 MiB down", "64 MiB up")),
        ("opaque", "opaque TCP", blobs, ("64 MiB down", "64 MiB up")),
    )
    for app, title, server, bodies in kinds:
        works = {f"{title}, {body}": body for body in (bodies[1:2] if bench.plan.quick else bodies)}
        with started(bench, "P4", list(works), Setup(app, BULK_RULES), server, no_check) as entries:
            for work, body in works.items():
                size, _, way = body.rpartition(" ")
                load = partial(_bulk_http2, bench.context.peers) if app == "http2" else _bulk
                rounds(bench, entries[work], partial(load, SIZES[size], way == "up"), _per_byte, share=0.25)


def _bulk(size: int, up: bool, entry: Entry, seconds: float) -> Outcome:
    command = program("bulk", "load", *entry.running.dial, "up" if up else "down", size, 4, seconds)
    return _bulk_outcome(*entry.stage.client.output(command, seconds + 60))


def _bulk_http2(peers: Peers, size: int, up: bool, entry: Entry, seconds: float) -> Outcome:
    return h2load.run(entry.stage.client, peers, entry.running.dial, size=size, up=up, seconds=seconds)


def _bulk_outcome(code: int, out: str, err: str) -> Outcome:
    line = next((line for line in out.splitlines() if line.startswith("{")), None)
    if code != 0 or line is None:
        return Outcome(0, 1, {}, f"bulk load: exit {code}: {err.strip()[-300:]}")
    said = json.loads(line)
    return Outcome(said["bytes"], said["failed"], {"bandwidth": said["bytes"] / said["seconds"] / 1e9}, said["why"])


def _per_byte(outcome: Outcome, cpu_s: float) -> dict[str, float]:
    return {**outcome.metrics, "cpu_per_gb": cpu_s / (outcome.units / 1e9)}


def p5(bench: Bench) -> None:
    """New mutual TLS connections: to the inbound proxy with one request each, and through the pair as opaque TCP."""
    folder = bench.context.certs.folder

    def to_inbound(entry: Entry, seconds: float) -> Outcome:
        command = program("mtls", "new", *entry.running.dial, folder, dns_name("server"), entry.running.alpn, 4, seconds)
        return h2.parse(*entry.stage.client.output(command, seconds + 40))

    def figures(outcome: Outcome, cpu_s: float) -> dict[str, float]:
        return {"connections_per_cpu_s": outcome.units / cpu_s if cpu_s else 0.0, "connections": outcome.metrics["throughput"]}

    work = "inbound, HTTP/1.1"
    with started(bench, "P5", [work], Setup(inbound_only=True), nginx, no_check) as entries:
        rounds(bench, entries[work], to_inbound, figures, share=0.25)

    def through_pair(entry: Entry, seconds: float) -> Outcome:
        command = program("openloop", "--new", *entry.running.dial, 4, seconds)
        return h2.parse(*entry.stage.client.output(command, seconds + 40))

    work = "pair, opaque TCP"
    with started(bench, "P5", [work], Setup("opaque"), nginx, no_check) as entries:
        rounds(bench, entries[work], through_pair, figures, share=0.25)


def p6(bench: Bench) -> None:
    """Memory of idle sidecars, ten on the machine (five pairs), after start and after load."""
    pairs = 1 if bench.plan.quick else 5
    for contestant in bench.contestants:
        if contestant.name in _SAME_PROCESS_OR_NONE:
            continue
        series = Series("P6", f"{2 * pairs} sidecars", contestant.name)
        bench.series.append(series)
        with contextlib.ExitStack() as stack:
            try:
                made = [Entry(contestant, *start_one(bench, stack, contestant, Setup(), nginx), series) for _ in range(pairs)]
                pids = [pid for entry in made for pid in entry.pids]
                time.sleep(1)
                idle = [pss_bytes(pid) / MB for pid in pids]
                failed = [outcome for entry in made if (outcome := wrk_load(bench, 32)(entry, 1)).failed]
                time.sleep(1)
                loaded = [pss_bytes(pid) / MB for pid in pids]
            except StageError as error:
                series.fail(str(error))
                continue
        if failed:
            series.fail(failed[0].note)
            continue
        for one, other in zip(idle, loaded, strict=True):
            series.add({"pss_idle": one, "pss_after_load": other})
        bench.say(f"P6 {contestant.name}: idle {statistics.median(idle):.1f} MB, after load {statistics.median(loaded):.1f} MB")


def p7(bench: Bench) -> None:
    """Idle keep-alive connections with mutual TLS through one inbound sidecar."""
    # Two descriptors each in a proxy that keeps an upstream connection for every client's; a sidecar leaves an eighth to its app's calls.
    count = 300 if bench.plan.quick else min(10_000, file_limit() * 7 // 16 - 300)
    work = f"{count:,} idle connections"
    with started(bench, "P7", [work], Setup(inbound_only=True), nginx, no_check) as entries:
        for entry in entries[work]:
            try:
                metrics = _hold(bench, entry, count)
            except StageError as error:
                entry.series.fail(str(error))
                bench.say(f"{entry.label} {error}")
            else:
                entry.series.add(metrics)
                bench.say(f"{entry.label} " + " ".join(f"{name}={value:,.4g}" for name, value in metrics.items()))


def _hold(bench: Bench, entry: Entry, count: int) -> dict[str, float]:
    """Before, with and after ``count`` idle connections; raises StageError when any of them failed."""
    (pid,) = entry.pids
    marks = entry.stage.workdir
    to_inbound = program("mtls", "new", *entry.running.dial, bench.context.certs.folder, dns_name("server"), entry.running.alpn, 2, 1)
    if (warm := h2.parse(*entry.stage.client.output(to_inbound, 40))).failed:
        raise StageError(warm.note)
    before = pss_bytes(pid)
    command = program("mtls", "idle", *entry.running.dial, bench.context.certs.folder, dns_name("server"), entry.running.alpn, count)
    holder = entry.stage.client.spawn("holder", [*command, str(bench.plan.seconds), str(marks)], cwd=ROOT)
    wait_until((marks / "held").exists, "connections are open", 120 + count / 50, [holder])
    held = pss_bytes(pid)
    wait_until((marks / "active.json").exists, "the active connection is measured", bench.plan.seconds + 30, [holder])
    active = json.loads((marks / "active.json").read_text())
    if active["failed"] or (marks / "held").read_text() != str(count):
        raise StageError(f"{active['failed']} failed: {active['why']}")
    (marks / "release").touch()
    wait_until((marks / "closed").exists, "connections are closed", 60)
    time.sleep(2 if bench.plan.quick else 15)  # whoever gives memory back does so now and then, not at once
    grown = max(1, held - before)
    return {
        "bytes_per_connection": grown / count / 1000,
        "given_back": 100 * (held - pss_bytes(pid)) / grown,
        "active_p50": active["p50_us"],
        "active_p99": active["p99_us"],
    }


def p8(bench: Bench) -> None:
    """The hop between app and sidecar by each way of capture: with a relay in C, and with a real pair of sidecars."""
    hop.relayed(bench)
    levels.through_sidecars(bench)


def p9(bench: Bench) -> None:
    """Latency that the pair adds at fixed rates, open loop."""
    rates = {f"HTTP/1.1, {rate:,} req/s open loop": rate for rate in ((2000,) if bench.plan.quick else (500, 2000))}
    with started(bench, "P9", list(rates), Setup(), nginx, check_http1) as entries:
        for work, rate in rates.items():
            rounds(bench, entries[work], partial(_open_loop, rate), _latencies)
            _add_to_bare([entry.series for entry in entries[work]])


def _open_loop(rate: int, entry: Entry, seconds: float) -> Outcome:
    return h2.parse(*entry.stage.client.output(program("openloop", *entry.running.dial, rate, seconds), seconds + 40))


def _latencies(outcome: Outcome, cpu_s: float) -> dict[str, float]:
    return {name: outcome.metrics[name] for name in ("latency_p50", "latency_p99")}


def _add_to_bare(series: Sequence[Series]) -> None:
    """``added``: each one's latency less the median without proxies."""
    bare = next((one for one in series if one.contestant == "none"), None)
    if bare is None:
        return
    for one in series:
        for share in ("p50", "p99"):
            base, own = bare.samples.get(f"latency_{share}"), one.samples.get(f"latency_{share}")
            if base and own and one is not bare:
                one.samples[f"added_{share}"] = [value - statistics.median(base) for value in own]


def p11(bench: Bench) -> None:
    """From exec to ready, certificate included."""
    made = {contestant.name: Series("P11", "exec to ready", contestant.name) for contestant in bench.contestants}
    for contestant in interleaved([one for one in bench.contestants if one.name not in _SAME_PROCESS_OR_NONE], bench.plan.rounds):
        series = made[contestant.name]
        if series not in bench.series:
            bench.series.append(series)
        with contextlib.ExitStack() as stack:
            try:
                _, running = start_one(bench, stack, contestant, Setup(), nginx)
            except StageError as error:
                series.fail(str(error))
                continue
        series.add({"ready": statistics.mean(running.ready_s.values())})
        bench.say(f"P11 {contestant.name} " + " ".join(f"{role}={value:.3f}s" for role, value in running.ready_s.items()))


def p12(bench: Bench) -> None:
    """P1 as the policy and the service grow; ``growth`` is CPU per request over that of the smallest size."""
    routes = [(f"{count:,} route{'s' * (count > 1)}", Setup(rules=grown_rules(count))) for count in (1, 10, 100, 1000)]
    endpoints = [(f"{count:,} endpoint{'s' * (count > 1)}", Setup(endpoints=count)) for count in (1, 10, 1000)]
    for family in (routes, endpoints):
        if bench.plan.quick:
            family = [family[0], family[1]]
        with contextlib.ExitStack() as stack:
            chosen = [one for one in bench.contestants if one.name not in _SAME_PROCESS_OR_NONE]
            narrowed = replace(bench, contestants=chosen)
            entries = []
            for work, setup in family:
                entries += stack.enter_context(started(narrowed, "P12", [work], setup, nginx, check_http1))[work]
            rounds(narrowed, entries, wrk_load(bench, 32), per_request, share=0.5)
        smallest = {entry.series.contestant: entry.series for entry in entries if entry.series.work == family[0][0]}
        for entry in entries:
            base = smallest.get(entry.series.contestant)
            if base and base.samples.get("cpu_per_request") and entry.series.samples.get("cpu_per_request"):
                unit = statistics.median(base.samples["cpu_per_request"])
                entry.series.samples["growth"] = [value / unit for value in entry.series.samples["cpu_per_request"]]


SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "P1": p1,
    "P2": p2,
    "P3": p3,
    "P4": p4,
    "P5": p5,
    "P6": p6,
    "P7": p7,
    "P8": p8,
    "P9": p9,
    "P11": p11,
    "P12": p12,
}
