"""The rows of the result table: one function is one row, from starting its server to its samples.

Every scenario starts all contestants (each on a stage of its own), checks that each one lets the allowed through and refuses the rest,
then runs their rounds interleaved. Called by `bench.__main__`.
"""

from __future__ import annotations

import contextlib
import http.client
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.contestants.base import Contestant, Context, Running, Setup, render
from bench.load import wrk
from bench.measure import Outcome, Series, interleaved, measured
from bench.stage import APP_PORT, Pod, Proc, Stage, StageError, wait_until


@dataclass(frozen=True)
class Plan:
    """How long and how often. rounds: of each contestant. seconds: of one round. scale: 1 for the full sizes, less for quick runs."""

    rounds: int
    seconds: float
    warmup_s: float
    quick: bool


FULL = Plan(rounds=5, seconds=4, warmup_s=1, quick=False)
QUICK = Plan(rounds=2, seconds=1, warmup_s=1, quick=True)


@dataclass
class Bench:
    """What a scenario works with, and where it leaves its samples."""

    context: Context
    contestants: Sequence[Contestant]
    plan: Plan
    say: Callable[[str], None]
    series: list[Series]


@dataclass
class Entry:
    """A started contestant in one scenario."""

    contestant: Contestant
    stage: Stage
    running: Running
    app: Proc | None
    series: Series

    @property
    def pids(self) -> list[int]:
        return [proc.pid for proc in self.running.proxies.values()]


Server = Callable[[Bench, Pod, Path], Proc]
Load = Callable[[Entry, float], Outcome]


def nginx(bench: Bench, pod: Pod, workdir: Path) -> Proc:
    """The HTTP/1.1 app: 1 KiB for every path."""
    config = workdir / "nginx.conf"
    config.write_text(render("nginx.conf", workdir=workdir, port=APP_PORT, body="x" * 1024))
    proc = pod.spawn("nginx", [str(bench.context.peers.nginx), "-c", str(config), "-p", str(workdir)])
    with pod.inside():
        wait_until(lambda: status("127.0.0.1", APP_PORT, "/ready") == 200, "nginx answers", 10, [proc])
    return proc


def status(host: str, port: int, path: str, method: str = "GET") -> int:
    """The status of one HTTP/1.1 request, 0 when there is no answer; the caller is already in the right namespace."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


@contextlib.contextmanager
def started(bench: Bench, row: str, work: str, setup: Setup, server: Server) -> Iterator[list[Entry]]:
    """All contestants that can take part, each on its own stage with its own server; those that cannot leave a note instead."""
    with contextlib.ExitStack() as stack:
        entries = []
        for contestant in bench.contestants:
            series = Series(row, work, contestant.name)
            if (why := contestant.missing(setup)) is not None:
                bench.say(f"{row} {work}: {contestant.name} left out: {why}")
                continue
            bench.series.append(series)
            try:
                workdir = Path(tempfile.mkdtemp(prefix=f"{contestant.name}-", dir=bench.context.workdir))
                workdir.chmod(0o755)
                stage = Stage(contestant.name, workdir, bench.context.pinning, setup.endpoints)
                stack.callback(stage.close)
                (workdir / "run").mkdir()
                app = server(bench, stage.server, workdir)
                entry = Entry(contestant, stage, contestant.start(bench.context, stage, setup), app, series)
            except StageError as error:
                series.fail(str(error))
                bench.say(f"{row} {work}: {contestant.name} does not start: {error}")
                continue
            entries.append(entry)
        yield entries


def check_http1(entry: Entry, allowed: str = "/api/users/1/detail", denied: str = "/admin/users") -> None:
    """Allowed is answered and everything else refused, or the measurement would be of a pair without policy; raises StageError."""
    with entry.stage.client.inside():
        wait_until(lambda: status(*entry.running.dial, allowed) == 200, f"{entry.contestant.name} answers 200", 10)
        if entry.running.proxies and (refused := status(*entry.running.dial, denied)) != 403:
            raise StageError(f"{entry.contestant.name} answered {refused} to a request that no rule allows; expected 403")


def rounds(
    bench: Bench,
    entries: list[Entry],
    load: Load,
    check: Callable[[Entry], None],
    metrics: Callable[[Outcome, float], dict[str, float]],
) -> None:
    """Check, warm up, then run interleaved rounds; a round with any failed request keeps no figures."""
    able = []
    for entry in entries:
        try:
            check(entry)
            load(entry, bench.plan.warmup_s)
            able.append(entry)
        except StageError as error:
            entry.series.fail(str(error))
            bench.say(f"{entry.series.row} {entry.series.work}: {entry.contestant.name}: {error}")
    for entry in interleaved(able, bench.plan.rounds):
        try:
            outcome, cpu_s = measured(partial(load, entry, bench.plan.seconds), entry.pids)
        except StageError as error:
            entry.series.fail(str(error))
            continue
        if outcome.failed or not outcome.units:
            entry.series.fail(outcome.note or "nothing completed")
        else:
            figures = metrics(outcome, cpu_s)
            entry.series.add(figures if entry.pids else {name: value for name, value in figures.items() if not name.startswith("cpu")})
        bench.say(
            f"{entry.series.row} {entry.series.work} {entry.contestant.name:9} "
            + (f"FAILED: {outcome.note}" if outcome.failed else " ".join(f"{k}={v:,.4g}" for k, v in metrics(outcome, cpu_s).items()))
        )


def per_request(outcome: Outcome, cpu_s: float) -> dict[str, float]:
    """The load's own figures and the proxies' CPU per request in microseconds."""
    return {**outcome.metrics, "cpu_per_request": cpu_s * 1e6 / max(1, outcome.units)}


def _wrk(bench: Bench, connections: int) -> Load:
    def load(entry: Entry, seconds: float) -> Outcome:
        return wrk.run(entry.stage.client, bench.context.peers, entry.running.dial, connections=connections, seconds=seconds)

    return load


def p1(bench: Bench) -> None:
    """HTTP/1.1 through the pair, 32 connections."""
    with started(bench, "P1", "32 connections", Setup(), nginx) as entries:
        rounds(bench, entries, _wrk(bench, 32), check_http1, per_request)


def p2(bench: Bench) -> None:
    """HTTP/1.1 through the pair, 1 connection."""
    with started(bench, "P2", "1 connection", Setup(), nginx) as entries:
        rounds(bench, entries, _wrk(bench, 1), check_http1, per_request)


SCENARIOS: dict[str, Callable[[Bench], None]] = {"P1": p1, "P2": p2}
