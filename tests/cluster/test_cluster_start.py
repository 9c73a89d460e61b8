"""How long a pod takes from its creation to Ready, with and without its sidecar, and how long the sidecar itself takes.

The bounds hold on a machine with nothing else to do; on a busy one set PILLION_SLOW to a factor.
"""

from __future__ import annotations

import os
import statistics
import time
from datetime import datetime

import pytest

from tests.cluster import kit
from tests.cluster.kube import OUTSIDE, Object, Space, container, pod, pod_spec

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

_SLOW = float(os.environ.get("PILLION_SLOW", "1"))
MORE_THAN_PLAIN_S = 1.5
EXEC_TO_READY_S = 0.5


def _seconds_to_ready(space: Space, shape: Object) -> float:
    """From `kubectl apply` to the condition Ready, asked every few milliseconds: the condition itself has whole seconds."""
    name = shape["metadata"]["name"]
    watch = ["wait", f"pod/{name}", "--for=condition=Ready", "--timeout=60s"]
    space.apply(shape)
    started = time.monotonic()
    space.run(*watch)
    return time.monotonic() - started


def _measured(space: Space, label: str, annotations: dict[str, str], rounds: int) -> list[float]:
    found = []
    for number in range(rounds):
        shape = pod(f"{label}-{number}", pod_spec(container(), terminationGracePeriodSeconds=0), annotations=annotations)
        found.append(_seconds_to_ready(space, shape))
        space.run("delete", "pod", shape["metadata"]["name"], "--wait=false")
    return found


def test_a_meshed_pod_is_ready_soon_after_a_plain_one(space: Space) -> None:
    _measured(space, "first", {}, 1)  # the node reads images and libraries for the first time
    plain, meshed = _measured(space, "plain", OUTSIDE, 5), _measured(space, "meshed", {}, 5)
    more = statistics.median(meshed) - statistics.median(plain)
    kit.say(f"create to Ready, median of 5: plain {statistics.median(plain):.2f} s, meshed {statistics.median(meshed):.2f} s")
    assert more <= MORE_THAN_PLAIN_S * _SLOW, (plain, meshed)


def test_the_sidecar_is_ready_soon_after_its_start(space: Space) -> None:
    """From exec, which the kernel knows, to the first certificate, which the sidecar's log says."""
    found = []
    for number in range(3):
        name = f"quick-{number}"
        space.apply(pod(name, pod_spec(container(), terminationGracePeriodSeconds=0)))
        space.ready(name)
        log = space.run("logs", name, "-c", "pillion-proxy").splitlines()
        certified = next(line for line in log if '"certified"' in line)
        moment = datetime.fromisoformat(certified.split('"timestamp":"')[1].split('"')[0]).timestamp()
        found.append(moment - space.metrics(name)["process_start_time_seconds"])
    kit.say(f"sidecar, exec to certified: {', '.join(f'{each:.2f}' for each in found)} s")
    assert min(found) <= EXEC_TO_READY_S * _SLOW, found
