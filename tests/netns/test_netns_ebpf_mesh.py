"""The whole mesh over eBPF: real sidecars, real control plane. What apps see, what options change, and an agent that dies under load.

The other suites of this folder run over the best level of the machine too; here is what only eBPF has.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_lab import COMMAND, LocalMesh, command_line, wait_until

from ebpf import client
from ebpf.plan import CONNECT, NFT
from ebpf.wire import Status

pytestmark = [pytest.mark.netns, pytest.mark.kernel, pytest.mark.slow]

APP = '''
import http.server, json, socket, socketserver, threading

class Http(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = json.dumps({"accept": self.client_address[:2], "peername": self.connection.getpeername()[:2]}).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, address_family = True, socket.AF_INET6

def opaque():
    listener = socket.create_server(("::", 9000), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        sock, peer = listener.accept()
        def serve(sock=sock, peer=peer):
            with sock:
                while data := sock.recv(65536):
                    sock.sendall(json.dumps({"accept": peer[:2], "peername": sock.getpeername()[:2], "got": len(data)}).encode() + b"\\n")
        threading.Thread(target=serve, daemon=True).start()

threading.Thread(target=opaque, daemon=True).start()
Server(("::", 8080), Http).serve_forever()
'''  # fmt: skip

ASK = """
import json, socket, sys
ip, port, word = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
sock = socket.create_connection((ip, port), timeout=30)
sock.sendall(word.replace(b"|", b"\\r\\n"))
data = b""
while b"}" not in data:
    more = sock.recv(65536)
    data += more
    if not more or data[:7] == b"HTTP/1." and data[9:12] != b"200":
        sys.exit(f"no answer of the app: {data!r}")
print(json.dumps({"own": sock.getsockname()[:2], "peername": sock.getpeername()[:2],
                  "seen": json.loads(data[data.index(b"{"):data.index(b"}") + 1])}))
"""

MANIFESTS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {pillion.dev/inject: enabled}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: tools, namespace: shop}
data:
  app.py: |
%s
  ask.py: |
%s
""" % tuple("\n".join("    " + line for line in text.splitlines()) for text in (APP, ASK))  # noqa: UP031 -- braces are YAML's here


def workload(name: str, **annotations: str) -> str:
    options = ", ".join(f'config.pillion.dev/{key.replace("_", "-")}: "{value}"' for key, value in annotations.items())
    return f"""
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}, annotations: {{{options}}}}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - name: app
        command: [python3, /srv/tools/app.py]
        ports: [{{containerPort: 8080, name: http}}, {{containerPort: 9000, name: opaque}}]
        readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
        volumeMounts: [{{name: tools, mountPath: /srv/tools}}]
      volumes: [{{name: tools, configMap: {{name: tools}}}}]
"""


class Mesh(LocalMesh):
    """Ways into it."""

    def agent(self) -> dict[str, Any]:
        """What the agent says of itself and the pods."""
        return client.ask(self.state / "agent.sock", Status())

    def pod(self, name: str) -> dict[str, Any]:
        """A workload's pod, as the runner shows it."""
        return next(pod for pod in self.pods().values() if pod["name"].startswith(f"{name}-"))

    def counters(self, name: str) -> dict[str, int]:
        """The programs' counters of a workload's pod."""
        found: dict[str, int] = next(pod["counters"] for pod in self.agent()["pods"] if pod["name"].startswith(f"{name}-"))
        return found

    def ask(self, caller: str, target: str, family: int = 0, port: int = 8080, word: str = "GET / HTTP/1.1|host: x||") -> dict[str, Any]:
        """What an app sees of a caller, and the caller of it."""
        ip = self.pod(target)["addresses"][family]
        done = self.run("exec", "-n", "shop", caller, "--", "python3", "/srv/tools/ask.py", ip, str(port), word)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found | {"ip": ip}

    def agent_pid(self) -> int:
        """The agent's process on this machine, 0 while there is none."""
        return next((pid for pid in self.members() if "ebpf.agent" in command_line(pid)), 0)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    found = Mesh(f"em{os.getpid()}", tmp_path_factory.mktemp("mesh"))
    plain = workload("plain", accelerate="false", real_caller="false")
    (found.folder / "shop.yaml").write_text(
        MANIFESTS + workload("web") + workload("client") + plain + workload("port", unaccelerated_ports="http")
    )
    up = found.up("--capture", "ebpf")
    try:
        assert up.returncode == 0, up.stderr + (found.state / "runner.log").read_text()
        yield found
    finally:
        found.run("down")


FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])


def test_every_pod_is_on_the_first_rung_and_status_says_so(mesh: Mesh) -> None:
    assert {(pod["level"], pod["capture"]) for pod in mesh.pods().values()} == {(CONNECT, "connect + sk_lookup + sockmap")}
    assert "connect + sk_lookup + sockmap" in mesh.run("status").stdout
    assert "capture: connect + sk_lookup + sockmap" in mesh.status()["notes"]


@FAMILIES
@pytest.mark.parametrize(("port", "word"), [(8080, "GET / HTTP/1.1|host: x||"), (9000, "hello")], ids=["http", "opaque"])
def test_the_app_sees_its_real_caller(mesh: Mesh, family: int, port: int, word: str) -> None:
    caller = mesh.pod("client")["addresses"][family]
    found = mesh.ask("client", "web", family, port, word)
    prefix = "::ffff:" if family == 0 else ""
    for view in ("accept", "peername"):
        ip, number = found["seen"][view]
        assert ip == prefix + caller, view
        assert number > 1023
    assert found["seen"]["accept"] == found["seen"]["peername"]
    assert found["peername"] == [found["ip"], port], "and the caller sees whom it dialled"


