"""wrk as the load: closed loop, one thread, requests from bench/load/varied.lua."""

from __future__ import annotations

import json
from pathlib import Path

from bench.measure import Outcome
from bench.peers import Peers
from bench.stage import Pod

LUA = Path(__file__).with_name("varied.lua")


def run(pod: Pod, peers: Peers, dial: tuple[str, int], *, connections: int, seconds: float) -> Outcome:
    """One round; the outcome's metrics are req/s and latencies in microseconds."""
    host, port = dial
    duration = max(1, round(seconds))
    command = [str(peers.wrk), "-t1", f"-c{connections}", f"-d{duration}s", "--timeout", "20s", "-s", str(LUA)]
    code, out, err = pod.output([*command, f"http://{host}:{port}/", "--", "service.bench.svc"], duration + 30)
    return parse(code, out, err)


def parse(code: int, out: str, err: str) -> Outcome:
    """Read the line of JSON that varied.lua printed."""
    line = next((line for line in out.splitlines() if line.startswith("{")), None)
    if code != 0 or line is None:
        return Outcome(0, 1, {}, f"wrk: exit {code}: {(err or out).strip()[-300:]}")
    said = json.loads(line)
    failed = sum(said[kind] for kind in ("connect", "read", "write", "status", "timeout"))
    done = said["requests"] - said["status"]
    metrics = {
        "throughput": done / (said["duration_us"] / 1e6),
        "latency_mean": said["mean_us"],
        "latency_p50": said["p50_us"],
        "latency_p99": said["p99_us"],
    }
    kinds = ", ".join(f"{kind} {said[kind]}" for kind in ("connect", "read", "write", "status", "timeout") if said[kind])
    return Outcome(done, failed, metrics, f"wrk errors: {kinds}" if failed else "")
