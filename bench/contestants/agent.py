"""The node's agent on a stage: the same program that captures pods on a node, attached to the stage's cgroup only."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.certs import NAMESPACE
from bench.stage import ROOT, Pod, Stage, StageError
from ebpf import bpfsys, client
from ebpf.wire import PodFacts, Register, Request, Steer

_READY_WITHIN_S = 60.0
_BEST = 1


class Agent:
    """Started at once; ends with the stage. Raises StageError when pods cannot be captured and accelerated."""

    def __init__(self, stage: Stage) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="agent-", dir=stage.workdir))
        self._socket = self._folder / "agent.sock"
        if stage.cgroup is None:
            raise StageError("eBPF capture needs a mounted cgroup2 hierarchy")
        stage.on_close.append(self.close)
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "ebpf.agent", "--socket", self._socket, "--state", self._folder / "agent.json"]
        command += ["--pins", self._folder / "bpf" / "pillion", "--cgroup", stage.cgroup, "--admin", "", "--capture", "ebpf"]
        (self._folder / "bpf").mkdir()
        self._log = self._folder / "agent.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*map(str, command), "--ready-fd", str(writing)], stdout=log, stderr=log, cwd=ROOT, pass_fds=[writing]
            )
        os.close(writing)
        self._wait_ready(reading)

    def _wait_ready(self, reading: int) -> None:
        said = b""
        with open(reading, "rb", buffering=0) as pipe:
            while not said.endswith(b"\n"):
                ready, _, _ = select.select([pipe], [], [], _READY_WITHIN_S)
                chunk = pipe.read(65536) if ready else b""
                if not chunk:
                    raise StageError(f"the agent did not start:\n{self._log.read_text()[-2000:]}")
                said += chunk
        node = json.loads(said)
        if node["level"] != _BEST:
            raise StageError(f"pods cannot be captured by eBPF here: {node.get('why') or node['ability']}")

    def capture(self, pod: Pod) -> None:
        """Capture what the pod's processes dial and what arrives for them."""
        with open(pod.ns_path, "rb") as netns:
            answer = self._ask(Register(PodFacts(id=pod.name, namespace=NAMESPACE, name=pod.name)), (netns.fileno(),))
        if not answer.get("ok") or not answer["pod"]["accelerated"]:
            raise StageError(f"{pod.name} is not captured and accelerated: {answer}")

    def steer(self, pod: Pod) -> None:
        """The pod's sidecar listens: lead what arrives to it."""
        answer = self._ask(Steer(pod.name))
        if not answer.get("ok"):
            raise StageError(f"what arrives at {pod.name} does not reach its sidecar: {answer}")

    def _ask(self, request: Request, fds: tuple[int, ...] = ()) -> dict[str, Any]:
        try:
            return client.ask(self._socket, request, fds)
        except client.NoAgent as error:
            raise StageError(str(error)) from None

    def close(self) -> None:
        """End it; with its mount everything that it loaded goes."""
        self._process.kill()
        self._process.wait()
        mount = self._folder / "bpf"
        while os.path.ismount(mount):
            bpfsys.unmount(mount)
