"""What every scenario is made of: the app behind the proxies, all contestants started, a check that policy holds, interleaved rounds.

Decides nothing about which work is measured; that is `bench.scenarios`, its only caller.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.contestants.base import Contestant, Context, Running, Setup, render
from bench.load import h2, wrk
from bench.measure import Outcome, Series, interleaved, measured
from bench.stage import APP_PORT, ROOT, Pod, Proc, Stage, StageError, wait_until

SIZES = {"1 MiB": 1 << 20, "64 MiB": 64 << 20}


@dataclass(frozen=True)
class Plan:
    """How long and how often.

    rounds: of each contestant. seconds: of one round (wrk knows whole ones only). quick: fewer works and smaller sizes, to see that
    every contestant answers.
    """

    rounds: int
    seconds: float
    warmup_s: float
    quick: bool

    def warmup_for(self, endpoints: int) -> float:
        """With a thousand endpoints a connection to each is made first, or handshakes would be measured."""
        return self.warmup_s + (endpoints * 0.006 if endpoints > 1 else 0)


FULL = Plan(rounds=5, seconds=2, warmup_s=0.3, quick=False)
QUICK = Plan(rounds=1, seconds=0.5, warmup_s=0, quick=True)


@dataclass
class Bench:
    """What a scenario works with, and where it leaves its samples. tls: what each contestant's two proxies agreed on, by its name."""

    context: Context
    contestants: Sequence[Contestant]
    plan: Plan
    say: Callable[[str], None]
    series: list[Series]
    tls: dict[str, str] = field(default_factory=dict)


@dataclass
class Entry:
    """A started contestant in one work of a row."""

    contestant: Contestant
    stage: Stage
    running: Running
    series: Series

    @property
    def pids(self) -> list[int]:
        """The proxies whose CPU and memory count."""
        return [proc.pid for proc in self.running.proxies.values()]

    @property
    def label(self) -> str:
        """For progress lines."""
        return f"{self.series.row} {self.series.work:24} {self.series.contestant:9}"


Server = Callable[[Bench, Pod, Path], Proc]
Load = Callable[[Entry, float], Outcome]
Check = Callable[[Entry], None]
Figures = Callable[[Outcome, float], dict[str, float]]


def program(module: str, *arguments: object) -> list[str]:
    """The command of one of our own load programs."""
    return [sys.executable, "-m", f"bench.load.{module}", *map(str, arguments)]


# --- the apps --------------------------------------------------------------------------------------------------------


def nginx(bench: Bench, pod: Pod, workdir: Path) -> Proc:
    """The HTTP/1.1 app: 1 KiB for every path."""
    config = workdir / "nginx.conf"
    config.write_text(render("nginx.conf", workdir=workdir, port=APP_PORT, body="x" * 1024))
    proc = pod.spawn("nginx", [str(bench.context.peers.nginx), "-c", str(config), "-p", str(workdir)])
    with pod.inside():
        wait_until(lambda: status("127.0.0.1", APP_PORT, "/ready") == 200, "nginx answers", 10, [proc])
    return proc


def nghttpd(bench: Bench, pod: Pod, workdir: Path, *, trailers: bool = False) -> Proc:
    """The HTTP/2 app: 1 KiB files under every path of bench.load.h2, files of the bulk sizes under /blob/."""
    root = workdir / "docroot"
    for number in range(600):
        for kind in ("grpc", "http2"):
            path = root / h2.varying(number, kind)[0].partition("?")[0].lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\0\0\0\4\0" + b"x" * 1024 if kind == "grpc" else b"x" * 1024)
    (root / "blob").mkdir()
    (root / "blob" / "small").write_bytes(b"ok")
    for size in SIZES.values():
        with (root / "blob" / str(size)).open("wb") as file:
            file.truncate(size)
    command = [str(bench.context.peers.nghttpd), "--no-tls", "-d", str(root), "-w", "24", "-W", "28", "-a", "0.0.0.0"]
    proc = pod.spawn("nghttpd", [*command, *(["--trailer", "grpc-status: 0"] if trailers else []), str(APP_PORT)])
    with pod.inside():
        wait_until(lambda: listens(APP_PORT), "nghttpd listens", 10, [proc])
    return proc


def blobs(bench: Bench, pod: Pod, workdir: Path) -> Proc:
    """The HTTP/1.1 app for large bodies: bench.load.bulk."""
    proc = pod.spawn("bulk", program("bulk", "serve", APP_PORT), cwd=ROOT)
    with pod.inside():
        wait_until(lambda: listens(APP_PORT), "the server of large bodies listens", 10, [proc])
    return proc


