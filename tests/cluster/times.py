"""How long pods take from creation to Ready, with and without their sidecar, and the sidecar itself: ``python -m tests.cluster times``.

It prints and asserts nothing: what a machine takes is no property of the code. Plain and meshed pods take turns, so that both meet the
same machine. Pods begin at moments that are spread evenly over a second: a kubelet looks at its containers once a second, and a pod that
begins right after the one before was seen Ready always meets the same moment.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from datetime import datetime

from tests.cluster.kube import OUTSIDE, Kube, Refused, Space, container, pod, pod_spec, until

KINDS = {"plain": OUTSIDE, "meshed": {}, "meshed, capture by init container": {"config.pillion.dev/capture": "init"}}
STEPS = ("listening", "capture proven", "certified", "ready")
"""What the sidecar logs on its way, in the usual order."""


def seconds_to_ready(space: Space, name: str, annotations: dict[str, str]) -> float:
    """From `kubectl apply` to the condition Ready, as a watch shows it: the condition itself has whole seconds."""
    shape = pod(name, pod_spec(container(), terminationGracePeriodSeconds=0), annotations=annotations)
    started = time.monotonic()
    space.apply(shape)
    space.run("wait", f"pod/{name}", "--for=condition=Ready", "--timeout=60s")
    return time.monotonic() - started


def sidecar_steps(space: Space, name: str) -> dict[str, float]:
    """Seconds from exec, which the kernel knows, to what the sidecar says in its log."""
    started = space.metrics(name)["process_start_time_seconds"]
    lines = map(json.loads, space.run("logs", name, "-c", "pillion-proxy").splitlines())
    said = {line["event"]: datetime.fromisoformat(line["timestamp"]).timestamp() - started for line in lines}
    return {step: said[step] for step in STEPS if step in said}


def show(kube: Kube, rounds: int) -> None:
    """Print medians and the slowest; makes a namespace and deletes it."""
    name = f"times-{time.monotonic_ns() % 10**6}"
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": {"pillion.dev/inject": "enabled"}}})
    space = Space(kube, name)
    try:
        until("the namespace's service account", lambda: space.json("get", "serviceaccounts")["items"])
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        steps: list[dict[str, float]] = []
        for number in range(-1, rounds):  # in the first one the node reads images and libraries for the first time
            for place, (kind, annotations) in enumerate(KINDS.items()):
                made = f"pod-{place}-{number + 1}"
                time.sleep(max(number, 0) / rounds)
                seconds = seconds_to_ready(space, made, annotations)
                if number >= 0:
                    taken[kind].append(seconds)
                    steps += [sidecar_steps(space, made)] if kind == "meshed" else []
                space.run("delete", "pod", made, "--wait=false")
        plain = statistics.median(taken["plain"])
        print(f"create to Ready, {rounds} rounds:")
        for kind, found in taken.items():
            print(f"  {kind}: {_summary(found)}, {statistics.median(found) - plain:+.2f} s against plain")
        print("sidecar, from its exec:")
        for step in STEPS:
            print(f"  {step}: {_summary([each[step] for each in steps if step in each])}")
    finally:
        try:
            kube.run("delete", "namespace", name, "--wait=false")
        except Refused as refused:
            print(refused)


def _summary(found: Sequence[float]) -> str:
    return f"median {statistics.median(found):.2f} s, {min(found):.2f} to {max(found):.2f} s" if found else "never"
