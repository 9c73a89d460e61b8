"""The node's agent as a process of the runner: the same program that captures pods on Kubernetes. Called by local.supervisor.

Its bpf file system is mounted in the runner's own mount namespace: when the runner ends, however it ends, the mount goes, with it every
pin, and with those every program. Started again when it ends by itself; capture goes on meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from ebpf import client
from ebpf.plan import NAMES, NFT, REFUSED
from ebpf.wire import PodFacts, Register, Request, Status, Steer, Unregister
from local import namespaces

_READY_WITHIN_S = 90.0  # compiling takes half a second of an idle machine
_RESTART_S = 0.2
_FOLDER = "bpf"


class NotCaptured(RuntimeError):
    """The agent refused a pod; the text says why."""


@dataclass(frozen=True)
class Answer:
    """How a pod is captured. level, name: as in ebpf.plan."""

    level: int
    accelerated: bool
    message: str
    name: str


class NodeAgent:
    """The process, and talking to it. Use: `begin`, then `ready`; `run` in a task for ever; `end` last."""

    def __init__(self, state: Path, base_env: Mapping[str, str], capture: str) -> None:
        self.socket = state / "agent.sock"
        self._state, self._env, self._capture = state, base_env, capture
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1

    def begin(self) -> None:
        """Start the process; it is at work on its own."""
        folder = self._state / _FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        reading, self._pipe_write = os.pipe()
        words = [sys.executable, "-P", "-m", "ebpf.agent", "--socket", str(self.socket), "--state", str(self._state / "agent.json")]
        words += ["--pins", str(folder / "pillion"), "--admin", "", "--capture", self._capture, "--ready-fd", str(self._pipe_write)]
        (self._state / "logs").mkdir(mode=0o700, exist_ok=True)
        with open(self._state / "logs" / "agent.log", "ab") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(self._env), pass_fds=[self._pipe_write], cwd="/"
            )
        os.close(self._pipe_write)
        self._pipe = reading

    async def ready(self) -> dict[str, Any]:
        """What the node can do (ebpf.agent's ``node``), once the agent answers; ``level`` REFUSED and ``why`` when it does not."""
        said = b""
        with trio.move_on_after(_READY_WITHIN_S):
            while not said.endswith(b"\n"):
                await trio.lowlevel.wait_readable(self._pipe)
                chunk = os.read(self._pipe, 65536)
                if not chunk:
                    break
                said += chunk
        os.close(self._pipe)
        try:
            found: dict[str, Any] = json.loads(said)
        except ValueError:
            return {"level": REFUSED, "ability": {}, "why": f"the agent did not start; its log is {self._state}/logs/agent.log"}
        return found

    async def run(self) -> None:
        """Start it again whenever it ends."""
        while True:
            assert self._process is not None
            pidfd = os.pidfd_open(self._process.pid)
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
            self._process.wait()
            await trio.sleep(_RESTART_S)
            self.begin()
            await self.ready()

    def end(self) -> None:
        """End the process and unmount its file system: nothing captures any more, and the runner's folder can be removed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        folder = self._state / _FOLDER
        while os.path.ismount(folder):
            namespaces.unmount(str(folder), namespaces.MNT_DETACH)

    async def ask(self, request: Request, fds: tuple[int, ...] = ()) -> dict[str, Any]:
        """One request; raises ebpf.client.NoAgent."""
        return await trio.to_thread.run_sync(client.ask, self.socket, request, fds)

    async def capture(self, facts: PodFacts, pid: int) -> Answer:
        """Put capture in place in the namespace of a process; raises NotCaptured."""
        try:
            with namespaces.namespace_fds(pid, ["net"]) as (netns,):
                answer = await self.ask(Register(facts), (netns,))
        except client.NoAgent as error:
            raise NotCaptured(str(error)) from None
        if not answer["ok"]:
            raise NotCaptured(answer["error"])
        pod = answer["pod"]
        return Answer(pod["level"], pod["accelerated"], pod["message"], pod["level_name"])

    async def steer(self, pod_id: str) -> str:
        """Wait until what arrives reaches the sidecar; returns what is wrong, "" when it does."""
        try:
            answer = await self.ask(Steer(pod_id))
        except client.NoAgent as error:
            return str(error)
        return "" if answer["ok"] else str(answer["error"])

    async def release(self, pod_id: str) -> None:
        """The pod is gone. The agent would notice by itself."""
        try:
            await self.ask(Unregister(pod_id))
        except client.NoAgent:
            pass  # its next start notices

    async def status(self) -> dict[str, Any]:
        """Node and pods with their counters; raises ebpf.client.NoAgent."""
        return await self.ask(Status())


def describe(node: Mapping[str, Any]) -> str:
    """A note for people: how pods are captured here, and what keeps them from the best."""
    level = int(node["level"])
    why = str(node.get("why") or "; ".join(sorted({problem for problem in node["ability"].values() if problem})))
    name = NAMES[NFT] if level == REFUSED else node["level_name"]
    return f"capture: {name}" + (f" ({why})" if why else "")
