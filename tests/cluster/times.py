"""How long pods take from creation to Ready, with and without their sidecar, and the sidecar itself: ``python -m tests.cluster times``.

It prints and asserts nothing: what a machine takes is no property of the code.
"""

from __future__ import annotations

import statistics
import time
from datetime import datetime

from tests.cluster.kube import OUTSIDE, Kube, Object, Refused, Space, container, pod, pod_spec, until


def seconds_to_ready(space: Space, shape: Object) -> float:
    """From `kubectl apply` to the condition Ready, asked every few milliseconds: the condition itself has whole seconds."""
    name = shape["metadata"]["name"]
    watch = ["wait", f"pod/{name}", "--for=condition=Ready", "--timeout=60s"]
    space.apply(shape)
    started = time.monotonic()
    space.run(*watch)
    return time.monotonic() - started


def measured(space: Space, label: str, annotations: dict[str, str], rounds: int) -> list[float]:
    found = []
    for number in range(rounds):
        shape = pod(f"{label}-{number}", pod_spec(container(), terminationGracePeriodSeconds=0), annotations=annotations)
        found.append(seconds_to_ready(space, shape))
        space.run("delete", "pod", shape["metadata"]["name"], "--wait=false")
    return found


def sidecar_start(space: Space, number: int) -> float:
    """From exec, which the kernel knows, to the first certificate, which the sidecar's log says."""
    name = f"quick-{number}"
    space.apply(pod(name, pod_spec(container(), terminationGracePeriodSeconds=0)))
    space.ready(name)
    log = space.run("logs", name, "-c", "pillion-proxy").splitlines()
    certified = next(line for line in log if '"certified"' in line)
    moment = datetime.fromisoformat(certified.split('"timestamp":"')[1].split('"')[0]).timestamp()
    return moment - space.metrics(name)["process_start_time_seconds"]


def show(kube: Kube, rounds: int = 5) -> None:
    """Print medians; makes a namespace and deletes it."""
    name = f"times-{time.monotonic_ns() % 10**6}"
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": {"pillion.dev/inject": "enabled"}}})
    space = Space(kube, name)
    try:
        until("the namespace's service account", lambda: space.json("get", "serviceaccounts")["items"])
        measured(space, "first", {}, 1)  # the node reads images and libraries for the first time
        plain, meshed = measured(space, "plain", OUTSIDE, rounds), measured(space, "meshed", {}, rounds)
        print(f"create to Ready, median of {rounds}: plain {statistics.median(plain):.2f} s, meshed {statistics.median(meshed):.2f} s")
        starts = [sidecar_start(space, number) for number in range(rounds)]
        print(f"sidecar, exec to certified, median of {rounds}: {statistics.median(starts):.2f} s, best {min(starts):.2f} s")
    finally:
        try:
            kube.run("delete", "namespace", name, "--wait=false")
        except Refused as refused:
            print(refused)
