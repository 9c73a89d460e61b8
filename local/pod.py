"""One pod over its life: sandbox, init containers and native sidecars in order, containers, the end. Called by local.supervisor.

Order and phases are Kubernetes': a native sidecar's startup probe gates what follows, sidecars end last and in reverse order,
and a pod whose containers are done ends its sidecars.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from ebpf.facts import facts_untrusted
from local import volumes
from local.agent import Answer, NodeAgent
from local.container import Container
from local.exposure import own_paths
from local.network import NODE4, Addresses
from local.podspec import Base, ContainerPlan, Lookup, NotYet, Volume, container_plans, hostname_of, named_ports, volume_plans
from local.process import Process, Stdio, start_in, unprivileged
from local.sandbox import Sandbox, SandboxPlan, SetupFailed, make_sandbox
from local.services import PodFacts, alias_lines, hosts_file
from local.workloads import PodPlan

DEFAULT_GRACE_S = 30.0  # Pod.spec.terminationGracePeriodSeconds
_LEAVE_S = 0.5  # callers hear that an endpoint is gone before it is; Kubernetes leaves that to a preStop sleep
_RETRY_S = 0.25  # what is missing at start is the trust bundle or a ConfigMap of the next file
_TOKEN_LIFETIME_MAX_S = 600

SignToken = Callable[[Mapping[str, Any], str, int], str]
"""(pod object, audience, lifetime in seconds) -> a service account token."""


@dataclass(frozen=True)
class Node:
    """What pods share. changed: call it when anything that others show or route by has changed. hosts: namespace -> lines for its pods."""

    folder: Path
    scratch: Path
    base: Base
    sign: SignToken
    hosts: Callable[[str], list[str]]
    changed: Callable[[], None]
    agent: NodeAgent | None = None


class Pod:
    """Runs one pod. raw is the object with everything that injection added; plan.raw the one without."""

    def __init__(self, plan: PodPlan, raw: Mapping[str, Any], addresses: Addresses, capture: str, link: str, node: Node, lookup: Lookup):
        self.plan, self.addresses, self.capture, self.link = plan, addresses, capture, link
        self._node, self._lookup = node, lookup
        self.raw: dict[str, Any] = json.loads(json.dumps(raw, default=str))
        ips = [{"ip": ip} for ip in addresses.all]
        self.raw["status"] = {"phase": "Pending", "podIP": addresses.v4, "podIPs": ips, "hostIP": NODE4, "startTime": now_text()}
        self.folder = node.folder / plan.ref.namespace / plan.ref.name
        self.containers: list[Container] = []
        self.phase = "Pending"
        self.message = "starting"
        self.why_unmeshed = ""
        self._was_ready = False
        self._deadline = 0.0
        self.stopping = trio.Event()
        self.ended = trio.Event()
        self._sandbox: Sandbox | None = None
        self._sources: dict[str, Path] = {}
        self._volumes: list[Volume] = []
        self._hosts_text = b""

    # --- what others ask -----------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """The address probes go to."""
        return self.addresses.v4

    @property
    def ready(self) -> bool:
        """Every container (and native sidecar) is ready, and the pod is not on its way out."""
        running = [container for container in self.containers if container.plan.kind != "init"]
        apps = any(container.plan.kind == "app" for container in running)
        return self.phase == "Running" and apps and not self.stopping.is_set() and all(container.state.ready for container in running)

    @property
    def facts(self) -> PodFacts:
        """What Services need to know."""
        meta, spec = self.raw["metadata"], self.raw["spec"]
        ports = named_ports([*(spec.get("initContainers") or []), *spec["containers"]])
        return PodFacts(
            self.plan.ref,
            meta.get("labels") or {},
            self.addresses,
            self.ready,
            ports,
            hostname_of(self.raw),
            spec.get("subdomain") or "",
            meshed=bool(self.capture),
        )

    @property
    def captured(self) -> Answer | None:
        """How its traffic is led to its sidecar; None for an unmeshed pod, or one without a sandbox."""
        return self._sandbox.captured if self._sandbox else None

    def changed(self) -> None:
        """Tell the node."""
        self._node.changed()

    def object(self) -> dict[str, Any]:
        """The Pod object with its present status."""
        status = dict(self.raw["status"], phase=self.phase)
        status["conditions"] = [{"type": "Ready", "status": "True" if self.ready else "False", "message": self.message}]
        status["containerStatuses"] = [
            {"name": container.plan.name, "ready": container.state.ready, "restartCount": container.state.restarts}
            for container in self.containers
        ]
        found = dict(self.raw, status=status)
        if self.stopping.is_set():
            found["metadata"] = dict(self.raw["metadata"], deletionTimestamp=self.raw["status"].get("deletion") or now_text())
        return found

    def log_path(self, container: str) -> Path:
        """Where a container's output goes."""
        return self.folder / "logs" / f"{container}.log"

    # --- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the pod has ended by itself or by `stop`; everything it had is gone then."""
        try:
            await self._bring_up()
            if not self.stopping.is_set():
                await self._live()
        finally:
            if self._sandbox:
                sandbox, self._sandbox = self._sandbox, None  # nothing starts in it any more
                await sandbox.end()
            self.ended.set()
            self.changed()

    async def _bring_up(self) -> None:
        """Sandbox and plans; tries again until it works, because what is missing may be created any moment."""
        while not self.stopping.is_set():
            try:
                await self._refresh_files()
                plans = container_plans(self.raw, self._lookup, self._node.base)
                self._sandbox = await make_sandbox(self._sandbox_plan())
            except (NotYet, SetupFailed, OSError) as error:
                self._say("Pending", str(error))
                with trio.move_on_after(_RETRY_S):
                    await self.stopping.wait()
                continue
            policy = self.raw["spec"].get("restartPolicy") or "Always"
            limit = self.plan.backoff_limit
            self.containers = [Container(plan, policy, self.log_path(plan.name), self, limit) for plan in plans]
            return

    def _sandbox_plan(self) -> SandboxPlan:
        resolv = self.folder / "resolv.conf"
        namespace = self.plan.ref.namespace
        # no resolver: what the hosts file does not know must fail at once, and a closed local port does
        volumes.write_in_place(
            resolv,
            f"search {namespace}.svc.cluster.local svc.cluster.local cluster.local\nnameserver 127.0.0.1\noptions ndots:5\n".encode(),
        )
        exposed = (*own_paths(), *(volume.host_path for volume in self._volumes if volume.host_path))
        hosts, scratch, agent = self.folder / "hosts", str(self._node.scratch), self._node.agent
        facts = facts_untrusted(self.raw) if self.capture else None
        if facts is not None:
            facts = facts._replace(addresses=self.addresses.all)
        return SandboxPlan(self.link, hostname_of(self.raw), self.addresses, hosts, resolv, self.capture, exposed, scratch, facts, agent)

    async def _live(self) -> None:
        self._say("Pending", "running init containers")
        sidecars: list[Container] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_fresh)
            async with trio.open_nursery() as alongside:
                failed = await self._run_init(alongside, sidecars)
                if not failed and not self.stopping.is_set():
                    self._say("Running", "")
                    failed = await self._run_apps()
                if not self.stopping.is_set():
                    self._say("Failed" if failed else "Succeeded", failed)
                for sidecar in reversed(sidecars):
                    await sidecar.stop(self._left_s())
            nursery.cancel_scope.cancel()

    async def _run_init(self, nursery: trio.Nursery, sidecars: list[Container]) -> str:
        """Init containers in order; returns why the pod failed, "" when it may go on."""
        for container in self.containers:
            if container.plan.kind == "sidecar":
                sidecars.append(container)
                nursery.start_soon(container.run)
                async with trio.open_nursery() as race:
                    race.start_soon(_then_cancel, container.started, race)
                    race.start_soon(_then_cancel, self.stopping, race)
                if not self.stopping.is_set() and self._sandbox and (problem := await self._sandbox.steer()):
                    self._say("Pending", problem)  # told, and not fatal: the agent goes on looking
            elif container.plan.kind == "init":
                async with trio.open_nursery() as race:
                    race.start_soon(self._stop_when_told, container)
                    code = await container.run()
                    race.cancel_scope.cancel()
                if code and not self.stopping.is_set():
                    return f"init container {container.plan.name} exited with {code}"
            if self.stopping.is_set():
                return ""
        return ""

    async def _run_apps(self) -> str:
        codes: dict[str, int] = {}

        async def run_one(container: Container) -> None:
            codes[container.plan.name] = await container.run()

        async with trio.open_nursery() as stoppers:
            async with trio.open_nursery() as nursery:
                for container in self.containers:
                    if container.plan.kind == "app":
                        nursery.start_soon(run_one, container)
                        stoppers.start_soon(self._stop_when_told, container)
            stoppers.cancel_scope.cancel()
        return ", ".join(f"{name} exited with {code}" for name, code in codes.items() if code)

    async def _stop_when_told(self, container: Container) -> None:
        await self.stopping.wait()
        if self._was_ready:
            await trio.sleep(_LEAVE_S)
        await container.stop(self._left_s())

    async def stop(self) -> None:
        """End the pod gracefully; returns when nothing of it is left."""
        if not self.stopping.is_set():
            self._was_ready = self.ready
            self._deadline = trio.current_time() + self.grace_s
            self.raw["status"]["deletion"] = now_text()
            self.stopping.set()
            self.message = "ending"
            self.changed()
        await self.ended.wait()

    @property
    def grace_s(self) -> float:
        """terminationGracePeriodSeconds."""
        grace = self.raw["spec"].get("terminationGracePeriodSeconds")
        return DEFAULT_GRACE_S if grace is None else float(grace)

    def _left_s(self) -> float:
        """What is left of the grace period; sidecars get at least two seconds of their own, as the kubelet gives them."""
        return max(2.0, self._deadline - trio.current_time()) if self.stopping.is_set() else self.grace_s

    def _say(self, phase: str, message: str) -> None:
        if (phase, message) != (self.phase, self.message):
            self.phase, self.message = phase, message
            self.changed()

    # --- files ---------------------------------------------------------------------------------------------------

    async def _keep_fresh(self) -> None:
        while True:
            await trio.sleep(5)
            for container in self.containers:
                container.bound_log()
            try:
                await self._refresh_files()
            except (NotYet, OSError):
                pass  # the source went away: what was mounted stays, as in Kubernetes

    async def _refresh_files(self) -> None:
        """Volumes, tokens and the hosts file, as things are now; raises NotYet."""
        self._volumes = volume_plans(self.raw, self._lookup)
        self.update_hosts()
        await trio.to_thread.run_sync(self._write_volumes)

    def _write_volumes(self) -> None:
        for volume in self._volumes:
            folder = self.folder / "volumes" / volume.name
            self._sources[volume.name] = volumes.materialise(volume, folder)
            for token in volume.tokens:
                path = folder / token.path
                lifetime_s = min(token.lifetime_s, _TOKEN_LIFETIME_MAX_S)
                age_s = time.time() - path.stat().st_mtime if path.exists() else None
                if age_s is None or age_s > lifetime_s * 0.7:
                    text = self._node.sign(self.raw, token.audience, lifetime_s)
                    volumes.write_atomically(path, text.encode(), 0o444)

    def update_hosts(self) -> None:
        """Write the hosts file when its content changed."""
        lines = [*self._node.hosts(self.plan.ref.namespace), *alias_lines(self.raw["spec"])]
        text = hosts_file(self.facts, lines).encode()
        if text != self._hosts_text:
            self.folder.mkdir(parents=True, exist_ok=True)
            volumes.write_in_place(self.folder / "hosts", text)
            self._hosts_text = text

    def refresh_soon(self, nursery: trio.Nursery) -> None:
        """ConfigMaps changed: bring the files up to date now."""
        nursery.start_soon(self._refresh_quietly)

    async def _refresh_quietly(self) -> None:
        try:
            await self._refresh_files()
        except (NotYet, OSError):
            pass

    # --- processes -----------------------------------------------------------------------------------------------

    async def start(self, plan: ContainerPlan, argv: tuple[str, ...], stdio: Stdio, inside: int | None) -> Process:
        """Start a process as the container's user; ``inside`` names a running process whose mounts it shares."""
        if self._sandbox is None:
            raise OSError("the pod has ended")
        command = unprivileged(argv, plan.uid, plan.gid)
        if inside is not None:
            return await start_in(inside, command, plan.env, plan.cwd, stdio)
        scratch, sources, mounts = str(self._node.scratch), dict(self._sources), plan.mounts
        return await start_in(self._sandbox.pid, command, plan.env, plan.cwd, stdio, lambda: volumes.mount_all(mounts, sources, scratch))

    async def exec(self, container: str | None, argv: tuple[str, ...], env: Mapping[str, str], stdio: Stdio) -> Process:
        """A command in a running container (default: the first that is not a sidecar); raises LookupError, OSError."""
        running = [found for found in self.containers if found.pid and (container in (None, found.plan.name))]
        apps = [found for found in running if found.plan.kind == "app"] or running
        if not apps or apps[0].pid is None:
            names = ", ".join(found.plan.name for found in self.containers)
            raise LookupError(f"pod {self.plan.ref.name} has no running container {container or ''} (it has: {names})".replace("  ", " "))
        chosen = apps[0]
        plan = dataclasses.replace(chosen.plan, env={**chosen.plan.env, **env})
        return await self.start(plan, argv, stdio, chosen.pid)


async def _then_cancel(event: trio.Event, nursery: trio.Nursery) -> None:
    await event.wait()
    nursery.cancel_scope.cancel()


def now_text() -> str:
    """The present as the API writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