def listens(port: int) -> bool:
    """Whether something accepts on this port of the current namespace."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


# --- checks ----------------------------------------------------------------------------------------------------------


def status(host: str, port: int, path: str, method: str = "GET") -> int:
    """The status of one HTTP/1.1 request, 0 when there is no answer; the caller is already in the right namespace."""
    connection = http.client.HTTPConnection(host, port, timeout=20)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def check_http1(entry: Entry, allowed: str = "/api/users/1/detail", denied: str = "/admin/users") -> None:
    """Allowed is answered and everything else refused, or a pair without policy would be measured; raises StageError."""
    with entry.stage.client.inside():
        wait_until(lambda: status(*entry.running.dial, allowed) == 200, f"{entry.contestant.name} answers 200", 15)
        if entry.running.proxies and (refused := status(*entry.running.dial, denied)) not in (403, 404):
            # 404 is a refusal too, of a request that matches no route (Gateway API); the app itself answers every path with 200.
            raise StageError(f"{entry.contestant.name} answered {refused} to a request that no rule allows; expected 403 or 404")


def no_check(entry: Entry) -> None:
    """For loads whose first failed request says the same."""


# --- contestants and rounds ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(bench: Bench, row: str, works: Sequence[str], setup: Setup, server: Server, check: Check) -> Iterator[dict[str, list[Entry]]]:
    """All contestants that can take part, each on its own stage with its own server, started and checked once for all works of a row.

    Yields who is ready, for each work; whoever does not start, or does not refuse what it must, leaves a failed round in every one.
    """
    taking_part = [contestant for contestant in bench.contestants if contestant.missing(setup) is None]
    series = {(work, contestant.name): Series(row, work, contestant.name) for work in works for contestant in taking_part}
    bench.series += series.values()
    ready: dict[str, list[Entry]] = {work: [] for work in works}
    with contextlib.ExitStack() as stack:
        for contestant in taking_part:
            try:
                stage, running = start_one(bench, stack, contestant, setup, server)
                entries = [Entry(contestant, stage, running, series[work, contestant.name]) for work in works]
                check(entries[0])
            except StageError as error:
                for work in works:
                    series[work, contestant.name].fail(str(error))
                bench.say(f"{row}: {contestant.name} does not take part: {error}")
                continue
            for work, entry in zip(works, entries, strict=True):
                ready[work].append(entry)
        yield ready


def start_one(bench: Bench, stack: contextlib.ExitStack, contestant: Contestant, setup: Setup, server: Server) -> tuple[Stage, Running]:
    """One contestant on a stage of its own, which ``stack`` closes; raises StageError."""
    workdir = Path(tempfile.mkdtemp(prefix=f"{contestant.name}-", dir=bench.context.workdir))
    workdir.chmod(0o755)
    stage = Stage(contestant.name, workdir, bench.context.pinning, setup.endpoints)
    stack.callback(stage.close)
    server(bench, stage.server, workdir)
    return stage, contestant.start(bench.context, stage, setup)


def rounds(bench: Bench, entries: Sequence[Entry], load: Load, figures: Figures, share: float = 1.0) -> None:
    """Warm up, then run interleaved rounds; a round with any failed request keeps no figures. share: of a full round's time."""
    able = [entry for entry in entries if entry.running.warm or bench.plan.quick or _warmed_up(bench, entry, load)]
    for entry in interleaved(able, bench.plan.rounds):
        one_round(bench, entry, partial(load, entry, bench.plan.seconds * share), figures)


def _warmed_up(bench: Bench, entry: Entry, load: Load) -> bool:
    """What a pair does for the first time is not measured. Once for all works of a pair."""
    try:
        load(entry, bench.plan.warmup_for(len(entry.stage.endpoints)))
    except StageError as error:
        entry.series.fail(str(error))
        bench.say(f"{entry.label} {error}")
        return False
    entry.running.warm = True
    return True


def one_round(bench: Bench, entry: Entry, load: Callable[[], Outcome], figures: Figures) -> None:
    """Run one load and keep its figures, or the reason why there are none."""
    began = time.monotonic()
    try:
        outcome, cpu_s = measured(load, entry.pids)
    except StageError as error:
        outcome, cpu_s = Outcome(0, 1, {}, str(error)), 0.0
    if outcome.failed or not outcome.units:
        entry.series.fail(f"{outcome.failed} failed: {outcome.note}" if outcome.failed else "nothing completed")
        bench.say(f"{entry.label} FAILED {outcome.failed}: {outcome.note}")
        return
    made = figures(outcome, cpu_s)
    if not entry.pids:
        made = {name: value for name, value in made.items() if "cpu" not in name}
    entry.series.add(made)
    took = time.monotonic() - began
    bench.say(f"{entry.label} {took:4.1f}s " + " ".join(f"{name}={value:,.4g}" for name, value in made.items()))


def wrk_load(bench: Bench, connections: int) -> Load:
    """HTTP/1.1 over so many connections."""

    def load(entry: Entry, seconds: float) -> Outcome:
        return wrk.run(entry.stage.client, bench.context.peers, entry.running.dial, connections=connections, seconds=seconds)

    return load


def per_request(outcome: Outcome, cpu_s: float) -> dict[str, float]:
    """The load's own figures and the proxies' CPU per request in microseconds."""
    return {**outcome.metrics, "cpu_per_request": cpu_s * 1e6 / outcome.units}
