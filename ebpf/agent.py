"""``pillion-agent`` (``python -m ebpf.agent``): captures the pods of a node, and shortens the hop between each app and its sidecar.

Stays small (under 20 MB): loading and trying is done by children that end (ebpf.prepare), the rest is system calls. Everything that
captures is pinned, so this process may die, restart and be replaced without a gap: pins and a state file say what there is. ``--remove``
brings the pods to nftables and leaves nothing of eBPF.

Capabilities, uid 0: NET_ADMIN (load, attach, nftables), SYS_ADMIN (enter network namespaces; mount the bpf file system where there is
none; contains BPF and PERFMON), SYS_PTRACE (pods' namespaces, and pidfd_getfd of sidecars' listeners), SYSLOG (the loader: kallsyms).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from core.runtime import memory
from core.runtime.private_socket import listen_privately
from ebpf import attach, layout, metrics, nft
from ebpf.maps import PinnedPrograms
from ebpf.plan import CONNECT, NFT_SOCKMAP, REFUSED, Ability, Choice, choose
from ebpf.pods import LOOK_AFTER_S, LOOK_AGAIN_S, Pods
from ebpf.resident import drop_file_pages
from ebpf.server import Delayed, HttpRequest, Server
from ebpf.wire import BadMessage, Register, Remove, Request, Status, Steer, Unregister

RUN = Path("/run/pillion")
ADMIN_PORT = 9991
_STEER_WITHIN_S = 10.0
_FORGET_EVERY_S = 10.0
_IN_FLIGHT_S = 1.0  # a connection that was captured just now: its sidecar has yet to ask for the original destination
_PREPARE_S = 180.0  # compiling takes half a second of an idle machine
_RUNGS = {"auto": (CONNECT, REFUSED), "ebpf": (CONNECT, CONNECT), "nft": (NFT_SOCKMAP, REFUSED)}


class Options(NamedTuple):
    """The command line. cgroup: where the programs of connections hang. node: the cluster node whose pods to watch, "" outside of one."""

    socket: Path = RUN / "agent.sock"
    state: Path = RUN / "agent.json"
    pins: Path = attach.DEFAULT_ROOT
    cgroup: Path | None = None
    admin: str = f"[::]:{ADMIN_PORT}"
    capture: str = "auto"
    node: str = ""
    ready_fd: int = -1


class CannotRun(RuntimeError):
    """Why there is no agent; the text says what to do."""


# --- what works here ---------------------------------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """programs: None when not even maps could be pinned. fingerprint, problems: see ebpf.prepare."""

    programs: PinnedPrograms | None
    ability: Ability
    fingerprint: str
    problems: list[str]


def load(options: Options, before: Mapping[str, Any]) -> Loaded:
    """Have the programs put in place, by a child (ebpf.prepare). Never raises for what is missing."""
    words = [sys.executable, "-m", "ebpf.prepare", "--pins", str(options.pins)]
    words += ["--cgroup", str(options.cgroup)] if options.cgroup else []
    folder = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(words, input=json.dumps(before).encode(), capture_output=True, timeout=_PREPARE_S, cwd=folder, check=False)
        if done.returncode:
            raise ValueError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
        found = json.loads(done.stdout)
        ability, mark, problems = Ability(**found["ability"]), str(found["fingerprint"]), list(found["problems"])
        programs = PinnedPrograms(options.pins) if mark else None
    except (OSError, ValueError, TypeError, KeyError, subprocess.TimeoutExpired) as error:
        said = f"the programs could not be put in place: {error}"
        programs, ability, mark, problems = None, Ability(said, said, said), "", [said]
    return Loaded(programs, ability._replace(nft=nft.problem()), mark, problems)


# --- state -------------------------------------------------------------------------------------------------------------------------------


def read_state(path: Path) -> dict[str, Any]:
    """What an agent before us wrote since the machine started; empty when there was none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Atomically, readable by root alone."""
    fresh = path.with_name(f".{path.name}.new")
    with open(fresh, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump(state, file)
    fresh.replace(path)


def lock(path: Path) -> TextIO:
    """The right to write pins; held as long as the returned file is open. Raises CannotRun."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # root's alone: whoever else could open it could hold it too, and keep us from starting
    file = open(  # noqa: SIM115 -- open as long as we live
        path.with_name(f"{path.name}.lock"), "w", encoding="ascii", opener=lambda name, flags: os.open(name, flags, 0o600)
    )
    os.fchmod(file.fileno(), 0o600)
    deadline = time.monotonic() + 5
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise CannotRun(f"another agent holds {file.name}; end it first") from None
            time.sleep(0.05)  # the one that we replace is on its way out


