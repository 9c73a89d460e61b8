"""The agent of a full node: its memory is what every node of a cluster pays, whatever it runs."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_lab import Lab, wait_for
from node_of_pods import ApiServer, Sandboxes

from ebpf import bpfsys
from ebpf.plan import CONNECT
from ebpf.wire import Status
from injector import fixed
from injector.patch import apply_patch, review

pytestmark = [pytest.mark.netns, pytest.mark.kernel, pytest.mark.slow]

PODS = 100  # the kubelet's own limit is 110
OWN_BYTES_MAX, RESIDENT_BYTES_MAX = 14_000_000, 20_000_000
"""The rest of what is resident are pages of files, the interpreter's first, which a node has once for all containers of an image."""
_numbers = itertools.count()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    found = Lab(tmp_path, f"pm{os.getpid() % 100000}{next(_numbers)}")
    try:
        yield found
    finally:
        found.close()


def _pod(number: int) -> dict[str, Any]:
    """What an API server has of an injected pod; managedFields and status are half of it."""
    raw = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"web-{number}",
            "namespace": "shop",
            "uid": str(uuid.uuid4()),
            "resourceVersion": "7",
            "annotations": {fixed.INJECT: "enabled"},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {f"f:field-{at}": {"f:value": {}} for at in range(120)}}],
        },
        "spec": {"containers": [{"name": "app", "image": "x", "env": [{"name": f"V{at}", "value": "x" * 40} for at in range(40)]}]},
        "status": {"phase": "Running", "conditions": [{"type": f"C{at}", "status": "True", "message": "x" * 60} for at in range(8)]},
    }
    _, patch = review(raw, {})
    return dict(apply_patch(raw, patch))


def _memory(pid: int) -> dict[str, int]:
    """Bytes, by the names of smaps_rollup."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in rows}


def test_the_agent_of_a_node_of_a_cluster_is_small(
    lab: Lab, tmp_path: Path, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pods = [_pod(number) for number in range(PODS)]
    server = ApiServer(pods, tmp_path / "account")
    sandboxes = Sandboxes((bpfsys.cgroup2() or Path("/nowhere")) / lab.name, [pod["metadata"]["uid"] for pod in pods])
    try:
        (tmp_path / "bpf").mkdir()
        bpfsys.mount_bpffs(tmp_path / "bpf")
        mounted = 'mount -t tmpfs none /run && mkdir -p "$2" && cp "$1"/* "$2" && shift 2 && exec "$@"'
        account = [str(tmp_path / "account"), "/run/secrets/kubernetes.io/serviceaccount"]
        lab.start("--node", "node-1", before=["env", *server.environ, "unshare", "--mount", "sh", "-c", mounted, "sh", *account])
        wait_for(lambda: len(lab.ask(Status())["pods"]) == PODS, "every pod is known", 120)
        wait_for(lambda: all(pod["listens"] for pod in lab.ask(Status())["pods"]), "every sidecar is led to", 120)
        assert server.watching.wait(30)
        status = lab.ask(Status())
        assert {pod["level"] for pod in status["pods"]} == {CONNECT}
        assert lab.agent is not None
        pid = lab.agent.pid
        wait_for(lambda: _memory(pid)["Rss"] < RESIDENT_BYTES_MAX, "the handshakes' pages are given back", 30)
        found = _memory(pid)
        said = lab.ask(Status())["node"]["resident_bytes"]
    finally:
        sandboxes.close()
        server.close()
    with capsys.disabled():
        for name in ("Rss", "Pss", "Anonymous"):
            record_property(f"agent, {PODS} pods, {name}", found[name])
            print(f"\n  the agent of a node with {PODS} pods, {name}: {found[name] / 1e6:.1f} MB", end="")
    assert found["Anonymous"] < OWN_BYTES_MAX
    assert abs(said - found["Rss"]) < 2_000_000, "the metric says what the kernel says; answering maps a page or two again"
