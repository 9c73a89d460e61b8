"""Identity service and policy controller as processes of the node: the same programs that run on Kubernetes. Called by local.supervisor.

The runner is what Kubernetes is to them: it signs the tokens of pods, publishes the trust bundle to every namespace, and keeps API objects
in a folder. Both are started again when they end; a mesh goes on without them for a while.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from identity.local_tokens import LocalSigner
from local import probing, volumes
from local.exposure import expose, own_paths
from local.network import CLUSTER_DOMAIN, NODE4
from local.process import Stdio, start_here, unprivileged
from local.workloads import service_account_of

NAMESPACE = "pillion"
IDENTITY_PORT, POLICY_PORT = 8080, 8090
_IDENTITY_ADMIN, _POLICY_ADMIN = 9990, 9991
_IDENTITY_UID, _POLICY_UID = 2103, 2104
_LOOK_EVERY_S = 0.2
_TOKEN_LIFETIME_S = 600
_BACKOFF_MAX_S = 10.0

NAMES: tuple[tuple[str, str], ...] = tuple(
    (NODE4, f"{name}.{NAMESPACE}.svc.{CLUSTER_DOMAIN} {name}.{NAMESPACE}.svc {name}.{NAMESPACE}")
    for name in ("pillion-identity", "pillion-policy")
)


@dataclass
class Part:
    """One program. state: ``ready``, or what it is instead."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    uid: int
    log: Path
    admin_port: int
    state: str = "starting"
    restarts: int = 0
    pid: int | None = None