# --- the agent ---------------------------------------------------------------------------------------------------------------------------


class Agent:
    """Answers requests and keeps pods captured; `ebpf.server.Application`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        before = read_state(options.state)
        loaded = load(options, before)
        self.programs, self._loaded = loaded.programs, loaded
        lowest, highest = _RUNGS[options.capture]
        self.pods = Pods(loaded.programs, loaded.ability, lowest, highest, self._save)
        self.pods.restore(list(before.get("pods") or []))
        if self.programs is not None:
            self.programs.remove_older()
        self._save()
        self.server: Server | None = None
        self.cluster: Any = None
        self._looked = self._forgot = 0.0

    @property
    def best(self) -> Choice:
        """What a pod of this node can have."""
        return choose(self.pods.ability, lowest=self.pods.lowest, highest=self.pods.highest)

    def _save(self) -> None:
        loaded = self._loaded
        state: dict[str, Any] = {"fingerprint": loaded.fingerprint, "loaded": loaded.problems, "to_app": loaded.ability.to_app}
        state["pods"] = self.pods.records()
        write_state(self.options.state, state)

    def asked(self, request: Request, fds: list[int]) -> dict[str, Any] | Delayed:
        """See Application."""
        if isinstance(request, Register):
            return self._register(request, fds)
        if isinstance(request, Unregister):
            return {"ok": self.pods.unregister(request.id)}
        if isinstance(request, Steer):
            return self._steer(request.id)
        if isinstance(request, Remove):
            return self.remove()
        assert isinstance(request, Status)
        return {"ok": True, "node": self.node(), "pods": self.pods.status()}

    def _register(self, request: Register, fds: list[int]) -> dict[str, Any]:
        if len(fds) != 1:
            raise BadMessage("register needs one file descriptor: the pod's network namespace")
        try:
            pod = self.pods.register(request.pod, fds[0])
        except OSError as error:
            return {"ok": False, "error": f"the pod cannot be captured: {error}"}
        status = self.pods.pod_status(pod)
        if pod.choice.level == REFUSED:
            return {"ok": False, "error": f"nothing can capture this pod, so it must not start: {pod.message}", "pod": status}
        return {"ok": True, "pod": status}

    def _steer(self, pod_id: str) -> dict[str, Any] | Delayed:
        otherwise = {"ok": False, "error": "no sidecar listens in this pod"}

        def answer() -> dict[str, Any] | None:
            steered = self.pods.steered(pod_id)
            if steered is None:
                return {"ok": False, "error": f"no pod {pod_id} is registered"}
            return {"ok": True} if steered else None

        return answer() or Delayed(answer, _STEER_WITHIN_S, otherwise)

    def remove(self) -> dict[str, Any]:
        """Everything of eBPF goes, pods go on behind nftables; stays when one of them could not."""
        if stuck := self.pods.hand_over():
            return {"ok": False, "error": "these pods would lose their capture, so nothing was removed: " + "; ".join(stuck)}
        if self.programs is not None:
            time.sleep(_IN_FLIGHT_S)
            self.programs.remove_all()
            self.programs = self.pods.programs = None
        removed = "removed by --remove"
        self.pods.ability = self.pods.ability._replace(connect=removed, steer=removed, sockmap=removed)
        self.options.state.unlink(missing_ok=True)
        if self.server is not None:
            self.server.stop()
        return {"ok": True, "pods": len(self.pods.pods)}

    def got(self, request: HttpRequest) -> tuple[int, str, str]:
        """See Application: /live, /ready, /metrics, /status."""
        if request.method not in ("GET", "HEAD"):
            return 405, "text/plain", "only GET\n"
        if request.path == "/live":
            return 200, "text/plain", "live\n"
        if request.path == "/ready":
            ready = self.cluster is None or self.cluster.synced
            return (200, "text/plain", "ready\n") if ready else (503, "text/plain", "the pods of this node are not known yet\n")
        if request.path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", metrics.render(self.node(), self.pods.status())
        if request.path == "/status":
            return 200, "application/json", json.dumps({"node": self.node(), "pods": self.pods.status()}) + "\n"
        return 404, "text/plain", "not found\n"

    def node(self) -> dict[str, Any]:
        """level: the best rung here, level_name: in words. ability: part -> "" or what is missing."""
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        return {
            "level": self.best.level,
            "level_name": self.best.name,
            "kernel": os.uname().release,
            "layout": layout.VERSION,
            "ability": self.pods.ability._asdict(),
            "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
            "failures": self.pods.failures
            | ({"cluster": self.cluster.failure} if self.cluster is not None and self.cluster.failure else {}),
        }

    def tick(self) -> float:
        """See Application."""
        now = time.monotonic()
        pending = self.cluster.apply(self.pods) if self.cluster is not None else False
        every_s = LOOK_AGAIN_S if pending or self.pods.waiting() else LOOK_AFTER_S
        if now - self._looked >= every_s:
            self._looked = now
            self.pods.look_after()
        if now - self._forgot >= _FORGET_EVERY_S:
            self._forgot = now
            self.pods.forget_empty()
        return every_s


def run(options: Options) -> None:
    """Until SIGTERM, SIGINT or a Remove; raises CannotRun."""
    held = lock(options.state)
    agent = Agent(options)
    options.socket.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    listeners = [(listen_privately(options.socket, 16), False)]  # one of an agent that was killed may lie there; the lock is ours
    if options.admin:
        listeners.append((_admin_listener(options.admin), True))
    agent.server = server = Server(agent, listeners)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if options.node:
        from ebpf.cluster_pods import ClusterPods

        agent.cluster = ClusterPods(options.node, server.wake)
        agent.cluster.start()
    if options.ready_fd >= 0:
        os.write(options.ready_fd, json.dumps(agent.node()).encode() + b"\n")
        os.close(options.ready_fd)
    memory.settle()
    drop_file_pages()
    try:
        server.run()
    finally:
        server.close()
        for sock, _ in listeners:
            sock.close()
        options.socket.unlink(missing_ok=True)
        held.close()


def _admin_listener(text: str) -> socket.socket:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, dualstack_ipv6=host == "::", backlog=64)
    except (OSError, ValueError) as error:
        raise CannotRun(f"--admin {text}: {error}") from None


def remove(options: Options) -> None:
    """``--remove``: through the agent that runs, or, when none does, in its place. Raises CannotRun."""
    from ebpf import client

    try:
        answer = client.ask(options.socket, Remove(), timeout_s=120)
    except client.NoAgent:
        with lock(options.state):
            answer = _remove_alone(options)
    if not answer["ok"]:
        raise CannotRun(answer["error"])
    deadline = time.monotonic() + 10
    while options.socket.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    options.state.with_name(f"{options.state.name}.lock").unlink(missing_ok=True)


def _remove_alone(options: Options) -> dict[str, Any]:
    state = read_state(options.state)
    try:
        programs = PinnedPrograms(options.pins)
    except (attach.NotInstalled, OSError):
        programs = None
    pods = Pods(programs, Ability())
    pods.restore(list(state.get("pods") or []))
    if stuck := pods.hand_over():
        return {"ok": False, "error": "these pods would lose their capture, so nothing was removed: " + "; ".join(stuck)}
    time.sleep(_IN_FLIGHT_S)
    attach.remove(options.pins)
    options.state.unlink(missing_ok=True)
    options.socket.unlink(missing_ok=True)
    return {"ok": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 ended or removed, 1 cannot run, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m ebpf.agent",
        description="Captures the pods of this node.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=120),  # without a width argparse loads shutil, bz2 and lzma
    )
    defaults = Options()
    parser.add_argument("--socket", type=Path, default=defaults.socket, help="Unix socket for those who start pods")
    parser.add_argument("--state", type=Path, default=defaults.state, help="what a restart must know; must vanish when the machine starts")
    parser.add_argument("--pins", type=Path, default=defaults.pins, help="folder in a bpf file system")
    parser.add_argument("--cgroup", type=Path, help="where connections are captured: this cgroup and all below (default: the root)")
    parser.add_argument("--admin", default=defaults.admin, help="HOST:PORT of /metrics, /ready, /live, /status; empty for none")
    parser.add_argument("--capture", choices=list(_RUNGS), default=defaults.capture, help="auto: the best that works; nft: never by eBPF")
    parser.add_argument("--node", default=os.environ.get("PILLION_NODE_NAME", ""), help="watch the API server for pods of this node")
    parser.add_argument("--ready-fd", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--remove", action="store_true", help="bring pods to nftables, remove everything of eBPF, and end")
    asked = vars(parser.parse_args(arguments))
    wants_removal = asked.pop("remove")
    options = Options(**asked)
    try:
        if wants_removal:
            remove(options)
        else:
            run(options)
    except CannotRun as error:
        print(f"pillion-agent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
