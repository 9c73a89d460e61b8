"""A mesh to attack: one for all suites that do so. Tests hold sockets inside the pods themselves, so that an attack is a few lines.

`Arena.dial` makes a socket in a pod's network namespace from the test process: what comes out of it is what an app of that pod could
send (the test's uid is not the sidecar's, so capture applies). Commands that need the app's own uid go through ``exec``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from local_lab import PATIENCE_S, LocalMesh, command_line, wait_until

from local import namespaces

T = TypeVar("T")

APP = Path(__file__).with_name("arena_app.py")
HTTP, OPAQUE, HTTP2, PLAIN = 8080, 8081, 8082, 8083

_POD = """
      serviceAccountName: {name}
      terminationGracePeriodSeconds: 3
      containers:
      - name: app
        command: {command}
"""

_APP_POD = (
    _POD.replace("{command}", "[python, /srv/arena/arena_app.py]")
    + """
        ports: [{{containerPort: 8080, name: http}}, {{containerPort: 8081, name: opaque}}, {{containerPort: 8082, name: h2}}]
        readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
        livenessProbe:
          httpGet: {{path: /admin/health, port: 8080, httpHeaders: [{{name: authorization, value: s3cret-of-the-probe}}]}}
          periodSeconds: 2
        volumeMounts: [{{name: app, mountPath: /srv/arena}}]
      volumes: [{{name: app, configMap: {{name: app}}}}]
"""
)


def _workload(name: str, body: str, kind: str = "Deployment", replicas: int = 1, extra: str = "", annotations: str = "{}") -> str:
    return f"""
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: arena}}
---
apiVersion: apps/v1
kind: {kind}
metadata: {{name: {name}, namespace: arena}}
spec:
  replicas: {replicas}
  {extra}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}, annotations: {annotations}}}
    spec:{body.format(name=name)}
---
"""


def _service(name: str, ip: str = "") -> str:
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: arena}}
spec:
  {ip}
  ipFamilyPolicy: PreferDualStack
  selector: {{app: {name}}}
  ports: [{{name: a, port: 8080}}, {{name: b, port: 8081}}, {{name: c, port: 8082}}, {{name: d, port: 8083}}]
---
"""


NAMESPACE = """
apiVersion: v1
kind: Namespace
metadata: {name: arena, annotations: {pillion.dev/inject: enabled}}
"""

_IDLE = _POD.replace("{command}", "[sleep, infinity]")

WORKLOADS = (
    _workload("web", _APP_POD)
    + _workload("db", _APP_POD, "StatefulSet", 2, "serviceName: db")
    + _workload("client", _IDLE)
    + _workload("admin", _IDLE)
    + _workload("stranger", _IDLE, annotations="{pillion.dev/inject: disabled}")
    + _service("web")
    + _service("db", "clusterIP: None")
)

