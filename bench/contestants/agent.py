"""The node's agent on a stage: the same program that captures pods on a node, attached to the stage's cgroup only."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.certs import NAMESPACE
from bench.stage import ROOT, Pod, Stage, StageError
from ebpf import bpfsys, client
from ebpf.plan import CONNECT, NFT, NFT_SOCKMAP
from ebpf.wire import PodFacts, Register, Request, Status, Steer

_READY_WITHIN_S = 60.0


@dataclass(frozen=True)
class Led:
    """How an agent leads pods. capture: by what; accelerate: whether messages between app and sidecar go past TCP."""

    capture: Literal["ebpf", "nft"] = "ebpf"
    accelerate: bool = True

    @property
    def level(self) -> int:
        """The rung of the ladder that a pod is then on."""
        return CONNECT if self.capture == "ebpf" else NFT_SOCKMAP if self.accelerate else NFT


class Agent:
    """Started at once; ends with the stage. Raises StageError when pods cannot be led as they should be."""

    def __init__(self, stage: Stage, led: Led) -> None:
        self._led = led
        self._folder = Path(tempfile.mkdtemp(prefix="agent-", dir=stage.workdir))
        self._socket = self._folder / "agent.sock"
        if stage.cgroup is None:
            raise StageError("eBPF capture needs a mounted cgroup2 hierarchy")
        stage.on_close.append(self.close)
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "ebpf.agent", "--socket", self._socket, "--state", self._folder / "agent.json"]
        command += ["--pins", self._folder / "bpf" / "pillion", "--cgroup", stage.cgroup, "--admin", "", "--capture", led.capture]
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
        if node["level"] > self._led.level:
            raise StageError(f"pods cannot be on level {self._led.level} here: {node.get('why') or node['ability']}")

    def capture(self, pod: Pod) -> None:
        """Capture what the pod's processes dial and what arrives for them."""
        facts = PodFacts(id=pod.name, namespace=NAMESPACE, name=pod.name, accelerate=self._led.accelerate)
        with open(pod.ns_path, "rb") as netns:
            answer = self._ask(Register(facts), (netns.fileno(),))
        has = (answer["pod"]["level"], answer["pod"]["accelerated"]) if answer.get("ok") else None
        if has != (self._led.level, self._led.accelerate):
            raise StageError(f"{pod.name} is not led as {self._led} says: {answer}")

    def steer(self, pod: Pod) -> None:
        """The pod's sidecar listens: lead what arrives to it."""
        answer = self._ask(Steer(pod.name))
        if not answer.get("ok"):
            raise StageError(f"what arrives at {pod.name} does not reach its sidecar: {answer}")

    def redirected(self) -> dict[str, int]:
        """The messages of each pod that went past TCP so far."""
        return {pod["id"]: pod["counters"].get("messages", 0) for pod in self._ask(Status())["pods"]}

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
