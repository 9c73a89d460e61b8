"""The runner's own process: PID 1 of a PID namespace, in a network and a mount namespace that are the node.

Whatever kills it, ``kill -9`` included, takes everything with it: the kernel ends its PID namespace, and no network namespace, mount or
rule has another holder. Started by local.client as ``python -m local.supervisor``; talks through the control socket.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from core.k8s.folder import FolderSource
from core.k8s.source import Apply, Delete, Event
from ebpf.plan import NFT
from local import namespaces, network, userns
from local.agent import NodeAgent, describe
from local.control import serve
from local.control_plane import NAMES, NAMESPACE, ControlPlane
from local.mesh import Mesh, Setup
from local.objects import Manifest, read_manifest
from local.podspec import Base
from local.report import report
from local.sandbox import run_program_now, write_sysctls
from local.search import search_path
from local.state import control_socket

_END_EXTRA_S = 10.0  # beyond the longest grace period of a pod


@dataclass(frozen=True)
class Order:
    """What `up` wants. folder: the manifests, watched. ready_fd: a pipe that gets ``up`` or why not. capture: as `--capture`."""

    name: str
    folder: str
    state: str
    ready_fd: int
    rootless: bool = False
    capture: str = "auto"


def main() -> None:
    """Become the node, tell the pipe, serve until told to end."""
    order = Order(**json.loads(sys.argv[1]))
    os.environ["PATH"] = search_path()
    try:
        if order.rootless:
            userns.become_root_inside()
        flags = namespaces.CLONE_NEWNS | namespaces.CLONE_NEWNET | namespaces.CLONE_NEWUTS | namespaces.CLONE_NEWIPC
        namespaces.unshare(flags | namespaces.CLONE_NEWPID)
    except (OSError, userns.NoUserNamespace) as error:
        _tell(order.ready_fd, f"cannot make namespaces: {error}; run `pillion local check`")
        sys.exit(1)
    if os.fork():
        os._exit(0)  # nobody waits for the runner: it belongs to itself
    try:
        _become_node(order)
        trio.run(_main, order)
    except CannotCapture as error:
        _tell(order.ready_fd, str(error))
        sys.exit(1)
    except BaseException as error:
        traceback.print_exc()
        _tell(order.ready_fd, f"the runner failed: {error!r}; its log is {order.state}/runner.log")
        sys.exit(1)
    sys.exit(0)


def _tell(fd: int, text: str) -> bool:
    """Whether somebody still listens; False also when it was told something before."""
    try:
        os.write(fd, text.encode())
        os.close(fd)
    except OSError:
        return False
    return True


def _become_node(order: Order) -> None:
    """Mounts and network of the node; everything here vanishes with this process."""
    _empty(Path(order.state))
    namespaces.mount("none", "/", flags=namespaces.MS_REC | namespaces.MS_PRIVATE)
    namespaces.mount("proc", "/proc", "proc", namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC)
    socket.sethostname("local")
    ipv6 = has_ipv6()
    run_program_now(["ip", "-batch", "-"], network.node_setup(ipv6=ipv6))
    write_sysctls(network.node_sysctls(ipv6=ipv6))


def _empty(state: Path) -> None:
    """What a killed runner left are only files; some belong to users that only this namespace can remove."""
    for entry in state.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != "runner.log":
            entry.unlink()


def has_ipv6() -> bool:
    """Does the kernel have IPv6?"""
    return os.path.exists("/proc/sys/net/ipv6")


async def _main(order: Order) -> None:
    state = Path(order.state)
    (state / "api").mkdir(exist_ok=True)
    base = Base(_base_env(), (sys.executable, "-P", "-m", "proxy"))
    changed: list[Mesh] = []
    control_plane = ControlPlane(
        state, base.env, lambda: changed[0].changed(), lambda pem: changed[0].set_bundle(pem), own_uids=not order.rootless
    )
    agent, note = await _start_agent(order, base)
    mesh = Mesh(Setup(state, base, control_plane.sign, has_ipv6(), NAMES, (_namespace(NAMESPACE),), control_plane.pods_exist, agent))
    changed.append(mesh)
    source = FolderSource(Path(order.folder), read_manifest)
    ended = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_signal, ended)
        nursery.start_soon(control_plane.run)
        if agent is not None:
            nursery.start_soon(agent.run)
        nursery.start_soon(mesh.run)
        await nursery.start(source.run, lambda events: take(mesh, events))
        await nursery.start(
            serve,
            control_socket(state),
            mesh,
            lambda: report(order.name, state, mesh, source.refusals, control_plane.states, note=note),
            ended.set,
        )
        if not _tell(order.ready_fd, "up"):
            ended.set()  # the command that wanted this mesh was killed meanwhile: nobody knows of it
        await ended.wait()
        _end_within(mesh.longest_grace_s + _END_EXTRA_S)
        await mesh.stop_all()
        nursery.cancel_scope.cancel()
    if agent is not None:
        agent.end()
    shutil.rmtree(state, ignore_errors=True)


async def _start_agent(order: Order, base: Base) -> tuple[NodeAgent | None, str]:
    """The agent, and a note about capture; None where plain nftables is all there is, for which nobody has to stay around."""
    if order.rootless or order.capture == "nft":
        why = "rootless: eBPF needs root of the machine" if order.rootless else "--capture nft"
        return None, f"capture: nftables ({why})"
    agent = NodeAgent(Path(order.state), base.env, order.capture)
    agent.begin()
    node = await agent.ready()
    note = describe(node)
    if node["level"] < NFT:
        return agent, note
    agent.end()
    if order.capture == "ebpf":
        raise CannotCapture(f"--capture ebpf: {note.removeprefix('capture: ')}; --capture auto would use nftables")
    return None, note


class CannotCapture(RuntimeError):
    """The wanted way of capture does not work on this machine."""


def _end_within(seconds: float) -> None:
    """End whatever else happens: pods that cannot be ended in order, or a bug of ours, must not keep `down` waiting. With this process,
    everything goes."""

    def give_up() -> None:
        print(f"not everything ended in order within {seconds:g} s: ending the rest with the runner", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()


def take(mesh: Mesh, events: Sequence[Event]) -> None:
    """Edits of the folder become changes of the mesh."""
    for event in events:
        if isinstance(event, Apply) and isinstance(event.object, Manifest):
            mesh.apply(event.object)
        elif isinstance(event, Delete):
            mesh.delete(event.ref)


def _namespace(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


async def _until_signal(ended: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            ended.set()


def _base_env() -> dict[str, str]:
    """What every process starts with: little, because a manifest must not work only in its author's shell."""
    path = os.pathsep.join([os.path.dirname(sys.executable), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"])
    return {"PATH": path, "LANG": os.environ.get("LANG", "C.UTF-8"), "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}  # noqa: S108


if __name__ == "__main__":
    main()
