"""h2load as the load for large HTTP/2 bodies: four connections with one stream each."""

from __future__ import annotations

import re

from bench.measure import Outcome
from bench.peers import Peers
from bench.stage import Pod

_CONNECTIONS = 4


def run(pod: Pod, peers: Peers, dial: tuple[str, int], *, size: int, up: bool, seconds: float) -> Outcome:
    """One round of about ``seconds`` seconds; a body that was begun is finished."""
    host, port = dial
    # Timing-based h2load counts only what completed within the time, so that large bodies would be lost at its end: a fixed number
    # instead, which a pair that moves 0.7 GB/s does in ``seconds``.
    count = max(2 * _CONNECTIONS, int(seconds * 0.7e9 / size))
    command = [str(peers.h2load), f"-c{_CONNECTIONS}", "-m1", "-w24", "-W28", f"-n{count}"]
    if up:
        body = pod.workdir / f"upload-{size}"
        if not body.exists():
            with body.open("wb") as file:
                file.truncate(size)
        command += ["-d", str(body)]
    target = f"http://{host}:{port}/blob/" + ("small" if up else str(size))
    return parse(*pod.output([*command, target], 60 + 20 * seconds), size if up else 0)


def parse(code: int, out: str, err: str, upload_bytes: int) -> Outcome:
    """Read h2load's report; ``upload_bytes`` is the size of each request's body, 0 to count the answers' bytes."""
    finished = re.search(r"finished in ([\d.]+)(us|ms|s)", out)
    requests = re.search(r"requests: .* (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", out)
    traffic = re.search(r"traffic: .*\((\d+)\) data", out)
    codes = re.search(r"status codes: (\d+) 2xx", out)
    if code != 0 or not (finished and requests and traffic and codes):
        return Outcome(0, 1, {}, f"h2load: exit {code}: {(err or out).strip()[-300:]}")
    seconds = float(finished[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[finished[2]]
    succeeded, failed = int(requests[1]), sum(int(requests[index]) for index in (2, 3, 4))
    failed += succeeded - int(codes[1])
    moved = succeeded * upload_bytes if upload_bytes else int(traffic[1])
    return Outcome(moved, failed, {"bandwidth": moved / seconds / 1e9}, f"h2load: {requests[0]}" if failed else "")
