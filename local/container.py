"""One container's process over its life: start, probes, restarts with backoff, graceful end. Called by local.pod.

Rules are the kubelet's (restartPolicy, startupProbe gates the others, liveness restarts, readiness only tells), with a shorter backoff:
what a laptop is for is trying again.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from local import probing
from local.podspec import ContainerPlan
from local.process import Process, Stdio

BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 60.0
BACKOFF_FORGOTTEN_AFTER_S = 60.0  # a process that ran this long starts its backoff over
LOG_MAX_BYTES = 16 << 20


class Surroundings(Protocol):
    """What a container needs of its pod."""

    @property
    def host(self) -> str:
        """The pod's address that probes go to."""

    async def start(self, plan: ContainerPlan, argv: tuple[str, ...], stdio: Stdio, inside: int | None) -> Process:
        """Start a process as the container's user, in a running one's mounts when ``inside`` is its pid."""

    def changed(self) -> None:
        """Something that others show has changed."""


@dataclass
class ContainerState:
    """What `status` shows. phase: waiting | running | exited."""

    phase: str = "waiting"
    reason: str = ""
    ready: bool = False
    started: bool = False
    restarts: int = 0
    exit_code: int | None = None
    trouble: dict[str, str] = field(default_factory=dict)


class Container:
    """Runs one `ContainerPlan`. Use: `run` in a task until it returns; `stop` from another one."""

    def __init__(self, plan: ContainerPlan, restart_policy: str, log: Path, pod: Surroundings, backoff_limit: int | None = None) -> None:
        self.plan = plan
        self.state = ContainerState()
        self.log = log
        self.started = trio.Event()
        self._pod = pod
        self._policy = "Always" if plan.restarts_always else restart_policy
        if plan.kind == "init":
            self._policy = "Never" if restart_policy == "Never" else "OnFailure"
        self._limit = backoff_limit
        self._process: Process | None = None
        self._stopping = trio.Event()
        self._out_of_patience = False
        self._ended = trio.Event()

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._process.pid if self._process else None

    async def run(self) -> int:
        """Run until the restart policy says that it is over (or `stop`); returns the last exit code."""
        backoff_s, code = BACKOFF_FIRST_S, 0
        try:
            while not self._stopping.is_set():
                began = trio.current_time()
                code = await self._run_once()
                if self._stopping.is_set() or not self._again(code):
                    return code
                if trio.current_time() - began > BACKOFF_FORGOTTEN_AFTER_S:
                    backoff_s = BACKOFF_FIRST_S
                self.state.reason = f"exited with {code}, starts again in {backoff_s:g} s"
                self._pod.changed()
                with trio.move_on_after(backoff_s):
                    await self._stopping.wait()
                    return code
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
                self.state.restarts += 1
            return code
        finally:
            self._ended.set()

    def _again(self, code: int) -> bool:
        if self._limit is not None and self.state.restarts >= self._limit:
            return False
        return self._policy == "Always" or (self._policy == "OnFailure" and code != 0)

    async def _run_once(self) -> int:
        state = self.state
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.log, "ab") as log:  # noqa: ASYNC230 -- a local file: microseconds
                stdio = Stdio(subprocess.DEVNULL, log.fileno(), log.fileno())
                self._process = process = await self._pod.start(self.plan, self.plan.argv, stdio, None)
        except OSError as error:
            state.phase, state.reason, state.exit_code = "exited", f"did not start: {error}", 128
            self._pod.changed()
            return 128
        state.phase, state.reason, state.trouble = "running", "", {}
        if self._out_of_patience:  # `stop` found no process yet
            process.kill()
        elif self._stopping.is_set():
            process.signal(signal.SIGTERM)
        code = 137
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._probe_all)
                code = await process.wait()
                nursery.cancel_scope.cancel()
        except BaseException:
            await process.end()
            raise
        finally:
            self._process = None
            state.phase, state.exit_code, state.ready, state.started = "exited", code, False, False
            state.reason = f"exited with {code}"
            if code == 0 and self.plan.kind == "init":
                state.ready = True
            self._pod.changed()
        return code

    # --- probes --------------------------------------------------------------------------------------------------

    async def _probe_all(self) -> None:
        probes = self.plan.probes
        if (probe := probes.get("startupProbe")) and not await self._until_started(probe):
            return
        self.state.started = True
        self.state.ready = "readinessProbe" not in probes
        self.started.set()
        self._pod.changed()
        async with trio.open_nursery() as nursery:
            if probe := probes.get("readinessProbe"):
                nursery.start_soon(self._watch_readiness, probe)
            if probe := probes.get("livenessProbe"):
                nursery.start_soon(self._watch_liveness, probe)

    async def _until_started(self, probe: Mapping[str, Any]) -> bool:
        tally = probing.Tally(1, int(probe.get("failureThreshold") or 3))
        delay_s, period_s, _ = probing.timing(probe)
        await trio.sleep(delay_s)
        while True:
            if await self._answer("startup", probe, tally):
                if tally.healthy:
                    return True
                self._kill("the startup probe kept failing")
                return False
            await trio.sleep(min(period_s, 0.2) if tally.failures < 5 and period_s <= 1 else period_s)

    async def _watch_readiness(self, probe: Mapping[str, Any]) -> None:
        tally = probing.Tally(int(probe.get("successThreshold") or 1), int(probe.get("failureThreshold") or 3))
        delay_s, period_s, _ = probing.timing(probe)
        await trio.sleep(delay_s)
        while True:
            await self._answer("readiness", probe, tally)
            if tally.healthy != self.state.ready:
                self.state.ready = tally.healthy
                self._pod.changed()
            # a pod that is coming up is asked more often than its period, so that `up` need not wait for a coarse one
            await trio.sleep(period_s if self.state.ready else min(period_s, 0.5))

    async def _watch_liveness(self, probe: Mapping[str, Any]) -> None:
        tally = probing.Tally(1, int(probe.get("failureThreshold") or 3), healthy=True)
        delay_s, period_s, _ = probing.timing(probe)
        await trio.sleep(delay_s)
        while True:
            if await self._answer("liveness", probe, tally) and not tally.healthy:
                self._kill("the liveness probe kept failing")
                return
            await trio.sleep(period_s)

    async def _answer(self, name: str, probe: Mapping[str, Any], tally: probing.Tally) -> bool:
        failure = await probing.check(probe, self._pod.host, self.plan.ports, self._exec)
        before = self.state.trouble.get(name, "")
        if failure:
            self.state.trouble[name] = failure
        else:
            self.state.trouble.pop(name, None)
        if before != (failure or ""):
            self._pod.changed()
        return tally.record(failure is None)

    async def _exec(self, command: list[str], timeout_s: float) -> str | None:
        if not self._process:
            return "the container does not run"
        quiet = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)
        process = await self._pod.start(self.plan, tuple(command), quiet, self._process.pid)
        try:
            with trio.fail_after(timeout_s):
                code = await process.wait()
        except BaseException:
            await process.end()
            raise
        return None if code == 0 else f"the command exited with {code}"

    def _kill(self, why: str) -> None:
        self.state.reason = why
        with open(self.log, "ab") as log:
            log.write(f"[pillion] {why}: ending the process\n".encode())
        if self._process:
            self._process.signal(signal.SIGTERM)
            self._process.kill()

    # --- the end -------------------------------------------------------------------------------------------------

    async def stop(self, grace_s: float) -> None:
        """preStop, SIGTERM, at most ``grace_s`` seconds, SIGKILL; returns when `run` has returned."""
        self._stopping.set()
        with trio.move_on_after(grace_s):
            if self.plan.pre_stop and self._process:
                await self._pre_stop(self.plan.pre_stop, grace_s)
            if self._process:
                self._process.signal(signal.SIGTERM)
            await self._ended.wait()
            return
        self._out_of_patience = True
        if self._process:
            self._process.kill()
        await self._ended.wait()

    async def _pre_stop(self, hook: Mapping[str, Any], grace_s: float) -> None:
        if hook.get("sleep"):
            await trio.sleep(float(hook["sleep"].get("seconds") or 0))
        elif hook.get("exec") or hook.get("httpGet"):
            await probing.check({**hook, "timeoutSeconds": grace_s}, self._pod.host, self.plan.ports, self._exec)

    def bound_log(self) -> None:
        """Empty a log that grew too large; the process appends, so it goes on at the start."""
        try:
            if self.log.stat().st_size > LOG_MAX_BYTES:
                with open(self.log, "r+b") as log:
                    log.truncate(0)
        except OSError:
            pass  # nothing was logged yet
