"""Pods of one network namespace and one cgroup each, under programs that were loaded for these tests alone.

A lab has a bpf file system of its own, so that neither an agent on this machine nor another test run meets its pins, and attaches at the
cgroups of its pods, so that nobody else's sockets run its programs. Closing it leaves nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebpf import attach, bpfsys, layout, loader
from ebpf.layout import Counter, PodFlag
from tests import traces

APP_UID, SIDECAR_UID = 1000, 2102
OUT_PORT, IN_PORT = 4140, 4143
TARGET = "10.99.9.9"
"""An address that nobody has: a connection that reaches anybody was captured."""
CAPTURED = PodFlag.CAPTURE | PodFlag.CALLER
ACCELERATED = CAPTURED | PodFlag.ACCELERATE
SCALE = float(os.environ.get("PILLION_KERNEL_SCALE") or 1)
"""Rounds and bytes times this: a guest without hardware virtualization is ten times slower."""

PATIENCE_S = 30.0 if SCALE >= 1 else 120.0
"""How long a step may take that should come at once: on a machine with more to do than processors, seconds pass before one's turn comes."""

_numbers = itertools.count(1)


def rounds(number: int) -> int:
    """So many rounds, or fewer on a slow kernel."""
    return max(20, int(number * SCALE))


def sysctl(name: str, value: str) -> None:
    """Of the namespace that one is in."""
    Path("/proc/sys/net/ipv4", name).write_text(value, encoding="ascii")


class Failed(AssertionError):
    """What went wrong inside a pod, as text."""


class Process:
    """A function running inside a pod, which may say something once (its first result) and is killed at the end."""

    def __init__(self, pod: LabPod, uid: int, function: Callable[..., Any], args: Sequence[Any]) -> None:
        reader, writer = os.pipe()
        self.name = function.__name__
        self.pid = os.fork()
        if not self.pid:
            os.close(reader)
            _child(pod, uid, writer, function, args)
        os.close(writer)
        self._reader = reader

    def result(self, seconds: float = 4 * PATIENCE_S) -> Any:
        """What the function returned or told; raises Failed with its traceback, also when it is silent for too long."""
        data = b""
        end = time.monotonic() + seconds
        while True:
            if not select.select([self._reader], [], [], max(0.0, end - time.monotonic()))[0]:
                self.kill()
                raise Failed(f"{self.name}: hung, nothing for {seconds:g} s")
            piece = os.read(self._reader, 1 << 16)
            data += piece
            if not piece or data.endswith(_END):
                break
        if not data:
            raise Failed(f"{self.name}: died without a word")
        good, value = pickle.loads(data.removesuffix(_END))
        if not good:
            raise Failed(f"{self.name}: {value}")
        return value

    def kill(self) -> None:
        """End it, also when it ended already."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._reader)
            self.pid = 0


_END = b"<end>"


def _child(pod: LabPod, uid: int, writer: int, function: Callable[..., Any], args: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def tell(value: Any, *, good: bool = True) -> None:
        os.write(writer, pickle.dumps((good, value)) + _END)

    try:
        pod.enter(uid)
        wanted = function.__annotations__.get("tell")
        value = function(*args, tell) if wanted else function(*args)
        if not wanted:
            tell(value)
    except BaseException:
        tell(traceback.format_exc(), good=False)
    os._exit(0)


class LabPod:
    """A namespace and a cgroup. relay: a sidecar that takes what is captured and dials the same port of the pod."""

    def __init__(self, node: attach.Node, name: str) -> None:
        self.node = node
        self.name = name
        self.running: list[Process] = []
        self.popened: list[subprocess.Popen[bytes]] = []
        self.cgroup = (bpfsys.cgroup2() or Path("/nowhere")) / name
        self.cgroup.mkdir()
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
        with self._netns() as netns:
            self.cookie = bpfsys.netns_cookie(netns)
        traces.note(self.cgroup, Path("/run/netns") / name)

    @contextlib.contextmanager
    def _netns(self) -> Iterator[int]:
        fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def attach(self, flags: PodFlag, ips: tuple[str, ...] = (), *, inbound: bool = False) -> None:
        """Register and attach as the agent does."""
        self.node.write_pod(self.cookie, layout.Pod(SIDECAR_UID, flags, OUT_PORT, IN_PORT, ips))
        fd = os.open(self.cgroup, os.O_RDONLY)
        try:
            self.node.link_cgroup(fd, self.name)
        finally:
            os.close(fd)
        if inbound:
            with self._netns() as netns:
                self.node.link_netns(self.cookie, netns)

    def enter(self, uid: int) -> None:
        """Take the calling process into the pod."""
        (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))
        with self._netns() as netns:
            bpfsys.enter_netns(netns)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    def start(self, function: Callable[..., Any], *args: Any, uid: int = APP_UID) -> Process:
        """Run a function in a process of its own inside the pod. One with a parameter ``tell`` reports through it and goes on."""
        process = Process(self, uid, function, args)
        self.running.append(process)
        return process

    def run(self, function: Callable[..., Any], *args: Any, uid: int = APP_UID, seconds: float = 4 * PATIENCE_S) -> Any:
        """The same, until it returns."""
        return self.start(function, *args, uid=uid).result(seconds)

    def popen(self, words: Sequence[str], *, uid: int = APP_UID, **more: Any) -> subprocess.Popen[bytes]:
        """Start a program inside the pod."""
        process: subprocess.Popen[bytes] = subprocess.Popen(words, preexec_fn=lambda: self.enter(uid), **more)
        self.popened.append(process)
        return process

    def output(self, words: Sequence[str], *, uid: int = APP_UID, seconds: float = 4 * PATIENCE_S, **more: Any) -> bytes:
        """What a program writes to standard output; raises Failed for another exit code than 0."""
        process = self.popen(words, uid=uid, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f"{words[0]}: hung") from None
        if process.returncode:
            raise Failed(f"{words[0]}: exit code {process.returncode}: {(err or out).decode(errors='replace')[-2000:]}")
        return out

    def wait_port(self, port: int, host: str = "127.0.0.1", seconds: float = 2 * PATIENCE_S) -> None:
        """Until somebody listens there."""
        self.run(_wait_port, host, port, seconds, seconds=seconds + 5)

    def counts(self) -> dict[Counter, int]:
        """The pod's counters."""
        return self.node.counters(self.cookie)

    def close(self) -> None:
        """Kill what runs, and leave nothing."""
        for process in self.running:
            process.kill()
        for popened in self.popened:
            with contextlib.suppress(ProcessLookupError):
                popened.kill()
            popened.wait()
            for stream in (popened.stdin, popened.stdout, popened.stderr):
                if stream:
                    stream.close()
        attach._detach(self.node.pins.cgroups / self.name)
        self.node.forget(self.cookie)
        _ip("netns", "del", self.name)
        (self.cgroup / "cgroup.kill").write_text("1")
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.cgroup.rmdir()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)


