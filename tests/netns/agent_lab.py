"""A node for tests of the agent: two pods joined by a link, small sidecars that relay what they get, and the agent as a user starts it.

Everything has this process's name in it, the pins lie in a bpf file system of the test's own folder, and nothing of a machine's real agent
is touched. Processes in pods are started with ``ip netns exec``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from local_lab import PATIENCE_S, wait_until

from ebpf import bpfsys, client
from ebpf.wire import PodFacts, Register, Request, Status, Steer
from tests import traces

ROOT = Path(__file__).resolve().parents[2]
RELAY = Path(__file__).with_name("agent_relay.py")
SIDECAR_UID, APP_UID = 2102, 1000
APP_PORT = 8080
AGENT_CAPABILITIES = ("net_admin", "sys_admin", "sys_ptrace", "syslog")


def sh(*words: str) -> str:
    """A command that must succeed; its output."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


class TestPod:
    """A network namespace with a small sidecar and an app in it. number: 1 or 2, in the pod's addresses."""

    __test__ = False

    def __init__(self, lab: Lab, number: int) -> None:
        self.lab, self.number = lab, number
        self.name = f"{lab.name}{number}"
        self.ips = (f"10.119.0.{number}", f"fd77::{number}")
        self.id = f"uid-{number}"
        self.processes: list[subprocess.Popen[str]] = []
        sh("ip", "netns", "add", self.name)
        sh("ip", "-n", self.name, "link", "set", "lo", "up")

    def facts(self, **changed: Any) -> PodFacts:
        """As somebody registers it."""
        return PodFacts(self.id, "lab", f"pod-{self.number}", **{"addresses": self.ips, **changed})

    def register(self, **changed: Any) -> dict[str, Any]:
        """The agent's answer."""
        netns = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            return self.lab.ask(Register(self.facts(**changed)), (netns,))
        finally:
            os.close(netns)

    def spawn(self, uid: int, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """A process in the pod, as this user without capabilities; its standard output and input are pipes."""
        drop = ["--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]
        argv = ["ip", "netns", "exec", self.name, "setpriv", f"--reuid={uid}", f"--regid={uid}", *drop, *words]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self.processes.append(process)
        return process

    def relay(self) -> subprocess.Popen[str]:
        """The sidecar; returns once it listens."""
        process = self.spawn(SIDECAR_UID, sys.executable, str(RELAY), "sidecar")
        assert process.stdout is not None and process.stdout.readline() == "listening\n", process.communicate()
        return process

    def app(self) -> subprocess.Popen[str]:
        """An app that answers each line with who called it; returns once it listens."""
        process = self.spawn(APP_UID, sys.executable, str(RELAY), "app", str(APP_PORT))
        assert process.stdout is not None and process.stdout.readline() == "listening\n", process.communicate()
        return process

    def call(self, ip: str, port: int = APP_PORT, count: int = 1, patience_s: float = PATIENCE_S) -> list[dict[str, Any]]:
        """What an app of this pod sees of new connections to there, each with what it got back. patience_s: for each step of one."""
        process = self.spawn(APP_UID, sys.executable, str(RELAY), "call", ip, str(port), str(count), str(patience_s))
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return [json.loads(line) for line in out.splitlines()]

    def validate(self, within_s: float = 1.0) -> tuple[int, str]:
        """The validator's exit code and words."""
        env = {"PILLION_VALIDATE_WITHIN_S": str(within_s)}
        process = self.spawn(65532, sys.executable, "-S", str(ROOT / "ebpf" / "validator.py"), env=env)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def steer(self) -> dict[str, Any]:
        """Ask the agent to find the sidecar."""
        return self.lab.ask(Steer(self.id))

    def status(self) -> dict[str, Any]:
        """The agent's word about it."""
        return next(pod for pod in self.lab.ask(Status())["pods"] if pod["id"] == self.id)

    def rules(self) -> str:
        """Its nftables rules."""
        return sh("ip", "netns", "exec", self.name, "nft", "list", "ruleset")

    def end(self) -> None:
        """Everything in it, and the namespace."""
        for process in self.processes:
            process.kill()
            process.communicate()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


class Lab:
    """The node. Use `close` in every case."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.agent: subprocess.Popen[bytes] | None = None
        self.pods = [TestPod(self, 1), TestPod(self, 2)]
        one, two = self.pods
        sh("ip", "link", "add", f"{name}a", "netns", one.name, "type", "veth", "peer", "name", f"{name}b", "netns", two.name)
        for pod, link in ((one, f"{name}a"), (two, f"{name}b")):
            sh("ip", "-n", pod.name, "addr", "add", f"{pod.ips[0]}/24", "dev", link)
            sh("ip", "-n", pod.name, "addr", "add", f"{pod.ips[1]}/64", "dev", link, "nodad")
            sh("ip", "-n", pod.name, "link", "set", link, "up")
            gateway = "10.119.0.254", "fd77::ff"
            sh("ip", "-n", pod.name, "route", "add", "default", "via", gateway[0])
            sh("ip", "-n", pod.name, "-6", "route", "add", "default", "via", gateway[1])

    @property
    def pins(self) -> Path:
        """Where programs and maps are pinned."""
        return self.folder / "bpf" / "pillion"

    @property
    def socket(self) -> Path:
        """The agent's."""
        return self.folder / "agent.sock"

    def words(self, *more: str) -> list[str]:
        """The agent's command line."""
        paths = ["--socket", str(self.socket), "--state", str(self.folder / "agent.json"), "--pins", str(self.pins)]
        return [sys.executable, "-m", "ebpf.agent", *paths, "--admin", "", *more]

    def start(self, *more: str, before: Sequence[str] = ()) -> dict[str, Any]:
        """Start the agent, wait until it answers, return what the node can do. before: a command that runs it (setpriv, unshare)."""
        reading, writing = os.pipe()
        words = [*before, *self.words("--ready-fd", str(writing), *more)]
        with open(self.folder / "agent.log", "ab") as log:
            self.agent = subprocess.Popen(words, pass_fds=[writing], stdout=log, stderr=log, cwd=ROOT)
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            said = pipe.read()
        assert said, (self.folder / "agent.log").read_text()
        found: dict[str, Any] = json.loads(said)
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the agent; what it pinned stays."""
        assert self.agent is not None
        self.agent.send_signal(number)
        self.agent.wait(30)

    def ask(self, request: Request, fds: tuple[int, ...] = ()) -> dict[str, Any]:
        """One request."""
        return client.ask(self.socket, request, fds)

    def remove(self) -> subprocess.CompletedProcess[str]:
        """``--remove``."""
        return subprocess.run(self.words("--remove"), capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)

    def meshed(self) -> tuple[TestPod, TestPod]:
        """Both pods registered, with sidecars that are steered to, and an app in the second."""
        for pod in self.pods:
            assert pod.register()["ok"]
            pod.relay()
            assert pod.steer() == {"ok": True}
        self.pods[1].app()
        return self.pods[0], self.pods[1]

    def close(self) -> None:
        """Nothing is left of it."""
        traces.note(*(Path("/run/netns") / pod.name for pod in self.pods), pins=self.pins)
        for pod in self.pods:
            pod.end()
        if self.agent is not None and self.agent.poll() is None:
            self.kill()
        while os.path.ismount(self.folder / "bpf"):
            with suppress(OSError):
                bpfsys.unmount(self.folder / "bpf")


class Load:
    """Connections one after the other from a pod's app to another one, in a process of their own, until `stop`."""

    def __init__(self, pod: TestPod, ip: str, patience_s: float = PATIENCE_S) -> None:
        self._process = pod.spawn(APP_UID, sys.executable, str(RELAY), "load", ip, str(APP_PORT), str(patience_s))
        assert self._process.stdout is not None and self._process.stdout.readline() == "loading\n"

    def stop(self) -> tuple[int, int, bool]:
        """(connections, of those failed, whether the one that was held all the time still works)."""
        assert self._process.stdin is not None
        out, errors = self._process.communicate("stop\n", timeout=120)
        assert self._process.returncode == 0, errors
        found = json.loads(out.splitlines()[-1])
        return found["connections"], found["failed"], found["held"]


def wait_for(condition: Any, what: str, timeout_s: float = PATIENCE_S) -> None:
    """`local_lab.wait_until`."""
    wait_until(condition, what, timeout_s)


def port_is_free(port: int) -> bool:
    """Nobody listens here."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0
