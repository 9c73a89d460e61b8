"""What a pod has before its first container: namespaces held by one small process, a link to the node, capture, hosts file. Does I/O only.

Called by local.pod. Everything it makes ends with the process it returns: nothing is pinned to a path.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import trio

from ebpf import validator
from ebpf.plan import NAMES, NFT
from ebpf.wire import PodFacts
from local import exposure, namespaces, network
from local.agent import Answer, NodeAgent, NotCaptured
from local.podspec import APP_UID
from local.process import unprivileged

# The pod's PID 1: with SIGCHLD ignored the kernel reaps what containers leave behind, so that nothing bigger than sleep(1) is needed.
_PAUSE = "mount -t proc -o nosuid,nodev,noexec proc /proc && echo up && exec env --ignore-signal=CHLD sleep infinity"


_VALIDATE_WITHIN_S = 3.0


class SetupFailed(RuntimeError):
    """A program or system call that makes a pod's surroundings failed; the text has its words."""


@dataclass(frozen=True)
class SandboxPlan:
    """hosts, resolv_conf: files of the runner that the pod sees under /etc. capture: nft ruleset, "" for an unmeshed pod; ``agent``, when
    there is one, captures ``facts`` in its own way instead.

    exposed: paths that the pod's users must reach, whatever the modes of the folders above. scratch: an empty folder to mount in.
    """

    link: str
    hostname: str
    addresses: network.Addresses
    hosts: Path
    resolv_conf: Path
    capture: str
    exposed: tuple[str, ...]
    scratch: str
    facts: PodFacts | None = None
    agent: NodeAgent | None = None


class Sandbox:
    """The namespaces of a pod. captured: how its traffic is led to its sidecar, None for an unmeshed pod."""

    def __init__(self, holder: subprocess.Popen[bytes], plan: SandboxPlan) -> None:
        self._holder = holder
        self._plan = plan
        self.pid = holder.pid
        self.captured: Answer | None = None

    async def steer(self) -> str:
        """The sidecar listens: wait until what arrives reaches it; returns what is wrong, "" when it does."""
        plan = self._plan
        return await plan.agent.steer(plan.facts.id) if plan.agent and plan.facts else ""

    async def end(self) -> None:
        """End everything in the pod: the kernel kills a PID namespace with its first process, and the rest has no other holder.

        Not cancellable. Must not block the runner: the first process is gone only when all others are reaped, which other tasks do.
        """
        pidfd = os.pidfd_open(self.pid)
        try:
            self._holder.kill()
            with trio.CancelScope(shield=True):
                await trio.lowlevel.wait_readable(pidfd)
                if self._plan.agent and self._plan.facts:
                    await self._plan.agent.release(self._plan.facts.id)
            self._holder.wait()
        finally:
            os.close(pidfd)


async def make_sandbox(plan: SandboxPlan) -> Sandbox:
    """All of it or nothing; raises SetupFailed. A pod whose capture cannot be installed does not start (fail closed)."""
    holder = await namespaces.in_own_thread(lambda: _make_namespaces(plan))
    sandbox = Sandbox(holder, plan)
    try:
        await run_program(["ip", "-batch", "-"], network.link_at_node(sandbox.pid, plan.link, plan.addresses))
        await namespaces.in_own_thread(lambda: _set_up_network(sandbox.pid, plan))
        if plan.capture:
            sandbox.captured = await _capture(sandbox.pid, plan)
            await namespaces.in_own_thread(lambda: _validate(sandbox.pid))
    except BaseException:
        await sandbox.end()
        raise
    return sandbox


async def _capture(pid: int, plan: SandboxPlan) -> Answer:
    if plan.agent is None or plan.facts is None:
        await namespaces.in_own_thread(lambda: _redirect(pid, plan.capture))
        return Answer(NFT, False, "", NAMES[NFT])
    try:
        return await plan.agent.capture(plan.facts, pid)
    except NotCaptured as error:
        raise SetupFailed(str(error)) from None


def _redirect(pid: int, ruleset: str) -> None:
    with namespaces.namespace_fds(pid, ["net"]) as (fd,):
        namespaces.setns(fd)
    run_program_now(["nft", "-f", "-"], ruleset)


def _validate(pid: int) -> None:
    """Prove capture from inside, as a user like the app's, before anything of the pod runs; raises SetupFailed."""
    namespaces.enter(pid, ("net", "mnt"))  # the mounts too: that user may be able to reach interpreter and checkout only there
    # the file itself and no site: it imports nothing of ours, and a pod's start waits for it
    words = unprivileged([sys.executable, "-P", "-S", "-E", validator.__file__], APP_UID, APP_UID)
    env = {"PATH": os.environ.get("PATH", os.defpath), "PILLION_VALIDATE_WITHIN_S": str(_VALIDATE_WITHIN_S), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, env=env, capture_output=True, timeout=_VALIDATE_WITHIN_S + 30, check=False, cwd="/")
    if done.returncode:
        raise SetupFailed(f"capture is not in place: {done.stderr.decode(errors='replace').strip().partition(chr(10))[0]}")


def _make_namespaces(plan: SandboxPlan) -> subprocess.Popen[bytes]:
    new = namespaces
    new.unshare(new.CLONE_FS | new.CLONE_NEWNS | new.CLONE_NEWUTS | new.CLONE_NEWIPC | new.CLONE_NEWNET | new.CLONE_NEWPID)
    socket.sethostname(plan.hostname)
    exposure.expose(plan.exposed, plan.scratch)
    for source, target in ((plan.hosts, "/etc/hosts"), (plan.resolv_conf, "/etc/resolv.conf")):
        if os.path.exists(target):
            namespaces.bind(str(source), os.path.realpath(target))
    holder = subprocess.Popen(["sh", "-c", _PAUSE], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/")
    assert holder.stdout is not None
    said = holder.stdout.readline()
    if said != b"up\n":
        said += holder.stdout.read()
        holder.kill()
        holder.wait()
        raise SetupFailed(f"the pod's first process did not start: {said.decode(errors='replace').strip()}")
    holder.stdout.close()
    return holder


def _set_up_network(pid: int, plan: SandboxPlan) -> None:
    with namespaces.namespace_fds(pid, ["net"]) as (fd,):
        namespaces.setns(fd)
    write_sysctls(network.pod_sysctls(ipv6=bool(plan.addresses.v6)))
    run_program_now(["ip", "-batch", "-"], network.link_at_pod(plan.addresses))


def write_sysctls(settings: dict[str, str]) -> None:
    """Set /proc/sys/net values of the calling thread's network namespace; raises SetupFailed."""
    for name, value in settings.items():
        try:
            Path("/proc/sys/net", name).write_text(value)
        except OSError as error:
            raise SetupFailed(f"sysctl net.{name.replace('/', '.')}={value}: {error.strerror}") from None


def run_program_now(argv: list[str], text: str) -> None:
    """Run a program with ``text`` as its input; raises SetupFailed with its words when it fails."""
    try:
        done = subprocess.run(argv, input=text.encode(), capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupFailed(f"{argv[0]}: {error}") from None
    if done.returncode:
        raise SetupFailed(f"{' '.join(argv)} failed: {done.stderr.decode(errors='replace').strip()}")


async def run_program(argv: list[str], text: str) -> None:
    """`run_program_now` in a thread, in the namespaces of the runner (the node's)."""
    await trio.to_thread.run_sync(run_program_now, argv, text)