def _wait_port(host: str, port: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


class Lab:
    """Programs loaded into a bpf file system of their own. folder: where other program sources lie, for fixtures that must fail."""

    def __init__(self, limits: Mapping[str, int] | None = None, folder: Path | None = None) -> None:
        self._mount = Path(tempfile.mkdtemp(prefix="pillion-bpffs-"))
        bpfsys.mount_bpffs(self._mount)
        self.root = self._mount / "pillion"
        self.pods: list[LabPod] = []
        self.report = loader.install(self.root, limits, folder=folder, seconds=4 * PATIENCE_S)
        self.node = attach.Node(attach.Pins(self.root))

    def pod(self) -> LabPod:
        """A new pod with nothing attached."""
        pod = LabPod(self.node, f"ptk{os.getpid()}-{next(_numbers)}")
        self.pods.append(pod)
        return pod

    def close_pods(self) -> None:
        """After each test."""
        while self.pods:
            self.pods.pop().close()

    def close(self) -> None:
        """Leave nothing."""
        traces.note(self._mount, pins=self.root)
        self.close_pods()
        self.node.close()
        attach.remove(self.root)
        bpfsys.unmount(self._mount)
        self._mount.rmdir()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"ip {' '.join(words)}: {done.stderr}")


def join(one: LabPod, other: LabPod, network: int) -> None:
    """A cable between two pods: 10.98.<network>.1 and .2, fd98:<network>::1 and ::2."""
    a, b = f"k{os.getpid()}a{network}", f"k{os.getpid()}b{network}"
    _ip("link", "add", a, "netns", one.name, "type", "veth", "peer", "name", b, "netns", other.name)
    for pod, device, host in ((one, a, 1), (other, b, 2)):
        _ip("-n", pod.name, "addr", "add", f"10.98.{network}.{host}/24", "dev", device)
        _ip("-n", pod.name, "addr", "add", f"fd98:{network}::{host}/64", "dev", device, "nodad")
        _ip("-n", pod.name, "link", "set", device, "up")


if sys.platform != "linux":
    raise ImportError("namespaces and BPF are Linux's")
