"""``pillion-agent`` (``python -m ebpf.agent``): captures the pods of a node, and shortens the hop between each app and its sidecar.

Stays small (under 20 MB): compiling is done by a child that ends (ebpf.loader), the rest is system calls. Everything that captures is
pinned, so this process may die, restart and be replaced without a gap: pins and a state file say what there is. ``--remove`` brings the
pods to nftables and leaves nothing of eBPF.

Capabilities, uid 0: NET_ADMIN (load, attach, nftables), SYS_ADMIN (enter network namespaces; mount the bpf file system where there is
none; contains BPF and PERFMON), SYS_PTRACE (pods' namespaces, and pidfd_getfd of sidecars' listeners), SYSLOG (the loader: kallsyms).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ebpf import attach, bpfsys, layout, loader, metrics, nft, probe
from ebpf.maps import PinnedPrograms
from ebpf.plan import CONNECT, NFT_SOCKMAP, REFUSED, Ability, choose
from ebpf.pods import LOOK_AFTER_S, LOOK_AGAIN_S, Pods
from ebpf.server import Delayed, HttpRequest, Server
from ebpf.wire import BadMessage, Register, Remove, Request, Status, Steer, Unregister

RUN = Path("/run/pillion")
ADMIN_PORT = 9991
_STEER_WITHIN_S = 10.0
_FORGET_EVERY_S = 10.0
_IN_FLIGHT_S = 1.0  # a connection that was captured just now: its sidecar has yet to ask for the original destination
_SYS_PTRACE = 19
_CLONE_NEWNET = 0x40000000
_RUNGS = {"auto": (CONNECT, REFUSED), "ebpf": (CONNECT, CONNECT), "nft": (NFT_SOCKMAP, REFUSED)}
_CONNECT = [program.name for program in layout.CGROUP_PROGRAMS if program.name != "sockops"]


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
    """programs: None when not even maps could be pinned. fingerprint: of the sources they were made from.

    problems: of loading them, "" for what worked.
    """

    programs: PinnedPrograms | None
    ability: Ability
    fingerprint: str
    problems: list[str]


def fingerprint() -> str:
    """Changes with the programs, the layout and the kernel: the same one means that what is pinned is what would be loaded.

    Against confusion, not against forgery: whoever can write pins or state is root. hashlib would cost 4 MB (libcrypto).
    """
    found = zlib.crc32(f"{layout.VERSION} {os.uname().release}".encode())
    for path in sorted((Path(__file__).resolve().parent / "bpf").iterdir()):
        found = zlib.crc32(path.name.encode() + path.read_bytes(), found)
    return f"{found:08x}"


def load(options: Options, before: Mapping[str, Any]) -> Loaded:
    """Take over what is pinned when it is ours and complete, else load; try what can only be tried. Never raises for what is missing."""
    ours = fingerprint()
    no_rules = nft.problem()
    root = options.pins
    try:
        attach.prepare(root)
    except OSError as error:
        problem = f"there is no bpf file system at {root.parent}, and it cannot be mounted: {os.strerror(error.errno or 0)}"
        return Loaded(None, Ability(problem, problem, problem, no_rules), "", [problem])
    if before.get("fingerprint") == ours and not any(before.get("loaded") or ["unknown"]):
        # everything worked for the agent before us; what failed is tried again at every start
        with contextlib.suppress(attach.NotInstalled, OSError):
            programs = PinnedPrograms(root)
            return Loaded(programs, _really(programs, Ability(nft=no_rules), options), ours, list(before["loaded"]))
    try:
        report = loader.install(root)
    except (loader.LoaderFailed, OSError, subprocess.TimeoutExpired) as error:
        report = loader.Report(os.uname().release, problem=f"the loader failed: {error}")
    tried = probe.find()  # a program that loads may still not keep what it promises on this kernel
    ability = Ability(
        report.why_not(_CONNECT) or tried.connect,
        report.why_not(["inbound"]) or tried.steer,
        report.why_not(["sockops", "redirect"]) or tried.sockmap,
        no_rules,
    )
    try:
        programs = PinnedPrograms(root)
    except (attach.NotInstalled, OSError) as error:
        problem = report.problem or str(error)
        return Loaded(None, Ability(problem, problem, problem, no_rules), "", [problem])
    return Loaded(programs, _really(programs, ability, options), ours, list(ability[:3]))


def _really(programs: PinnedPrograms, ability: Ability, options: Options) -> Ability:
    """Attach: what was loaded may still be refused its place."""
    cgroup = options.cgroup or bpfsys.cgroup2()
    if not ability.connect and not ability.sockmap:
        try:
            if cgroup is None:
                raise OSError("no unified cgroup hierarchy (cgroup2) is mounted")
            programs.attach_node(cgroup)
            programs.upgrade()
        except OSError as error:
            ability = ability._replace(connect=f"the programs cannot be attached to {cgroup}: {error}")
    if not ability.steer:
        ability = ability._replace(steer=_steering_problem(programs) or _listener_problem())
    return ability


def _steering_problem(programs: PinnedPrograms) -> str:
    """Attach sk_lookup to a namespace of our own, which is gone afterwards."""
    found: list[str] = []

    def trial() -> None:
        try:
            _unshare_network()
            netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                cookie = bpfsys.netns_cookie()
                programs.steer(cookie, netns)
                programs.leave(cookie)
            finally:
                os.close(netns)
        except OSError as error:
            found.append(f"sk_lookup cannot be attached to a network namespace: {error}")

    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    return found[0] if found else ""


def _unshare_network() -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _listener_problem() -> str:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next((int(line.split()[1], 16) for line in file if line.startswith("CapEff:")), 0)
    return "" if effective >> _SYS_PTRACE & 1 else "sidecars' listeners cannot be taken (pidfd_getfd): the agent needs CAP_SYS_PTRACE"


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
    file = open(path.with_name(f"{path.name}.lock"), "w", encoding="ascii")  # noqa: SIM115 -- open as long as we live
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
    def level(self) -> int:
        """The best rung of this node."""
        return choose(self.pods.ability, lowest=self.pods.lowest, highest=self.pods.highest).level

    def _save(self) -> None:
        loaded = self._loaded
        state = {"fingerprint": loaded.fingerprint, "loaded": loaded.problems, "pods": self.pods.records()}
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
        """level: the best rung here. ability: part -> "" or what is missing."""
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        return {
            "level": self.level,
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
    listeners = [(_unix_listener(options.socket), False)]
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
    try:
        server.run()
    finally:
        server.close()
        for sock, _ in listeners:
            sock.close()
        options.socket.unlink(missing_ok=True)
        held.close()


def _unix_listener(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of an agent that was killed; the lock is ours
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(16)
    return listener


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
    parser = argparse.ArgumentParser(prog="python -m ebpf.agent", description="Captures the pods of this node.", allow_abbrev=False)
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
