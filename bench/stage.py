"""Two pods and a control plane as anonymous network namespaces, and processes inside them.

Decides nothing about what is measured. A namespace lives only as long as the process that holds it, and that process dies with this
one (PR_SET_PDEATHSIG), as does every process started here: a benchmark that is killed leaves no namespace, link, rule or process.

    client pod 10.7.0.2 ==== veth ==== server pod 10.7.1.1 (.. one address per endpoint)      service 10.8.0.1:80
         10.9.0.2 \\________ bridge 10.9.0.1, control plane ________/ 10.9.0.3

Each contestant has a stage of its own, so that one contestant's redirect rules and connection tracking cost nobody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.limits import file_limit

ROOT = Path(__file__).resolve().parent.parent
CLIENT_IP = "10.7.0.2"
SERVICE_IP = "10.8.0.1"
SERVICE_PORT = 80
APP_PORT = 8080
OUTBOUND_PORT = 4140
INBOUND_PORT = 4143
CONTROL_IP = "10.9.0.1"
CLIENT_CONTROL_IP = "10.9.0.2"
SERVER_CONTROL_IP = "10.9.0.3"
PROXY_UID = 2102
"""The uid whose own connections are not redirected: every contestant's proxies run as this one."""

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class StageError(RuntimeError):
    """Namespaces, links, rules or a process could not be set up; the text names the command and what it said."""


@dataclass(frozen=True)
class Pinning:
    """Which cores each part of a stage runs on, the same for every contestant; None leaves all to the scheduler."""

    outbound: frozenset[int] | None = None
    inbound: frozenset[int] | None = None
    client: frozenset[int] | None = None
    server: frozenset[int] | None = None

    @classmethod
    def named(cls, name: str) -> Pinning:
        """``pods``: each pod with its proxy on cores of its own, as on two nodes. ``split``: both proxies on one core. ``none``."""
        cores = sorted(os.sched_getaffinity(0))
        first, last = frozenset(cores[:-1]), frozenset(cores[-1:])
        if len(cores) < 2 or name == "none":
            return cls()
        return cls(first, last, first, last) if name == "pods" else cls(last, last, first, first)

    def proxy(self, role: str) -> frozenset[int] | None:
        """Cores of the ``outbound`` or ``inbound`` proxy."""
        return self.outbound if role == "outbound" else self.inbound

    def describe(self) -> str:
        """One sentence for the report."""
        if None in (self.outbound, self.inbound, self.client, self.server):
            return "nothing is pinned"
        parts = ((role, ",".join(map(str, sorted(getattr(self, role))))) for role in ("client", "outbound", "inbound", "server"))
        return "pinned to cores: " + ", ".join(f"{role} {cores}" for role, cores in parts)


def endpoint_ips(count: int) -> tuple[str, ...]:
    """Addresses of the server pod, one for each endpoint; at most 50,000."""
    return tuple(f"10.7.{1 + index // 250}.{1 + index % 250}" for index in range(count))


def redirect_rules(*, outbound: bool, inbound: bool, exempt_ports: Sequence[int] = ()) -> str:
    """The nftables rules that send a pod's traffic through its proxy, the same for every contestant and the same as in the mesh."""
    skip = f"tcp dport {{ {', '.join(map(str, exempt_ports))} }} return" if exempt_ports else ""
    lines = ["table inet bench {"]
    if outbound:
        lines += [
            "  chain output { type nat hook output priority -100; policy accept;",
            f"    meta skuid {PROXY_UID} return",
            '    oifname { "lo", "ctl0" } return',
            f"    {skip}" if skip else "",
            f"    meta l4proto tcp redirect to :{OUTBOUND_PORT}",
            "  }",
        ]
    if inbound:
        lines += [
            "  chain prerouting { type nat hook prerouting priority -100; policy accept;",
            '    iifname { "lo", "ctl0" } return',
            f"    {skip}" if skip else "",
            f"    meta l4proto tcp redirect to :{INBOUND_PORT}",
            "  }",
        ]
    return "\n".join(line for line in [*lines, "}", ""] if line)


