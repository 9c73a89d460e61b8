"""`python -m bench [--quick] [--rows P1,P2]`: measure, print ratios, write bench/results/latest.json, charts and docs/performance.md."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import certs, peers, report
from bench.contestants import pillion
from bench.contestants.agent import Led
from bench.contestants.base import Contestant, Context
from bench.contestants.envoy import Envoy
from bench.contestants.haproxy import Haproxy
from bench.contestants.none import NoProxy
from bench.contestants.pillion import Pillion
from bench.facts import Facts
from bench.limits import raise_file_limit
from bench.measure import Series, results
from bench.rig import FULL, QUICK, Bench
from bench.scenarios import SCENARIOS
from bench.stage import PROXY_UID, Pinning, StageError


def arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line; wrong rows or contestants end with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Pillion beside Envoy and HAProxy, one interleaved run")
    parser.add_argument("--quick", action="store_true", help="one short round of everything: does every contestant answer?")
    parser.add_argument("--rows", default=",".join(SCENARIOS), help=f"comma list of {', '.join(SCENARIOS)}")
    parser.add_argument("--contestants", default="", help="comma list; default all that are installed")
    parser.add_argument("--rounds", type=int, help="rounds of each contestant (5, quick 1)")
    parser.add_argument("--seconds", type=float, help="seconds of a round (2, quick 0.5)")
    parser.add_argument("--pin", choices=("pods", "split", "none"), default="none", help="cores: see Pinning.named")
    parser.add_argument("--no-install", action="store_true", help="use what is installed, install nothing")
    parser.add_argument("--keep", action="store_true", help="leave configurations and logs behind and say where")
    parser.add_argument(
        "--out", type=Path, help="the JSON file; default latest.json in bench/results, for quick or partial runs quick.json"
    )
    parser.add_argument("--page", type=Path, metavar="JSON", help="measure nothing: write docs/performance.md from this file")
    chosen = parser.parse_args(argv)
    if unknown := set(chosen.rows.split(",")) - set(SCENARIOS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    return chosen


def contestants(found: peers.Peers, wanted: str) -> list[Contestant]:
    """Everyone who is installed, in the order of the table."""
    everyone: list[Contestant] = [NoProxy()]
    if found.envoy:
        everyone += [Envoy(), Envoy("envoy-h2", between="http2")]
    if found.haproxy:
        everyone.append(Haproxy())
    everyone += [Pillion(), Pillion("pillion-ebpf", Led())]
    names = set(wanted.split(",")) if wanted else {one.name for one in everyone}
    return [one for one in everyone if one.name in names]


def main(argv: list[str]) -> int:
    """Exit code 0 when every round of every contestant succeeded, 1 when one failed or nothing could be measured, 2 for usage."""
    chosen = arguments(argv)
    if chosen.page:
        report.write_page(*report.from_json(chosen.page.read_text()))
        return 0
    if os.geteuid() != 0:
        print("bench: needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN) to make network namespaces", file=sys.stderr)
        return 1
    # A terminated run must unwind like an interrupted one, so that every pod is closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise_file_limit()
    found = peers.prepare(install=not chosen.no_install)
    for line in found.missing():
        print(f"bench: missing: {line}", file=sys.stderr)
    if not (found.wrk and found.nginx):
        return 1
    try:
        facts, series = measure(chosen, found, {**found.versions, "pillion": pillion.build()})
    except StageError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    rows = results(series)
    whole = not chosen.quick and not chosen.contestants and chosen.rows == ",".join(SCENARIOS)
    report.publish(facts, rows, chosen.out or report.LATEST.with_name("latest.json" if whole else "quick.json"), page=whole)
    failed = [one for one in series if one.failed_rounds]
    for one in failed:
        why = "; ".join(dict.fromkeys(one.notes))
        print(f"bench: {one.row} {one.work} {one.contestant}: {one.failed_rounds} failed: {why}", file=sys.stderr)
    return 1 if failed or not rows else 0


def measure(chosen: argparse.Namespace, found: peers.Peers, versions: dict[str, str]) -> tuple[Facts, list[Series]]:
    """Run the chosen rows; raises StageError for what no row can do without."""
    plan = QUICK if chosen.quick else FULL
    plan = replace(plan, rounds=chosen.rounds or plan.rounds, seconds=chosen.seconds or plan.seconds)
    pinning = Pinning.named(chosen.pin)
    started = time.time()
    with contextlib.ExitStack() as stack:
        workdir = Path(tempfile.mkdtemp(prefix="pillion-bench-"))
        if chosen.keep:
            stack.callback(print, f"bench: configurations and logs: {workdir}", file=sys.stderr)
        else:
            stack.callback(shutil.rmtree, workdir, ignore_errors=True)
        workdir.chmod(0o755)
        context = Context(found, certs.make(workdir / "certs", owner_uid=PROXY_UID), workdir, pinning)
        bench = Bench(context, contestants(found, chosen.contestants), plan, partial(print, file=sys.stderr, flush=True), [])
        for row in chosen.rows.split(","):
            began = time.monotonic()
            SCENARIOS[row](bench)
            bench.say(f"{row} took {time.monotonic() - began:.0f} s")
    facts = Facts(
        machine=peers.machine(),
        versions=versions,
        commit=peers.commit(),
        pinning=pinning.describe(),
        rounds=plan.rounds,
        seconds=plan.seconds,
        quick=plan.quick,
        started=started,
        took_s=time.time() - started,
        tls=bench.tls,
    )
    return facts, bench.series


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
