"""``python -m bench.scale [--sidecars N] ...``: one controller process, an API server and thousands of sidecars in front of it.

The controller is the program itself on its Kubernetes source, in a process of its own; API server and sidecars share this one, so that a
time is from the object's change in the API server to its arrival at the last sidecar that is interested, by one clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from bench.scale import objects
from bench.scale.objects import Raw, Size
from bench.scale.sidecars import CONTROLLER, Fleet
from core.credentials import Credentials
from core.names import WorkloadId
from tests.certs import Authority
from tests.core.fake_apiserver import FakeApiServer, running
from tests.ports import unused_port

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Of the controller's process. memory in MB: resident now, and the most so far."""

    cpu_s: float
    memory_mb: float
    peak_mb: float


def usage(pid: int) -> Usage:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    megabytes = {name: int(status[name].split()[0]) / 1000 for name in ("VmRSS", "VmHWM")}
    return Usage((int(fields[11]) + int(fields[12])) / _TICKS, megabytes["VmRSS"], megabytes["VmHWM"])


@dataclass(frozen=True)
class Row:
    """One kind of change. interested: sidecars told of one change, on average. Times in milliseconds, of the *last* interested sidecar
    (whole) and of each of them (each). cpu_ms, load_cpu_ms: of the controller and of this load tool, for one change.
    """

    change: str
    changes: int
    interested: float
    each_p50: float
    each_p99: float
    whole_worst: float
    cpu_ms: float
    load_cpu_ms: float


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Bench:
    """The rig: an API server, a controller, a fleet."""

    def __init__(self, size: Size, server: FakeApiServer, fleet: Fleet, controller: int) -> None:
        self.size, self.server, self.fleet, self.controller = size, server, fleet, controller

    async def measure(
        self, name: str, count: int, change: Callable[[int], tuple[Iterable[Raw], set[tuple[int, str]]]], pause_s: float = 0.05
    ) -> Row:
        """Make ``count`` changes one after the other; ``change`` gives the objects and who must hear of them."""
        each: list[float] = []
        whole: list[float] = []
        before, own = usage(self.controller), time.process_time()
        told = 0
        for number in range(count):
            changed, expected = change(number)
            began = trio.current_time()
            for raw in changed:
                self.server.put(raw)
            with trio.fail_after(60):
                await self.fleet.wait(expected, began)
            times = [self.fleet.told[key] - began for key in expected]
            each += times
            whole.append(max(times))
            told += len(times)
            await trio.sleep(pause_s)
        cpu = usage(self.controller).cpu_s - before.cpu_s
        each_ms, whole_ms = [1000 * value for value in each], max(whole) * 1000
        p50, p99 = percentile(each_ms, 0.5), percentile(each_ms, 0.99)
        spent = [round(1000 * seconds / count, 1) for seconds in (cpu, time.process_time() - own)]
        row = Row(name, count, told / count, round(p50, 1), round(p99, 1), round(whole_ms, 1), *spent)
        print(f"  {name}: {row}", flush=True)
        return row

    # --- changes ------------------------------------------------------------------------------------------------------------

    def of_service(self, service: int) -> set[tuple[int, str]]:
        addr = f"{objects.vip_of(service)}:80"
        return {(number, addr) for number in self.fleet.interested.get(addr, ())}

    def of_policy(self, service: int) -> set[tuple[int, str]]:
        return {(number, f"port:{objects.PORT}") for number in self.fleet.interested.get(f"port:{service}", ())}

    def endpoint_fails(self, number: int) -> tuple[list[Raw], set[tuple[int, str]]]:
        service = number * 37 % self.size.services
        return [objects.slice_object(self.size, service, unready=number % self.size.pods_each)], self.of_service(service)

    def popular_changes(self, number: int) -> tuple[list[Raw], set[tuple[int, str]]]:
        return [objects.popular_slice(number % 99)], {(one, objects.POPULAR) for one in range(self.size.sidecars)}

    def policy_changes(self, number: int) -> tuple[list[Raw], set[tuple[int, str]]]:
        """Every other change takes the one before back."""
        service = number // 2 * 41 % self.size.services
        return [objects.policy_object(self.size, service, "" if number % 2 else f"account-{number}")], self.of_policy(service)

    def friends_change(self, number: int) -> tuple[list[Raw], set[tuple[int, str]]]:
        """An authentication that every policy of its namespace names."""
        first = number % self.size.namespaces * self.size.services_each
        services = range(first, first + self.size.services_each)
        expected: set[tuple[int, str]] = set().union(*(self.of_policy(service) for service in services))
        return [objects.friends_object(number % self.size.namespaces, f"guest-{number}")], expected

    def rollout(self, number: int) -> tuple[list[Raw], set[tuple[int, str]]]:
        """A Service's pods are all replaced: new pods, then the endpoints."""
        service = (number * 53 + 11) % self.size.services
        pods = [objects.pod_object(self.size, service, member, number + 1) for member in range(self.size.pods_each)]
        return [*pods, objects.slice_object(self.size, service, generation=number + 1, unready=0)], self.of_service(service)


CHANGES = 100