@dataclass
class Proc:
    """A process in a pod: its handle, and where its output goes."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def alive(self) -> bool:
        return self.popen.poll() is None

    def stop(self, grace_s: float = 2.0) -> None:
        """SIGTERM, then SIGKILL after ``grace_s``."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                self.popen.terminate()
            try:
                self.popen.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()

    def tail(self, lines: int = 15) -> str:
        """The end of what the process said, for error messages."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


def _enter(ns_path: str | None, uid: int | None, cores: frozenset[int] | None, cgroup: Path | None = None) -> Callable[[], None]:
    """What a child does between fork and exec: cgroup, new or given network namespace, cores, limits, uid, death with its parent."""
    parent, files = os.getpid(), file_limit()
    members = None if cgroup is None else str(cgroup / "cgroup.procs")

    def enter() -> None:
        if members is not None:
            handle = os.open(members, os.O_WRONLY)
            os.write(handle, b"0")
            os.close(handle)
        if ns_path is None:
            if _libc.unshare(_CLONE_NEWNET) != 0:
                os._exit(126)
        else:
            handle = os.open(ns_path, os.O_RDONLY)
            if _libc.setns(handle, _CLONE_NEWNET) != 0:
                os._exit(126)
            os.close(handle)
        if cores is not None:
            os.sched_setaffinity(0, cores)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if uid is not None:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        # After setuid, which clears it. The parent may have died in between: nobody would then send the signal.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(125)

    return enter


@contextlib.contextmanager
def _member_of(cgroup: Path | None) -> Iterator[None]:
    """This process in another cgroup for a moment: programs attached there see what it dials."""
    if cgroup is None:
        yield
        return
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    (cgroup / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (cgroup.parent / own.lstrip("/") / "cgroup.procs").write_text("0")


@dataclass
class Pod:
    """A network namespace, and what runs in it."""

    name: str
    workdir: Path
    holder: subprocess.Popen[bytes]
    cores: frozenset[int] | None
    cgroup: Path | None = None
    procs: list[Proc] = field(default_factory=list)

    @classmethod
    def create(cls, name: str, workdir: Path, cores: frozenset[int] | None, cgroup: Path | None = None) -> Pod:
        """Make an empty namespace with loopback up; raises StageError when the kernel or the user's rights do not allow it."""
        try:
            holder = subprocess.Popen(["sleep", "infinity"], preexec_fn=_enter(None, None, None), stdin=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            raise StageError(f"cannot make a network namespace ({error}): the benchmark needs root") from error
        pod = cls(name, workdir, holder, cores, cgroup)
        # Popen returns once exec succeeded, so the namespace exists; a failed unshare ends the process instead.
        if holder.poll() is not None:
            raise StageError("cannot make a network namespace: the benchmark needs root (CAP_SYS_ADMIN)")
        pod.run("ip", "link", "set", "lo", "up")
        pod.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=10240 65000", "net.core.somaxconn=65535")
        return pod

    @property
    def ns_path(self) -> str:
        return f"/proc/{self.holder.pid}/ns/net"

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a set-up command to its end; raises StageError with its output when it fails."""
        done = subprocess.run(
            command, input=stdin.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_enter(self.ns_path, None, None)
        )
        if done.returncode != 0:
            raise StageError(f"{self.name}: {' '.join(command)}: exit {done.returncode}: {done.stdout.decode(errors='replace').strip()}")
        return done.stdout.decode(errors="replace")

    def spawn(
        self,
        name: str,
        command: Sequence[str],
        *,
        uid: int | None = None,
        cores: frozenset[int] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Proc:
        """Start a process in this pod; its output goes to ``<workdir>/<pod>-<name>.log``."""
        log = self.workdir / f"{self.name}-{name}.log"
        with log.open("ab") as sink:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env} if env is not None else None,
                cwd=cwd,
                preexec_fn=_enter(self.ns_path, uid, cores or self.cores, self.cgroup),
            )
        proc = Proc(name, popen, log)
        self.procs.append(proc)
        return proc

    def output(self, command: Sequence[str], timeout_s: float) -> tuple[int, str, str]:
        """Run a load generator to its end: exit code, standard output, standard error; raises StageError on timeout."""
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            preexec_fn=_enter(self.ns_path, None, self.cores, self.cgroup),
        ) as popen:
            try:
                out, err = popen.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                popen.kill()
                raise StageError(f"{command[0]} did not end within {timeout_s:.0f} s") from None
        return popen.returncode, out.decode(errors="replace"), err.decode(errors="replace")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This process itself in the pod's network and cgroup, for small probes; the caller must not start threads meanwhile."""
        with open("/proc/self/ns/net", "rb") as home, open(self.ns_path, "rb") as there, _member_of(self.cgroup):
            if _libc.setns(there.fileno(), _CLONE_NEWNET) != 0:
                raise StageError(f"cannot enter the namespace of {self.name}: errno {ctypes.get_errno()}")
            try:
                yield
            finally:
                _libc.setns(home.fileno(), _CLONE_NEWNET)

    def close(self) -> None:
        """End every process of the pod, then the namespace."""
        for proc in reversed(self.procs):
            proc.stop()
        self.procs.clear()
        self.holder.kill()
        self.holder.wait()


class Stage:
    """A client pod and a server pod joined by a veth pair; a third namespace for a control plane on demand.

    cgroup: what every process of the stage is in, None where there is no unified hierarchy: programs attached to it concern this stage
    only. on_close: called, last added first, before the pods end.
    """

    def __init__(self, name: str, workdir: Path, pinning: Pinning, endpoints: int = 1) -> None:
        self.name = name
        self.workdir = workdir
        self.pinning = pinning
        self.endpoints = endpoint_ips(endpoints)
        self.on_close: list[Callable[[], None]] = []
        self._pods: list[Pod] = []
        self.cgroup = _make_cgroup(workdir.name)
        try:
            self.client = self._pod("client", pinning.client)
            self.server = self._pod("server", pinning.server)
            self._join()
        except BaseException:
            self.close()
            raise

    def _pod(self, name: str, cores: frozenset[int] | None) -> Pod:
        pod = Pod.create(name, self.workdir, cores, self.cgroup)
        self._pods.append(pod)
        return pod

    def _join(self) -> None:
        self.client.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(self.server.holder.pid))
        self.client.run("ip", "addr", "add", f"{CLIENT_IP}/32", "dev", "eth0")
        batch = "".join(f"addr add {ip}/16 dev eth0\n" for ip in self.endpoints)
        self.server.run("ip", "-batch", "-", stdin=batch)
        for pod in (self.client, self.server):
            pod.run("ip", "link", "set", "eth0", "up")
        # By way of one neighbour: a thousand endpoints on the link would overflow the kernel's neighbour table (1,024).
        self.client.run("ip", "route", "add", self.endpoints[0], "dev", "eth0")
        self.client.run("ip", "route", "add", "default", "via", self.endpoints[0], "src", CLIENT_IP)

    def control(self) -> Pod:
        """The namespace of a control plane, linked to both pods by links of its own."""
        pod = self._pod("control", self.pinning.client)
        pod.run("ip", "link", "add", "br0", "type", "bridge")
        pod.run("ip", "addr", "add", f"{CONTROL_IP}/24", "dev", "br0")
        pod.run("ip", "link", "set", "br0", "up")
        for index, (member, address) in enumerate(((self.client, CLIENT_CONTROL_IP), (self.server, SERVER_CONTROL_IP))):
            member.run("ip", "link", "add", "ctl0", "type", "veth", "peer", "name", f"p{index}", "netns", str(pod.holder.pid))
            pod.run("ip", "link", "set", f"p{index}", "master", "br0", "up")
            member.run("ip", "addr", "add", f"{address}/24", "dev", "ctl0")
            member.run("ip", "link", "set", "ctl0", "up")
        return pod

    def redirect(self, *, outbound: bool = True, inbound: bool = True, exempt_ports: Sequence[int] = ()) -> None:
        """Install the redirect in both pods; ``exempt_ports`` stay direct in both directions."""
        if outbound:
            self.client.run("nft", "-f", "-", stdin=redirect_rules(outbound=True, inbound=False, exempt_ports=exempt_ports))
        if inbound:
            self.server.run("nft", "-f", "-", stdin=redirect_rules(outbound=False, inbound=True, exempt_ports=exempt_ports))

    def close(self) -> None:
        """End everything; safe to call twice."""
        while self.on_close:
            self.on_close.pop()()
        while self._pods:
            self._pods.pop().close()
        if self.cgroup is not None:
            _remove_cgroup(self.cgroup)
            self.cgroup = None


def _make_cgroup(name: str) -> Path | None:
    """A cgroup of version 2 of our own, also beside version 1; one that is left when the benchmark is killed is empty and does nothing."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            path = Path(where) / f"pillion-bench-{name}"
            try:
                path.mkdir(exist_ok=True)
            except OSError:
                return None
            return path
    return None


def _remove_cgroup(path: Path) -> None:
    for _ in range(100):
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)  # a process that was killed leaves it a moment later


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float, procs: Sequence[Proc] = ()) -> float:
    """Poll ``condition`` until it holds and return the seconds it took; raises StageError with the log of a process that ended."""
    start = time.monotonic()
    while not condition():
        for proc in procs:
            if not proc.alive():
                raise StageError(f"{proc.name} ended with exit code {proc.popen.returncode}:\n{proc.tail()}")
        if time.monotonic() - start > timeout_s:
            logs = "\n".join(f"--- {proc.name}\n{proc.tail()}" for proc in procs)
            raise StageError(f"{what}: not within {timeout_s:.0f} s\n{logs}")
        time.sleep(0.01)
    return time.monotonic() - start
