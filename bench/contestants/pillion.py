"""Pillion as it runs everywhere: two sidecars, the identity service and the policy controller as processes of their own.

Nothing here is made for the benchmark: redirect, tokens, certificates and policy come to the sidecars as they do on a cluster. The
control plane is in a namespace of its own; only the sidecars' CPU and memory count, as only the proxies' do for the others.

Two contestants: `pillion` is led by the same nftables redirect as everybody else; `pillion-ebpf` by the node's agent, with the hops
between app and sidecar accelerated, which is what runs where the kernel allows it. `bench.levels` has one for each rung of the ladder.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.certs import NAMESPACE, TRUST_DOMAIN
from bench.contestants.agent import Agent, Led
from bench.contestants.base import Context, Running, Setup, http_ok, wait_ready
from bench.contestants.objects import objects
from bench.stage import (
    APP_PORT,
    CLIENT_CONTROL_IP,
    CLIENT_IP,
    CONTROL_IP,
    INBOUND_PORT,
    OUTBOUND_PORT,
    PROXY_UID,
    ROOT,
    SERVER_CONTROL_IP,
    SERVICE_IP,
    SERVICE_PORT,
    Pod,
    Proc,
    Stage,
    StageError,
    wait_until,
)

ADMIN_PORT = 4191
_NO_COMPILER = 3  # an exit code of tools/compile.py
_IDENTITY_PORT, _POLICY_PORT, _IDENTITY_ADMIN, _POLICY_ADMIN = 8080, 8090, 9990, 9991


class Pillion:
    """HTTP/1.1 stays HTTP/1.1 and HTTP/2 stays HTTP/2 between the sidecars. led: by the node's agent instead of the stage's redirect."""

    def __init__(self, name: str = "pillion", led: Led | None = None) -> None:
        self.name = name
        self._led = led

    def missing(self, setup: Setup) -> str | None:
        """Takes part in everything."""
        return None

    def start(self, context: Context, stage: Stage, setup: Setup) -> Running:
        """Control plane, redirect, both sidecars; ready means certified."""
        sidecar = program()
        tokens = _Tokens(stage.workdir)
        self._control_plane(context, stage, setup, tokens)
        agent = None
        if self._led is not None:
            agent = Agent(stage, self._led)
            agent.capture(stage.server)
            if not setup.inbound_only:
                agent.capture(stage.client)
        else:
            stage.redirect(outbound=not setup.inbound_only)
        proxies: dict[str, Proc] = {}
        ready: dict[str, float] = {}
        for role in ("inbound",) if setup.inbound_only else ("outbound", "inbound"):
            pod = stage.client if role == "outbound" else stage.server
            env = sidecar_env(role, stage, tokens.issue, context.certs.ca)
            command = [sys.executable, "-m", "proxy"]
            proc = pod.spawn(f"pillion-{role}", command, uid=PROXY_UID, cores=context.pinning.proxy(role), env=env, cwd=sidecar)
            ready[role] = wait_ready(stage, proc, role, "/ready", ADMIN_PORT)
            proxies[role] = proc
            if agent is not None:
                agent.steer(pod)
        dial = (stage.endpoints[0], APP_PORT) if setup.inbound_only else (SERVICE_IP, SERVICE_PORT)
        return Running(dial, proxies, ready, alpn="pillion-http/1.1", redirected=agent.redirected if agent else None)

    def _control_plane(self, context: Context, stage: Stage, setup: Setup, tokens: _Tokens) -> None:
        pod = stage.control()
        _route_from_pod_addresses(stage, pod)
        folder = stage.workdir / "objects"
        folder.mkdir()
        (folder / "objects.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects(setup, stage.endpoints)}))
        certs = context.certs
        shared = {"PILLION_TRUST_DOMAIN": TRUST_DOMAIN, "PILLION_LOG_LEVEL": "warning"}
        identity = shared | {
            "PILLION_IDENTITY_LISTEN": f"[::]:{_IDENTITY_PORT}",
            "PILLION_ADMIN_LISTEN": f"[::]:{_IDENTITY_ADMIN}",
            "PILLION_ISSUER_FILES": f"{certs.ca},{certs.ca_key},{certs.ca}",
            "PILLION_TOKEN_REVIEW": f"local:{tokens.public_key}",
        }
        policy = shared | {
            "PILLION_POLICY_SOURCE": f"folder:{folder}",
            "PILLION_POLICY_LISTEN": f"[::]:{_POLICY_PORT}",
            "PILLION_ADMIN_LISTEN": f"[::]:{_POLICY_ADMIN}",
            "PILLION_IDENTITY_ADDR": f"127.0.0.1:{_IDENTITY_PORT}",
            "PILLION_IDENTITY_TOKEN_FILE": str(tokens.issue("pillion", "pillion-policy", "pillion-policy-0")),
            "PILLION_TRUST_ANCHORS_FILE": str(certs.ca),
        }
        for name, env, admin in (("identity", identity, _IDENTITY_ADMIN), ("policy", policy, _POLICY_ADMIN)):
            proc = pod.spawn(name, [sys.executable, "-m", name], uid=PROXY_UID, env=env, cwd=ROOT)
            with pod.inside():
                wait_until(partial(http_ok, "127.0.0.1", admin, "/ready"), f"{name} ready", 30, [proc])


def _route_from_pod_addresses(stage: Stage, control: Pod) -> None:
    """The policy controller serves a sidecar only at its pod's address, which is not that of the control link."""
    for pod, address, gateway in (
        (stage.client, CLIENT_IP, CLIENT_CONTROL_IP),
        (stage.server, stage.endpoints[0], SERVER_CONTROL_IP),
    ):
        pod.run("ip", "route", "replace", CONTROL_IP, "dev", "ctl0", "src", address)
        control.run("ip", "route", "add", address, "via", gateway)