@FAMILIES
def test_a_pod_may_keep_the_usual_behaviour(mesh: Mesh, family: int) -> None:
    own = mesh.pod("plain")["addresses"][family]
    prefix = "::ffff:" if family == 0 else ""
    assert mesh.ask("client", "plain", family)["seen"]["accept"][0] == prefix + own, "the sidecar dials the pod's own address"


def test_a_pod_and_a_port_may_go_without_acceleration(mesh: Mesh) -> None:
    for _ in range(3):
        mesh.ask("client", "plain")
        mesh.ask("client", "port")
    assert mesh.counters("plain")["messages"] == 0 and mesh.counters("plain")["steered"] >= 1
    before = mesh.counters("port")["bytes"]
    mesh.ask("client", "port")
    assert mesh.counters("port")["bytes"] == before, "nothing of port 8080"
    mesh.ask("client", "port", port=9000, word="hello")
    wait_until(lambda: mesh.counters("port")["bytes"] > before, "the other port is accelerated")


def test_what_is_accelerated_is_counted(mesh: Mesh) -> None:
    before = mesh.counters("web")
    for _ in range(5):
        mesh.ask("client", "web")
    after = mesh.counters("web")
    grown = {name: after[name] - before[name] for name in after}
    assert grown["bytes"] > 5 * len("GET / HTTP/1.1") and grown["messages"] >= 5, "requests and answers between sidecar and app"
    assert grown["by_tcp_memory"] == grown["by_tcp_full"] == grown["refused_callers"] == 0
    assert after["callers"] > 0 and after["steered"] > 0 and after["paired"] > 0, "the callers' sidecar keeps its connections"


def test_a_killed_agent_is_started_again_and_nobody_notices(mesh: Mesh) -> None:
    ask = f"python3 /srv/tools/ask.py {mesh.pod('web')['addresses'][0]} 8080 'GET / HTTP/1.1|host: x||' > /dev/null || echo failed"
    script = f"{ask}; echo begun; for i in $(seq 40); do {ask}; done; echo done"
    words = [*COMMAND, "exec", "--name", mesh.name, "-n", "shop", "client", "--", "sh", "-c", script]
    load = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert load.stdout is not None and load.stdout.readline() == "begun\n"
    try:
        for _ in range(2):
            before = mesh.agent_pid()
            os.kill(before, signal.SIGKILL)
            wait_until(lambda before=before: _answers(mesh) and mesh.agent_pid() not in (0, before), "a new agent answers")
            assert {pod["level"] for pod in mesh.agent()["pods"]} == {CONNECT}
        out, _ = load.communicate(timeout=120)
    finally:
        load.kill()
    assert out == "done\n"
    assert mesh.agent()["node"]["resident_bytes"] < 20_000_000


def _answers(mesh: Mesh) -> bool:
    try:
        return bool(mesh.agent()["ok"])
    except client.NoAgent:
        return False


def test_a_sidecar_that_is_killed_comes_back_to_its_connections(mesh: Mesh) -> None:
    sidecar = next(container["pid"] for container in mesh.pod("web")["containers"] if container["name"] == "pillion-proxy")
    inner = next(pid for pid in mesh.members() if _inner_pid(pid) == sidecar and "proxy" in command_line(pid))
    os.kill(inner, signal.SIGKILL)
    wait_until(lambda: mesh.pod("web")["containers"][0]["restarts"] > 0 and mesh.pod("web")["ready"], "the sidecar runs again")
    wait_until(lambda: _works(mesh), "and is steered to")


def _works(mesh: Mesh) -> bool:
    try:
        return bool(mesh.ask("client", "web")["seen"])
    except AssertionError:
        return False


def _inner_pid(pid: int) -> int:
    """As the runner's PID namespace numbers it."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    numbers = next((line.split()[1:] for line in text.splitlines() if line.startswith("NSpid:")), [])
    return int(numbers[1]) if len(numbers) > 1 else 0


def test_capture_by_nftables_can_be_asked_for(tmp_path: Path) -> None:
    mesh = Mesh(f"en{os.getpid()}", tmp_path)
    (tmp_path / "shop.yaml").write_text(MANIFESTS + workload("web"))
    try:
        up = mesh.up("--capture", "nft")
        assert up.returncode == 0, up.stderr
        assert {(pod["level"], pod["capture"]) for pod in mesh.pods().values()} == {(NFT, "nftables")}
        assert "capture: nftables (--capture nft)" in mesh.status()["notes"] and not (mesh.state / "agent.sock").exists()
        own = mesh.pod("web")["addresses"][0]
        assert mesh.ask("web", "web")["seen"]["accept"][0] in (f"::ffff:{own}", "::ffff:127.0.0.1")
    finally:
        mesh.run("down")


def test_insisting_on_ebpf_where_it_does_not_work_says_why(tmp_path: Path) -> None:
    mesh = Mesh(f"ex{os.getpid()}", tmp_path)
    (tmp_path / "shop.yaml").write_text(MANIFESTS + workload("web"))
    words = [*COMMAND, "up", "--name", mesh.name, "-f", str(tmp_path), "--detach", "--capture", "ebpf"]
    hide = 'mount -t tmpfs none /sys/kernel/btf && exec "$0" "$@"'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", hide, *words], capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(mesh.state, ignore_errors=True)  # its log stays for whoever wonders
    assert (
        done.returncode == 1 and "/sys/kernel/btf/vmlinux is missing" in done.stderr and "--capture auto would use nftables" in done.stderr
    )