async def run(size: Size, out: Path | None, hold: bool) -> None:
    print(f"{size}; load average {os.getloadavg()[0]:.1f}", flush=True)
    authority = Authority()
    accounts = [objects.namespace_of(number) for number in range(size.namespaces)]
    certified = {name: authority.credentials(WorkloadId("cluster.local", name, "app")) for name in accounts}
    server = FakeApiServer()
    for raw in objects.everything(size):
        server.put(raw)
    server.compact()
    gc.collect()
    gc.freeze()  # a collection over all of this would stop us, and be measured as the controller's
    with tempfile.TemporaryDirectory() as folder:
        async with running(server), trio.open_nursery() as nursery:
            port, admin = unused_port(), unused_port()
            began = trio.current_time()
            process = start(Path(folder), authority.credentials(CONTROLLER), server.port, port, admin)
            try:
                await ready(admin, process)
                synced = usage(process.pid)
                print(f"  synced after {trio.current_time() - began:.1f} s: {synced}", flush=True)
                fleet = Fleet(port, size)
                began = trio.current_time()
                with trio.fail_after(300):
                    await fleet.run(certified, nursery)
                connected = usage(process.pid)
                took = trio.current_time() - began
                heard = f"{fleet.messages} messages, {fleet.received / size.sidecars / 1000:.1f} KB a sidecar"
                print(f"  {size.sidecars} sidecars told everything after {took:.1f} s: {connected}, {heard}", flush=True)
                rows = await measured(Bench(size, server, fleet, process.pid))
                ended = usage(process.pid)
                idle = await idle_cpu(process.pid)
                print(f"  at the end: {ended}; idle CPU {idle:.1%} of a core; connections lost {fleet.lost}", flush=True)
                if out:
                    result = {"size": asdict(size), "synced": asdict(synced), "connected": asdict(connected), "all_told_s": round(took, 1)}
                    result |= {"rows": [asdict(row) for row in rows], "end": asdict(ended), "idle_cpu": round(idle, 3)}
                    await trio.Path(out).write_text(json.dumps(result | {"lost": fleet.lost}, indent=1) + "\n")
                if hold:
                    await trio.sleep_forever()
            finally:
                process.terminate()
                process.wait()
                nursery.cancel_scope.cancel()


async def measured(bench: Bench) -> list[Row]:
    """Every kind of change."""
    return [
        await bench.measure("an endpoint of a Service fails", CHANGES, bench.endpoint_fails),
        await bench.measure("an AuthorizationPolicy changes", CHANGES, bench.policy_changes),
        await bench.measure("an authentication of a whole namespace changes", 50, bench.friends_change),
        await bench.measure("a Service's pods are all replaced", 50, bench.rollout),
        await bench.measure("a Service that everybody uses changes", 20, bench.popular_changes, 0.2),
    ]


async def idle_cpu(pid: int) -> float:
    before = usage(pid).cpu_s
    await trio.sleep(10)
    return (usage(pid).cpu_s - before) / 10


def start(folder: Path, credentials: Credentials, api: int, port: int, admin: int) -> subprocess.Popen[bytes]:
    """The controller's process."""
    (folder / "credentials").write_bytes(pickle.dumps(credentials))
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{api}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    kubeconfig = {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}], "current-context": "c"}
    (folder / "kubeconfig").write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **kubeconfig}))
    environment = {
        "PILLION_POLICY_SOURCE": "kubernetes",
        "PILLION_KUBECONFIG": str(folder / "kubeconfig"),
        "PILLION_POLICY_LISTEN": f"127.0.0.1:{port}",
        "PILLION_ADMIN_LISTEN": f"127.0.0.1:{admin}",
        "PILLION_IDENTITY_ADDR": "unused:1",
        "PILLION_IDENTITY_TOKEN_FILE": "/unused",
        "PILLION_TRUST_ANCHORS_FILE": "/unused",
        "PILLION_POD_NAME": "controller-0",
        "PILLION_WEBHOOK": "off",
        "PILLION_LOG_LEVEL": "warning",
    }
    program = [sys.executable, "-m", "bench.scale.controller", str(folder / "credentials")]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(program, env={**os.environ, **environment}, stdout=log, stderr=log)


async def ready(admin: int, process: subprocess.Popen[bytes]) -> None:
    """Until the controller says so, which it does once it knows everything."""
    while True:
        if process.poll() is not None:
            raise SystemExit(f"the controller ended with {process.returncode}")
        await trio.sleep(0.05)
        try:
            async with await trio.open_tcp_stream("127.0.0.1", admin) as stream:
                await stream.send_all(b"GET /ready HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
                if b" 200 " in await stream.receive_some(4096):
                    return
        except OSError:
            continue  # not listening yet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    size = Size()
    for name, value in asdict(size).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--hold", action="store_true", help="keep everything running afterwards, to look at it")
    chosen = vars(parser.parse_args())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536) if hard > soft else soft, hard))
    out, hold = chosen.pop("out"), chosen.pop("hold")
    trio.run(run, Size(**chosen), out, hold)


if __name__ == "__main__":
    main()
