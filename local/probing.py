"""Probes as the kubelet does them: httpGet, tcpSocket, grpc and exec, from the node. Called by local.pod.

`check` performs one probe and answers with why it failed, None when it succeeded; `Tally` turns answers into a state, purely.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from injector.fixed import ADMIN_PORT

_ANSWER_MAX = 4096  # bytes of an HTTP answer that are read: its first line decides
_FAILED = "failed: "  # how a sidecar's answer to a failed probe begins (proxy.probes.FAILED)
Exec = Callable[[list[str], float], Awaitable[str | None]]
"""(command, timeout in seconds) -> why it failed, None when it exited with 0."""


@dataclass
class Tally:
    """Counts answers in a row (Probe.successThreshold, failureThreshold). healthy: the present state."""

    success_threshold: int = 1
    failure_threshold: int = 3
    healthy: bool = False
    successes: int = 0
    failures: int = 0

    def record(self, success: bool) -> bool:
        """Count one answer; True when the threshold of its kind is reached now (or still)."""
        if success:
            self.successes, self.failures = self.successes + 1, 0
            reached = self.successes >= self.success_threshold
        else:
            self.successes, self.failures = 0, self.failures + 1
            reached = self.failures >= self.failure_threshold
        if reached:
            self.healthy = success
        return reached


def timing(probe: Mapping[str, Any]) -> tuple[float, float, float]:
    """initialDelaySeconds, periodSeconds, timeoutSeconds with the API's defaults 0, 10, 1."""
    return (
        float(probe.get("initialDelaySeconds") or 0),
        float(probe.get("periodSeconds") or 10),
        float(probe.get("timeoutSeconds") or 1),
    )


async def check(probe: Mapping[str, Any], host: str, ports: Mapping[str, int], run: Exec) -> str | None:
    """Perform a probe once; returns a sentence about why it failed. host: the pod's address."""
    timeout_s = timing(probe)[2]
    try:
        with trio.fail_after(timeout_s):
            if action := probe.get("exec"):
                return await run(list(action.get("command") or []), timeout_s)
            if action := probe.get("httpGet"):
                return await _http(action, action.get("host") or host, port_of(action, ports))
            if action := probe.get("tcpSocket"):
                stream = await trio.open_tcp_stream(action.get("host") or host, port_of(action, ports))
                await trio.aclose_forcefully(stream)
                return None
            if action := probe.get("grpc"):
                return await _grpc(host, int(action["port"]), action.get("service") or "")
    except trio.TooSlowError:
        return f"no answer within {timeout_s:g} s"
    except (OSError, ssl.SSLError, trio.BrokenResourceError, ValueError, KeyError) as error:
        return str(error) or type(error).__name__
    return "the probe names no action"


def port_of(action: Mapping[str, Any], ports: Mapping[str, int]) -> int:
    """The number of a probe's port, which may be a name of the container's; raises ValueError."""
    port = action.get("port")
    if isinstance(port, str) and not port.isdigit():
        if port not in ports:
            raise ValueError(f"the container has no port named {port}")
        return ports[port]
    return int(port or 0)


async def _http(action: Mapping[str, Any], host: str, port: int) -> str | None:
    stream: trio.abc.Stream = await trio.open_tcp_stream(host, port)
    try:
        if str(action.get("scheme") or "HTTP").upper() == "HTTPS":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the kubelet verifies nothing either
            stream = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
        headers = {"Host": f"[{host}]:{port}" if ":" in host else f"{host}:{port}", "User-Agent": "pillion-local-probe", "Accept": "*/*"}
        headers |= {str(header["name"]): str(header["value"]) for header in action.get("httpHeaders") or []}
        lines = [f"GET {action.get('path') or '/'} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "Connection: close"]
        await stream.send_all("\r\n".join([*lines, "", ""]).encode())
        answer, whole = b"", port == ADMIN_PORT  # a sidecar's answer says why an app's probe failed
        while (whole or b"\n" not in answer) and len(answer) < _ANSWER_MAX:
            chunk = await stream.receive_some(_ANSWER_MAX)
            if not chunk:
                break
            answer += chunk
    finally:
        await trio.aclose_forcefully(stream)
    words = answer.partition(b"\n")[0].split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        return "the answer is not HTTP"
    status = int(words[1])
    if 200 <= status < 400:
        return None
    return (_reason(answer) if whole else "") or f"HTTP status {status}"


def _reason(answer: bytes) -> str:
    """What a sidecar says about the probe that it made, "" if it is something else that listens there: text for a terminal."""
    body = answer.partition(b"\r\n\r\n")[2].decode("ascii", "replace").strip()
    return body.removeprefix(_FAILED) if body.startswith(_FAILED) and body.isprintable() else ""


async def _grpc(host: str, port: int, service: str) -> str | None:
    from proxy.protocol.grpc_health import HealthCheck, NotHealthy  # the codec takes memory, and few pods have such a probe

    health = HealthCheck(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", service)
    stream = await trio.open_tcp_stream(host, port)
    try:
        await stream.send_all(health.request)
        while not health.done:
            chunk = await stream.receive_some(16 * 1024)
            if not chunk:
                health.ended()
            if answer := health.received_untrusted(bytes(chunk)):
                await stream.send_all(answer)
    except NotHealthy as error:
        return str(error)
    finally:
        await trio.aclose_forcefully(stream)
    return None