class _Tokens:
    """Service account tokens as files, signed as the local runner signs them."""

    def __init__(self, folder: Path) -> None:
        from identity.local_tokens import LocalSigner

        self._folder = folder
        self._signer = LocalSigner.generate()
        self.public_key = folder / "tokens.pub"
        self.public_key.write_bytes(self._signer.public_pem)

    def issue(self, namespace: str, account: str, pod: str) -> Path:
        """Write a token for one pod, readable by the sidecars' uid only."""
        path = self._folder / f"{pod}.token"
        path.touch(0o600)
        path.write_text(self._signer.issue(namespace, account, pod, f"uid-{pod}", time.time(), lifetime_s=7200))
        os.chown(path, PROXY_UID, -1)
        return path


def sidecar_env(role: str, stage: Stage, issue: Callable[[str, str, str], Path], anchors: Path) -> dict[str, str]:
    """What the injector would write into the pod; access log off, everything else at its default."""
    account, ips = ("client", [CLIENT_IP]) if role == "outbound" else ("server", list(stage.endpoints))
    return {
        "PILLION_TRUST_DOMAIN": TRUST_DOMAIN,
        "PILLION_POD_NAMESPACE": NAMESPACE,
        "PILLION_POD_NAME": f"{account}-0",
        "PILLION_POD_UID": f"uid-{account}-0",
        "PILLION_POD_IPS": ",".join(ips),
        "PILLION_SERVICE_ACCOUNT": account,
        "PILLION_IDENTITY_ADDR": f"{CONTROL_IP}:{_IDENTITY_PORT}",
        "PILLION_IDENTITY_TOKEN_FILE": str(issue(NAMESPACE, account, f"{account}-0")),
        "PILLION_TRUST_ANCHORS_FILE": str(anchors),
        "PILLION_POLICY_ADDR": f"{CONTROL_IP}:{_POLICY_PORT}",
        "PILLION_INBOUND_LISTEN": f"[::]:{INBOUND_PORT}",
        "PILLION_OUTBOUND_LISTEN": f"[::]:{OUTBOUND_PORT}",
        "PILLION_ADMIN_LISTEN": f"[::]:{ADMIN_PORT}",
        "PILLION_INBOUND_PORTS": str(APP_PORT) if role == "inbound" else "",
        "PILLION_ACCESS_LOG": "off",
        "PILLION_LOG_LEVEL": "warning",
    }


@functools.cache
def program() -> Path:
    """Where the sidecars run: the copy with compiled hot modules, as in an image, or the work tree where there is no compiler.

    Raises StageError when they do not compile: the work tree would be measured in place of what users run. Byte code is made beside the
    sources: the sidecars' uid could not write it and each start would compile anew.
    """
    compiled = ROOT / ".cache" / "compiled"
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "compile.py"), str(compiled)], check=False, capture_output=True, text=True)
    if done.returncode not in (0, _NO_COMPILER):
        raise StageError(f"the hot modules do not compile: {done.stderr[-2000:]}")
    found = compiled if done.returncode == 0 else ROOT
    packages = [str(found / name) for name in ("core", "identity", "policy", "proxy")]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *packages], check=False, stdout=subprocess.DEVNULL)
    return found


def build() -> str:
    """What is measured, for the report."""
    return "interpreted, as there is no compiler here" if program() == ROOT else "hot modules compiled, as in the image"