POLICY = """
apiVersion: policy.pillion.dev/v1alpha1
kind: Server
metadata: {name: web-http, namespace: arena}
spec: {podSelector: {matchLabels: {app: web}}, port: http, proxyProtocol: HTTP/1}
---
apiVersion: policy.pillion.dev/v1alpha1
kind: Server
metadata: {name: web-h2, namespace: arena}
spec: {podSelector: {matchLabels: {app: web}}, port: h2, proxyProtocol: HTTP/2}
---
apiVersion: policy.pillion.dev/v1alpha1
kind: Server
metadata: {name: web-opaque, namespace: arena}
spec: {podSelector: {matchLabels: {app: web}}, port: opaque, proxyProtocol: opaque}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: all, namespace: arena}
spec:
  parentRefs:
  - {group: policy.pillion.dev, kind: Server, name: web-http}
  - {group: policy.pillion.dev, kind: Server, name: web-h2}
  rules: [{matches: [{path: {type: PathPrefix, value: /}}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: admin, namespace: arena}
spec:
  parentRefs:
  - {group: policy.pillion.dev, kind: Server, name: web-http}
  - {group: policy.pillion.dev, kind: Server, name: web-h2}
  rules: [{matches: [{path: {type: PathPrefix, value: /admin}}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: public, namespace: arena}
spec:
  parentRefs:
  - {group: policy.pillion.dev, kind: Server, name: web-http}
  - {group: policy.pillion.dev, kind: Server, name: web-h2}
  rules: [{matches: [{path: {type: PathPrefix, value: /public}, method: GET}]}]
---
apiVersion: policy.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: both-may, namespace: arena}
spec:
  targetRef: {group: gateway.networking.k8s.io, kind: HTTPRoute, name: all}
  requiredAuthenticationRefs: [{kind: MeshTLSAuthentication, group: policy.pillion.dev, name: both}]
---
apiVersion: policy.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: admin-may, namespace: arena}
spec:
  targetRef: {group: gateway.networking.k8s.io, kind: HTTPRoute, name: admin}
  inherit: false
  requiredAuthenticationRefs: [{kind: ServiceAccount, name: admin}]
---
apiVersion: policy.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: public-may, namespace: arena}
spec:
  targetRef: {group: gateway.networking.k8s.io, kind: HTTPRoute, name: public}
  requiredAuthenticationRefs: []
---
apiVersion: policy.pillion.dev/v1alpha1
kind: MeshTLSAuthentication
metadata: {name: both, namespace: arena}
spec: {identityRefs: [{kind: ServiceAccount, name: client}, {kind: ServiceAccount, name: admin}]}
"""

OPAQUE_MAY = """
apiVersion: policy.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: opaque-may, namespace: arena}
spec:
  targetRef: {group: policy.pillion.dev, kind: Server, name: web-opaque}
  requiredAuthenticationRefs: [{kind: ServiceAccount, name: client}]
"""


@dataclass
class Reply:
    """An answer: status 0 means that the connection ended without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def told(self) -> dict[str, Any]:
        """What the app said that it saw."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    def saw(self, name: str) -> list[str]:
        """Values of a header field as the app saw them."""
        return [value for key, value in self.told["fields"] if key.lower() == name]


