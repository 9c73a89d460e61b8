"""No container of a meshed pod starts before capture is proven, whatever is missing or restarted meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from injector.hold import HOLD_SOCKET
from tests.cluster.conftest import Ground
from tests.cluster.kube import Space, client, until
from tests.cluster.whole import whole

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

AGENTS = "--selector=app.kubernetes.io/component=agent"


@contextmanager
def no_agent(mesh: Space) -> Iterator[None]:
    """No node has one; what captures pods that run stays."""

    def select(node: dict[str, str | None]) -> None:
        change = {"spec": {"template": {"spec": {"nodeSelector": node}}}}
        mesh.run("patch", "daemonset", "pillion-agent", "--type=strategic", "-p", json.dumps(change))

    select({"pillion.dev/nowhere": "true"})
    try:
        until("no agent", lambda: not mesh.json("get", "pods", AGENTS)["items"])
        yield
    finally:
        select({"pillion.dev/nowhere": None})
        mesh.rolled_out("daemonset/pillion-agent")


def why_it_ended(space: Space) -> str:
    """What the sidecar said last, this time or the time before; a kubelet that was killed may not have told of the sidecar yet."""
    statuses = space.json("get", "pod", "client")["status"].get("initContainerStatuses", [])
    ends = [status[field].get("terminated", {}) for status in statuses for field in ("state", "lastState")]
    return "".join(end.get("message", "") for end in ends)


def assert_app_never_started(space: Space) -> None:
    (app,) = space.json("get", "pod", "client")["status"]["containerStatuses"]
    assert "waiting" in app["state"] and not app["lastState"] and app["restartCount"] == 0


def test_without_an_agent_a_pod_waits_and_says_why_and_starts_once_there_is_one(mesh: Space, space: Space) -> None:
    with no_agent(mesh):
        space.apply(client())
        until("the sidecar's reason", lambda: "not led to its sidecar" in why_it_ended(space))
        assert "a connection to 192.0.2.1 did not arrive" in why_it_ended(space)
        assert_app_never_started(space)
    space.ready("client")


def test_a_kubelet_that_is_restarted_before_capture_is_proven_does_not_start_the_app(mesh: Space, space: Space, ground: Ground) -> None:
    """It forgets the sidecar's hook, and takes a sidecar that runs for one that has started."""
    if ground.nodes is None:
        pytest.skip("needs the machines of the nodes")
    with no_agent(mesh):
        space.apply(client())
        uid = space.json("get", "pod", "client")["metadata"]["uid"]
        until("the sidecar has heard its hook", lambda: any(heard(hook) for hook in hooks(uid)))
        for node in ground.nodes.nodes:
            ground.nodes.stop(node, "kubelet", kill=True)
        try:
            until("the hook to be gone", lambda: not hooks(uid))
        finally:
            for node in ground.nodes.nodes:
                ground.nodes.again(node, "kubelet")
        until("the sidecar's reason", lambda: "postStart hook" in why_it_ended(space))
        assert_app_never_started(space)
    space.ready("client")
    whole(space, mesh)  # the new kubelets have called all their pods not ready


def heard(hook: Path) -> bool:
    """The sidecar is loaded and has accepted the hook's connection: before, a quick kubelet could be back sooner than a slow sidecar."""
    try:
        rows = [line.split() for line in (hook / "net" / "unix").read_text().splitlines()]
    except OSError:
        return False
    return any(row[-1] == HOLD_SOCKET.replace("\0", "@") and row[5] == "03" for row in rows)  # SS_CONNECTED


def hooks(uid: str) -> list[Path]:
    """Processes of this machine that hold the start of the pod with this uid."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                cgroups = (process / "cgroup").read_text()
            except OSError:
                continue
            if b"injector.hold" in words and b"runc" not in words[0] and f"pod{uid}" in cgroups:
                found.append(process)
    return found
