"""What the demo finds out about the mesh from outside of it: packets on the links, rules in the pods, processes that are left.

Called by cli.demo.acts. Nothing here asks Pillion whether Pillion does what it says.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec

from cli.demo.wire import Connection, NotTls13, check_tls13_untrusted, connections, read_pcap_untrusted
from cli.output import CommandFailed
from ebpf import bpfsys
from ebpf import client as agent
from ebpf.wire import Status
from local import client, protocol
from local.search import search_path
from local.state import state_folder

_TIMEOUT_S = 20.0


def runner_pid(name: str) -> int:
    """The runner's process, as this machine numbers it; raises NotRunning."""
    with client.connect(name) as connection:
        pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def members(runner: int) -> set[int]:
    """The runner and everything that it started and its children started."""
    found = [runner]
    for pid in found:
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue  # it ended while we looked
    return set(found)


def alive(pids: set[int]) -> set[int]:
    """Those that still run; one that only waits to be reaped does not."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.add(pid)
    return found


class Capture:
    """Every packet on the pods' links, from `__init__` to `stop`. path: the capture file."""

    def __init__(self, runner: int, path: Path) -> None:
        self.path = path
        command = [sys.executable, "-P", "-m", "cli.demo.capture", str(runner), str(path)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._child.stdout is not None
        if self._child.stdout.readline() != b"capturing\n":
            self._child.kill()
            said = self._child.communicate()[1].decode(errors="replace").strip().rpartition("\n")[2]
            raise CommandFailed(f"cannot capture packets in the mesh's network namespace: {said}", "pillion local check")

    def stop(self) -> tuple[int, int]:
        """(packets captured, packets lost); raises CommandFailed when the capture broke off."""
        said, errors = self._child.communicate(timeout=_TIMEOUT_S)
        try:
            found = msgspec.json.decode(said)
            return found["packets"], found["dropped"]
        except (msgspec.DecodeError, KeyError):
            raise CommandFailed(f"the capture broke off: {errors.decode(errors='replace').strip()}") from None

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            if pipe is not None:
                pipe.close()


@dataclass
class Journey:
    """All connections from one pod to a port of another. encrypted: how many are TLS 1.3 and nothing else; problems: of the others."""

    client: str
    server: str
    port: int
    count: int = 0
    encrypted: int = 0
    size: int = 0
    marked: int = 0
    problems: tuple[str, ...] = ()
    excerpt: str = ""


def read_paths(capture: bytes, pods: Mapping[str, str], note: bytes) -> list[Journey]:
    """Connections between pods, by who, to whom and port. pods: address -> name. note: what must (not) be found in the bytes.

    marked: connections in which it was found. Connections of the node (probes, the control plane) are left out.
    """
    found: dict[tuple[str, str, int], Journey] = {}
    for connection in connections(read_pcap_untrusted(capture)):
        client_name, server_name = pods.get(connection.client[0]), pods.get(connection.server[0])
        if client_name is None or server_name is None:
            continue
        key = (client_name, server_name, connection.server[1])
        _add(found.setdefault(key, Journey(*key)), connection, note)
    return [found[key] for key in sorted(found)]


def _add(path: Journey, connection: Connection, note: bytes) -> None:
    (sent, all_sent), (received, all_received) = connection.sent.data(), connection.received.data()
    path.count += 1
    path.size += len(sent) + len(received)
    for data in (sent, received):
        if note in data:
            path.marked += 1
            at = data.find(note)
            path.excerpt = path.excerpt or data[max(0, at - 80) : at + len(note)].decode("ascii", "replace")
            break
    problem = "" if connection.whole else "its beginning was not captured"
    if not (all_sent and all_received):
        problem = "a part of it was not captured"
    try:
        check_tls13_untrusted(sent, received)
    except NotTls13 as error:
        problem = str(error)
    if problem:
        path.problems = (*path.problems, problem)
    else:
        path.encrypted += 1


def capture_level(runner: int, pod: protocol.PodStatus) -> str:
    """How traffic of a pod is led to its sidecar, by what the kernel has in the pod itself; "" when it is not."""
    inner = next((container.pid for container in pod.containers if container.pid), None)
    if inner is None:
        return ""
    same = os.readlink(f"/proc/{runner}/ns/user") == os.readlink("/proc/self/ns/user")
    into_runner = ["nsenter", "-t", str(runner), *([] if same else ["-U", "--preserve-credentials"]), "-m", "-n", "-p"]
    rules = _output([*into_runner, "nsenter", "-t", str(inner), "-n", "nft", "list", "table", "inet", "pillion"])
    if "redirect to :4140" in rules and "redirect to :4143" in rules:
        return "nftables REDIRECT"
    asked = [sys.executable, "-P", "-c", _ASK_KERNEL, f"/proc/{inner}/ns/net"]
    return "eBPF, connect and sk_lookup" if same and _output([*into_runner, *asked]).split() == ["1", "1", "1"] else ""


_ASK_KERNEL = "import sys; from cli.demo.evidence import attached; print(*attached(sys.argv[1]))"  # inside the runner's namespaces


def attached(netns: str) -> list[int]:
    """1 for each place where the kernel has a program: sk_lookup in that namespace, connect4 and connect6 on the machine."""
    fds = os.open(netns, os.O_RDONLY), os.open(bpfsys.cgroup2() or "", os.O_RDONLY)
    return [min(bpfsys.attached(fds[place], kind), 1) for place, kind in ((0, 36), (1, 10), (1, 11))]


class Hops(NamedTuple):
    """What the programs counted between the apps and their sidecars. fallbacks: messages that took TCP, by cause."""

    accelerated: int
    messages: int
    bytes: int
    fallbacks: Mapping[str, int]


def hops(name: str) -> Hops | None:
    """All pods of a mesh together; None where nothing accelerates."""
    try:
        pods = agent.ask(state_folder(name) / "agent.sock", Status())["pods"]
    except agent.NoAgent:
        return None
    total: dict[str, int] = {}
    for pod in pods:
        for counter, value in pod["counters"].items():
            total[counter] = total.get(counter, 0) + value
    fallbacks = {cause: total.get(f"by_tcp_{cause}", 0) for cause in ("order", "memory", "unpaired", "full")}
    return Hops(total.get("accelerated", 0), total.get("messages", 0), total.get("bytes", 0), fallbacks)


def _output(argv: Sequence[str]) -> str:
    env = {**os.environ, "PATH": search_path()}  # nft is not in everybody's PATH
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return done.stdout if done.returncode == 0 else ""