class Arena(LocalMesh):
    """The running mesh and ways into its pods."""

    def start(self) -> None:
        """Write the manifests and come up; raises AssertionError with the runner's log."""
        app = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "app", "namespace": "arena"}}
        (self.folder / "app.json").write_text(json.dumps({**app, "data": {"arena_app.py": APP.read_text()}}))
        (self.folder / "namespace.yaml").write_text(NAMESPACE)
        (self.folder / "workloads.yaml").write_text(WORKLOADS)
        (self.folder / "policy.yaml").write_text(POLICY)
        (self.folder / "opaque-may.yaml").write_text(OPAQUE_MAY)
        up = self.up("--capture", os.environ.get("PILLION_TEST_CAPTURE", "auto"))
        assert up.returncode == 0, up.stderr + (self.state / "runner.log").read_text()
        self._pids: dict[tuple[str, str], tuple[str, int]] = {}

    # --- who is where ---------------------------------------------------------------------------------------------------

    def pod(self, workload: str) -> str:
        """The name of a pod, of a ready one if there is one."""
        found = [(not pod["ready"], name) for name, pod in self.pods().items() if name.startswith(workload)]
        return min(found)[1]

    def ip(self, workload: str, family: int = 0) -> str:
        """A pod's address, IPv4 or IPv6."""
        found: str = self.pods()[self.pod(workload)]["addresses"][family]
        return found

    @property
    def level(self) -> int:
        """How its meshed pods are captured (ebpf.plan)."""
        levels = {pod["level"] for pod in self.pods().values() if pod["meshed"]}
        assert len(levels) == 1, levels
        return int(levels.pop())

    def vip(self, service: str, family: int = 0) -> str:
        """A Service's address."""
        found: str = next(one for one in self.status()["services"] if one["name"] == service)["addresses"][family]
        return found

    def pid(self, workload: str, program: str = "") -> int:
        """A process of a pod: its app, or the one whose command line ends in ``program`` (``proxy`` for the sidecar)."""
        key = (workload, program)
        name, known = self._pids.get(key, ("", 0))
        if not name or not _is(known, name, program):  # numbers are used again
            name = self.pod(workload)
            known = next(pid for pid in self.members() if _is(pid, name, program))
            self._pids[key] = name, known
        return known

    def sidecar(self, workload: str) -> int:
        """The pid of a pod's sidecar."""
        return self.pid(workload, "proxy")

    def pss_kib(self, workload: str) -> int:
        """What a pod's sidecar costs in memory, shared pages divided by their users."""
        lines = Path(f"/proc/{self.sidecar(workload)}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

    def part(self, name: str) -> int:
        """The pid of ``identity`` or ``policy``."""
        (found,) = self.parts(name)
        return found

    @contextlib.contextmanager
    def unattended(self) -> Iterator[None]:
        """The runner starts nothing again for the length of a block: what is killed in it stays dead for as long as the test looks."""
        runner = self.runner_pid()
        os.kill(runner, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(runner, signal.SIGCONT)

    # --- sockets in pods ------------------------------------------------------------------------------------------------

    def inside(self, pid: int, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread inside the network namespace of a process."""
        found: list[T] = []
        failed: list[BaseException] = []

        def body() -> None:
            try:
                namespaces.enter(pid, ("net",))
                found.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def dial(self, workload: str, ip: str, port: int, timeout_s: float = PATIENCE_S) -> socket.socket:
        """A TCP connection made by an app of the pod."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        sock = self.inside(self.pid(workload), lambda: socket.socket(family, socket.SOCK_STREAM))
        sock.settimeout(timeout_s)
        try:
            sock.connect((ip, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def ask(self, workload: str, ip: str, port: int, target: str = "/", *fields: str, method: str = "GET", body: bytes = b"") -> Reply:
        """One HTTP/1.1 request."""
        lines = [f"{method} {target} HTTP/1.1", "host: web", "connection: close", *fields]
        if body:
            lines.append(f"content-length: {len(body)}")
        return self.raw(workload, ip, port, "\r\n".join([*lines, "", ""]).encode("latin-1") + body, most=1)[0]

    def raw(
        self, workload: str, ip: str, port: int, data: bytes, more_s: float = 3, most: int = 9, wait_s: float = PATIENCE_S
    ) -> list[Reply]:
        """Bytes as they are; up to ``most`` answers, until the connection ends, none came in ``wait_s`` or no other follows for ``more_s``.
        At least one element."""
        try:
            with self.dial(workload, ip, port, wait_s) as sock:
                sock.sendall(data)
                return read_replies(sock, most, more_s) or [Reply(0)]
        except OSError as error:
            return [Reply(0, body=repr(error).encode())]

    def seen(self, workload: str = "web") -> list[str]:
        """What the app saw, asked over its own loopback, where no sidecar is."""
        found: list[str] = self.raw(workload, "127.0.0.1", HTTP, b"GET /seen HTTP/1.1\r\n\r\n", most=1)[0].told  # type: ignore[assignment]
        return found

    # --- policy ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def edited(self, file: str, change: Callable[[str], str] | None) -> Iterator[None]:
        """A file of the mesh's folder changed (None: removed) for the length of a block."""
        path = self.folder / file
        before = path.read_text()
        if change is None:
            path.unlink()
        else:
            path.write_text(change(before))
        try:
            yield
        finally:
            path.write_text(before)


def read_replies(sock: socket.socket, most: int, more_s: float = 3) -> list[Reply]:
    """Answers until the connection ends, is reset, or nothing comes: first for the socket's timeout, then for ``more_s``."""
    data, ended = b"", False
    replies: list[Reply] = []
    while True:
        while (one := _take_reply(data, ended=ended)) is not None:
            reply, data = one
            replies.append(reply)
            sock.settimeout(more_s)
            if reply.headers.get("connection") == "close" or len(replies) == most:
                return replies
        if ended:
            return replies
        try:
            more = sock.recv(1 << 16)
        except OSError:
            more = b""
        ended, data = not more, data + more


def _take_reply(data: bytes, *, ended: bool) -> tuple[Reply, bytes] | None:
    head, gap, rest = data.partition(b"\r\n\r\n")
    if not gap:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(first.split(" ")[1])
    length = int(headers.get("content-length", "0"))
    if len(rest) < length and not ended:
        return None
    return Reply(status, headers, rest[:length]), rest[length:]


def _is(pid: int, pod: str, program: str) -> bool:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    words = command_line(pid)
    if f"HOSTNAME={pod}".encode() not in environ or not words:
        return False
    return words[-1] == program if program else words[-1] != "proxy"


class Wire:
    """Everything that passes the node's side of the pods' links, as a captor on the network would have it."""

    def __init__(self, arena: Arena) -> None:
        self._sock = arena.inside(arena.runner_pid(), lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)))
        self._sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: nothing may be missed
        self._sock.settimeout(0.3)
        self.frames: list[bytes] = []

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        with self._sock:
            try:
                while True:
                    self.frames.append(self._sock.recv(1 << 17))
            except TimeoutError:
                pass
            dropped = struct.unpack("II", self._sock.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
            assert dropped == 0, f"{dropped} packets were not captured: nothing can be said"

    @property
    def bytes(self) -> bytes:
        """All frames in one."""
        return b"\0\0\0\0".join(self.frames)


class Outside:
    """A network namespace with 198.51.100.2 and an HTTP/1.0 echo on port 80; ends with `close`."""

    IP = "198.51.100.2"

    def __init__(self, arena: Arena) -> None:
        self._holder = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "-n", "sleep", "infinity"])
        wait_until(lambda: os.readlink(f"/proc/{self._holder.pid}/ns/net") != os.readlink("/proc/self/ns/net"), "the namespace is there")
        node = ["nsenter", "-t", str(arena.runner_pid()), "-n", "ip"]
        there = ["nsenter", "-t", str(self._holder.pid), "-n", "ip"]
        for words in (
            [*node, "link", "add", "outside", "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid)],
            [*node, "address", "add", "198.51.100.1/24", "dev", "outside"],
            [*node, "link", "set", "outside", "up"],
            [*there, "address", "add", f"{self.IP}/24", "dev", "eth0"],
            [*there, "link", "set", "eth0", "up"],
            [*there, "route", "add", "default", "via", "198.51.100.1"],
        ):
            subprocess.run(words, check=True)
        self.pid = self._holder.pid
        self._listener = arena.inside(self.pid, lambda: socket.create_server((self.IP, 80)))
        self.heard: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                self.heard.append(peer.recv(1 << 16))
                peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\nconnection: close\r\n\r\noutside")

    def close(self) -> None:
        """The namespace and its link are gone."""
        self._listener.close()
        self._holder.kill()
        self._holder.wait()


class Load:
    """Requests from a pod for the length of a block, one after the other. failed: (began, ended, what came) of each that was not served."""

    def __init__(self, ask: Callable[[], int], tasks: int = 2, pause_s: float = 0.01) -> None:
        self._ask, self._pause_s = ask, pause_s
        self._over = threading.Event()
        self.done: list[float] = []
        self.failed: list[tuple[float, float, str]] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(tasks)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def goes_on(self, more: int = 20) -> None:
        """Until so many more requests were served."""
        wanted = len(self.done) + more
        wait_until(lambda: len(self.done) >= wanted, "the load goes on")

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                status = self._ask()
                said = "" if status == 200 else f"status {status}"
            except OSError as error:
                said = repr(error)
            if said:
                self.failed.append((began, time.monotonic(), said))
            else:
                self.done.append(began)
            self._over.wait(self._pause_s)