@dataclass
class ControlPlane:
    """Both programs and the files they share with the runner. changed: called when a part becomes ready or ends."""

    state: Path
    base_env: Mapping[str, str]
    changed: Callable[[], None]
    publish: Callable[[str], None]
    own_uids: bool = True
    signer: LocalSigner = field(default_factory=LocalSigner.generate)

    def __post_init__(self) -> None:
        self._identity, self._policy, logs = self.state / "identity", self.state / "policy", self.state / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        uids = (_IDENTITY_UID, _POLICY_UID) if self.own_uids else (0, 0)
        for folder, uid in zip((self._identity, self._policy), uids, strict=True):
            folder.mkdir(mode=0o700, exist_ok=True)
            os.chown(folder, uid, uid)
        os.chown(self.state / "api", uids[1], uids[1])
        os.chmod(self.state / "api", 0o700)
        volumes.write_atomically(self._identity / "tokens.pub", self.signer.public_pem, 0o644)
        self._policy_uid, self._pod_uid = uids[1], str(uuid.uuid4())
        self._bundle = b""
        python = (sys.executable, "-P", "-m")
        self.parts = (
            Part("identity", (*python, "identity"), self._identity_env(), uids[0], logs / "identity.log", _IDENTITY_ADMIN),
            Part("policy", (*python, "policy"), self._policy_env(), uids[1], logs / "policy.log", _POLICY_ADMIN),
        )

    def _identity_env(self) -> dict[str, str]:
        folder = self._identity
        return {
            **self.base_env,
            "PILLION_CONTROL_NAMESPACE": NAMESPACE,
            "PILLION_CA_DIR": str(folder / "ca"),
            "PILLION_BUNDLE_FILE": str(folder / "bundle.pem"),
            "PILLION_PODS_FILE": str(folder / "pods"),
            "PILLION_TOKEN_REVIEW": f"local:{folder / 'tokens.pub'}",
            "PILLION_IDENTITY_LISTEN": f"[::]:{IDENTITY_PORT}",
            "PILLION_IDENTITY_ADMIN_SOCKET": str(folder / "admin.sock"),
            "PILLION_ADMIN_LISTEN": f"[::]:{_IDENTITY_ADMIN}",
            **_overrides("PILLION_LEAF_LIFETIME_S"),
        }

    def _policy_env(self) -> dict[str, str]:
        folder = self._policy
        return {
            **self.base_env,
            "PILLION_POLICY_SOURCE": f"folder:{self.state / 'api'}",
            "PILLION_CONTROL_NAMESPACE": NAMESPACE,
            "PILLION_POLICY_LISTEN": f"[::]:{POLICY_PORT}",
            "PILLION_ADMIN_LISTEN": f"[::]:{_POLICY_ADMIN}",
            "PILLION_DIAGNOSTICS_SOCKET": str(folder / "diagnostics.sock"),
            "PILLION_IDENTITY_ADDR": f"{NODE4}:{IDENTITY_PORT}",
            "PILLION_IDENTITY_TOKEN_FILE": str(folder / "token"),
            "PILLION_TRUST_ANCHORS_FILE": str(folder / "ca.crt"),
            **_overrides("PILLION_DEFAULT_INBOUND_POLICY"),
        }

    @property
    def states(self) -> dict[str, str]:
        """Name -> ``ready`` or what is wrong."""
        return {part.name: part.state for part in self.parts}

    def pods_exist(self, uids: Iterable[str]) -> None:
        """Tell the identity service for whom a rotation has to wait. What it cannot be told, it does not know: it waits for all then."""
        path = self._identity / "pods"
        try:
            volumes.write_atomically(path, "\n".join([self._pod_uid, *uids, ""]).encode(), 0o644)
        except OSError:
            path.unlink(missing_ok=True)

    def sign(self, pod: Mapping[str, Any], audience: str, lifetime_s: int) -> str:
        """A token bound to a pod, as the kubelet would get it from the API server."""
        meta = pod["metadata"]
        return self.signer.issue(
            meta["namespace"],
            service_account_of(pod),
            meta["name"],
            meta["uid"],
            time.time(),
            lifetime_s=lifetime_s,
            audience=audience or "https://kubernetes.default.svc",
        )

    async def run(self) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep, self.parts[0])
            while not self._carry_over():  # noqa: ASYNC110 -- a file of another process: there is no event to wait for
                await trio.sleep(0.05)
            nursery.start_soon(self._keep, self.parts[1])
            while True:
                await trio.sleep(_LOOK_EVERY_S)
                self._carry_over()

    def _carry_over(self) -> bool:
        """Trust bundle to whoever starts later, token to the policy controller; False until there is a bundle."""
        try:
            bundle = (self._identity / "bundle.pem").read_bytes()
        except OSError:
            return False
        if bundle != self._bundle:
            self._bundle = bundle
            volumes.write_atomically(self._policy / "ca.crt", bundle, 0o644)
            self.publish(bundle.decode("ascii"))
        token = self._policy / "token"
        if not token.exists() or time.time() - token.stat().st_mtime > _TOKEN_LIFETIME_S * 0.7:
            subject = {
                "metadata": {"namespace": NAMESPACE, "name": "pillion-policy", "uid": self._pod_uid},
                "spec": {"serviceAccountName": "pillion-policy"},
            }
            text = self.sign(subject, "identity.pillion.dev", _TOKEN_LIFETIME_S)
            volumes.write_atomically(token, text.encode(), 0o400, self._policy_uid)
        return True

    async def _keep(self, part: Part) -> None:
        backoff_s = 0.5
        scratch = str(self.state / "scratch")

        def expose_all() -> None:
            expose(own_paths(), scratch)

        while True:
            began = trio.current_time()
            with open(part.log, "ab") as log:  # noqa: ASYNC230 -- a local file: microseconds
                stdio = Stdio(subprocess.DEVNULL, log.fileno(), log.fileno())
                process = await start_here(unprivileged(part.argv, part.uid, part.uid), part.env, stdio, expose_all)
            part.pid = process.pid
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, part)
                    code = await process.wait()
                    nursery.cancel_scope.cancel()
            except BaseException:
                process.kill()
                raise
            part.pid, part.restarts = None, part.restarts + 1
            part.state = f"not running: exited with {code}, see {part.log}"
            self.changed()
            if trio.current_time() - began > 60:
                backoff_s = 0.5
            await trio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _BACKOFF_MAX_S)

    async def _watch(self, part: Part) -> None:
        probe = {"httpGet": {"path": "/ready", "port": part.admin_port}, "timeoutSeconds": 2}

        async def no_exec(command: list[str], timeout_s: float) -> str | None:
            raise NotImplementedError

        while True:
            failure = await probing.check(probe, NODE4, {}, no_exec)
            state = "ready" if failure is None else f"not ready: {failure}"
            if state != part.state:
                part.state = state
                self.changed()
            await trio.sleep(0.1 if failure else 2.0)


def _overrides(*names: str) -> dict[str, str]:
    """Settings of the control plane that the caller of `up` may choose, as an installation on Kubernetes would in its values."""
    return {name: os.environ[name] for name in names if name in os.environ}
