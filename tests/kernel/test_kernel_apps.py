"""Real applications over two accelerated hops (app, sidecar, app), compared with the same over TCP: equal bytes, and bytes past TCP."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hop_checks
import pytest
from lab import ACCELERATED, CAPTURED, PATIENCE_S, SCALE, SIDECAR_UID, TARGET, Failed, LabPod, rounds
from relay_sidecar import relay

from ebpf.layout import Counter, PodFlag, PortKind

pytestmark = pytest.mark.kernel

APPS = Path(__file__).parent / "apps"
LEVELS = [
    pytest.param(CAPTURED, id="tcp"),
    pytest.param(ACCELERATED, id="past-tcp"),
    pytest.param(ACCELERATED | PodFlag.RESUME, id="resuming"),
]


@pytest.fixture(params=LEVELS)
def meshed(pod: LabPod, request: pytest.FixtureRequest, accelerated: PodFlag) -> Iterator[LabPod]:
    """A pod with a sidecar; at the end, what it moved past TCP is what the level says."""
    pod.attach(request.param | accelerated if request.param & PodFlag.ACCELERATE else request.param)
    pod.start(relay, uid=SIDECAR_UID).result()
    yield pod
    counts = pod.counts()
    assert counts[Counter.CAPTURED] > 0
    assert (counts[Counter.MESSAGES] > 0) == bool(request.param & PodFlag.ACCELERATE), counts


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder that every uid may read, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="pillion-kernel-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def site(public: Path) -> Path:
    """A large and a small file."""
    (public / "small").write_bytes(b"small\n")
    (public / "large").write_bytes(random.Random(3).randbytes(int(20e6 * min(1, SCALE * 4))))
    return public


def _nginx(pod: LabPod, site: Path, listen: str = "") -> subprocess.Popen[bytes]:
    """One process of it, which stores what is PUT."""
    config = site / f"nginx-{pod.name}.conf"
    temporary = "\n".join(f"{kind}_temp_path /tmp/{pod.name}-{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    config.write_text(
        f"daemon off; master_process off; pid /dev/null; error_log stderr; events {{}}\n"
        f"http {{ access_log off; sendfile on; tcp_nopush on; {temporary}\n"
        f"server {{ listen 127.0.0.1:8080 {listen}; root {site}; dav_methods PUT; client_body_buffer_size 8k; }} }}\n"
    )
    server = pod.popen(["nginx", "-c", str(config)], stderr=subprocess.DEVNULL, uid=0)
    pod.wait_port(8080)
    return server


@pytest.mark.needs("nginx", "curl")
def test_curl_reads_files_of_nginx(meshed: LabPod, site: Path) -> None:
    """sendfile(2) and TCP_CORK on one side, one connection for several requests on the other."""
    _nginx(meshed, site)
    url = f"http://{TARGET}:8080"
    got = meshed.output(["curl", "-sS", "--max-time", str(PATIENCE_S), f"{url}/large", f"{url}/small", f"{url}/large"])
    assert got == (site / "large").read_bytes() + b"small\n" + (site / "large").read_bytes()


@pytest.mark.needs("nginx", "wrk")
def test_wrk_loads_nginx(meshed: LabPod, site: Path) -> None:
    _nginx(meshed, site)
    said = meshed.output(["wrk", "-t1", "-c16", "-d1", f"http://{TARGET}:8080/small"]).decode()
    assert "Requests/sec" in said
    assert "Socket errors" not in said, said
    assert "Non-2xx" not in said, said


def _put(name: str, body: bytes, tell: Callable[..., None]) -> None:
    """As the sidecar; tells when all of it is on its way, and ends with the answer."""
    with socket.create_connection(("127.0.0.1", 8080), PATIENCE_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(f"PUT /{name} HTTP/1.1\r\nHost: app\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        tell(None)
        tell(hop_checks.read_all(sock)[:12])


@pytest.mark.needs("nginx")
@pytest.mark.parametrize("listen", ["", "deferred"])
def test_nginx_takes_a_body_that_waits_for_it(pod: LabPod, site: Path, accelerated: PodFlag, listen: str) -> None:
    """It believes FIONREAD after each full buffer, and no edge comes for what was there before. deferred: the first bytes go by TCP."""
    pod.attach(accelerated)
    site.chmod(0o777)
    server = _nginx(pod, site, listen)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        client = pod.start(_put, pod.name, body := random.Random(5).randbytes(40_000), uid=SIDECAR_UID)
        client.result()
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert client.result(PATIENCE_S) == b"HTTP/1.1 201"
    assert (site / pod.name).read_bytes() == body
    counts = pod.counts()
    assert counts[Counter.PAIRED] == 1, counts
    assert counts[Counter.ACCELERATED] == (0 if listen and not accelerated & PodFlag.ONE_WAY else 1), counts


@pytest.mark.needs("haproxy", "nginx", "curl")
@pytest.mark.parametrize("options", ["", "option splice-auto"], ids=["recv", "splice"])
def test_curl_through_haproxy(meshed: LabPod, site: Path, options: str) -> None:
    """With splice(2) its port must be opted out, as the documentation says; so it stays on TCP."""
    if options:
        meshed.node.write_ports(meshed.cookie, PortKind.NOT_ACCELERATED, [(9090, 9090)])
    _nginx(meshed, site)
    config = site / f"haproxy-{meshed.name}.cfg"
    config.write_text(
        f"defaults\n mode http\n timeout connect 30s\n timeout client 30s\n timeout server 30s\n {options}\n"
        "listen all\n bind 127.0.0.1:9090\n server app 127.0.0.1:8080\n"
    )
    meshed.popen(["haproxy", "-db", "-f", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    meshed.wait_port(9090)
    if options:
        meshed.output(["curl", "-sS", "--max-time", str(PATIENCE_S), f"http://{TARGET}:8080/small"])  # by the accelerated port
    got = meshed.output(["curl", "-sS", "--max-time", str(PATIENCE_S), f"http://{TARGET}:9090/large"])
    assert got == (site / "large").read_bytes()


@pytest.mark.needs("redis-server", "redis-cli", "redis-benchmark")
def test_redis(meshed: LabPod, site: Path) -> None:
    meshed.popen(["redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--dir", "/tmp"], stdout=subprocess.DEVNULL)
    meshed.wait_port(6379)
    client = ["redis-cli", "-h", TARGET, "-p", "6379"]
    value = hashlib.sha256(b"value").hexdigest() * 200
    assert meshed.output([*client, "set", "key", value]).strip() == b"OK"
    assert meshed.output([*client, "get", "key"]).strip().decode() == value
    load = ["redis-benchmark", "-h", TARGET, "-n", str(rounds(5000)), "-c", "20", "-P", "8", "-d", "300", "-t", "set,get", "-q"]
    assert b"requests per second" in meshed.output(load)


@pytest.fixture(scope="module")
def go_echo(public: Path) -> Path:
    """echo.go, compiled."""
    subprocess.run(["go", "build", "-o", str(public / "echo"), str(APPS / "echo.go")], check=True, capture_output=True, cwd=public)
    return public / "echo"


@pytest.mark.needs("go")
def test_go_net_http(meshed: LabPod, go_echo: Path) -> None:
    meshed.popen([str(go_echo), "serve", "8080"])
    meshed.wait_port(8080)
    number = rounds(100)
    got = meshed.output([str(go_echo), "call", f"http://{TARGET}:8080/", "160000", str(number)]).decode().strip()
    assert got == hashlib.sha256(b"0123456789abcdef" * 10000 * number * 4).hexdigest()


@pytest.mark.needs("go", "nginx", "curl")
def test_go_that_splices_must_be_opted_out(pod: LabPod, go_echo: Path, site: Path) -> None:
    """io.Copy from one TCP connection to another splices: it hangs on an accelerated socket, and works when its port is opted out."""
    pod.attach(ACCELERATED)
    pod.start(relay, uid=SIDECAR_UID).result()
    _nginx(pod, site)
    pod.popen([str(go_echo), "splice", "9191", "127.0.0.1:8080"])
    pod.wait_port(9191)
    call = ["curl", "-sS", f"http://{TARGET}:9191/small", "--max-time"]
    with pytest.raises(Failed, match="exit code"):
        pod.output([*call, "2"])
    pod.node.write_ports(pod.cookie, PortKind.NOT_ACCELERATED, [(9191, 9191)])
    assert pod.output([*call, str(PATIENCE_S)]) == b"small\n"


@pytest.mark.needs("node")
def test_node_http(meshed: LabPod) -> None:
    meshed.popen(["node", str(APPS / "echo.js"), "serve", "8080"])
    meshed.wait_port(8080)
    number = rounds(200)
    got = meshed.output(["node", str(APPS / "echo.js"), "call", TARGET, "8080", "160000", str(number)]).decode().strip()
    assert got == hashlib.sha256(b"0123456789abcdef" * 10000 * number).hexdigest()


def _grpc_server(tell: Callable[..., None]) -> None:
    from concurrent import futures

    import grpc

    def echo(request: bytes, _: object) -> bytes:
        return request

    def stream(requests: Iterator[bytes], _: object) -> Iterator[bytes]:
        yield from requests

    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo), "Stream": grpc.stream_stream_rpc_method_handler(stream)}
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    server.add_insecure_port("127.0.0.1:8080")
    server.start()
    tell(None)
    server.wait_for_termination()


def _grpc_client(number: int) -> bool:
    import grpc

    with grpc.insecure_channel(f"{TARGET}:8080") as channel:
        echo = channel.unary_unary("/test.Echo/Echo")
        stream = channel.stream_stream("/test.Echo/Stream")
        messages = [random.Random(turn).randbytes(1 + turn * 500) for turn in range(number)]
        echoed = [echo(message, timeout=PATIENCE_S) for message in messages]
        return echoed == messages and list(stream(iter(messages), timeout=2 * PATIENCE_S)) == messages


def _in_own_interpreter(pod: LabPod, function: str, *args: str, **more: object) -> subprocess.Popen[bytes]:
    """gRPC must not be forked from a process that used it."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    code = f"import sys; sys.path[:0] = {folders!r}; import test_kernel_apps as t; {function}"
    return pod.popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, **more)


def test_grpc(meshed: LabPod) -> None:
    server = _in_own_interpreter(meshed, "t._grpc_server(lambda _: print(flush=True))")
    assert server.stdout
    assert server.stdout.readline()
    client = _in_own_interpreter(meshed, f"print(t._grpc_client({rounds(100)}))")
    assert client.communicate(timeout=4 * PATIENCE_S)[0].strip() == b"True"


def _blocking_server(tell: Callable[..., None]) -> None:
    listener = socket.create_server(("127.0.0.1", 8080))
    tell(None)
    while True:
        sock, _ = listener.accept()
        sock.sendall(hashlib.sha256(hop_checks.read_all(sock)).digest())
        sock.close()


def _blocking_client(number: int) -> int:
    right = 0
    for turn in range(number):
        data = random.Random(turn).randbytes(random.Random(turn).randrange(1, 100000))
        with socket.create_connection((TARGET, 8080), PATIENCE_S) as sock:
            sock.settimeout(None)
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            right += hop_checks.read_all(sock) == hashlib.sha256(data).digest()
    return right


def test_blocking_sockets(meshed: LabPod) -> None:
    meshed.start(_blocking_server).result()
    number = rounds(200)
    assert meshed.run(_blocking_client, number) == number


# --- asyncio, and two hundred of them --------------------------------------------------------------------------------------------------

_NOISE = random.Random(11).randbytes(1 << 20)


def _stress_server(tell: Callable[..., None]) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                size, answer, pause = struct.unpack("=IIf", await reader.readexactly(12))
                data = await reader.readexactly(size)
                if pause:
                    await asyncio.sleep(pause)
                writer.write(hashlib.md5(data, usedforsecurity=False).digest() + _NOISE[:answer])
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 8080, backlog=1024)
        tell(None)
        await server.serve_forever()

    asyncio.run(main())


def _stress_clients(tasks: int, seconds: float) -> dict[str, int]:
    seen = {"requests": 0, "wrong": 0, "errors": 0, "hung": 0}
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        pick = random.Random(number)
        while time.monotonic() < end:
            try:
                reader, writer = await asyncio.open_connection(TARGET, 8080, limit=1 << 21)
                for _ in range(pick.choice([1, 1, 3, 20])):
                    sent = []
                    for _ in range(pick.choice([1, 1, 4])):
                        size, answer = (pick.choice([0, 10, 1000, 20000, pick.randrange(1 << 18)]) for _ in range(2))
                        at = pick.randrange(len(_NOISE) - size)
                        data = _NOISE[at : at + size]
                        writer.write(struct.pack("=IIf", size, answer, pick.choice([0, 0, 0, 0.002])) + data)
                        sent.append((data, answer))
                    for data, answer in sent:
                        got = await asyncio.wait_for(reader.readexactly(16 + answer), PATIENCE_S)
                        seen["wrong"] += got != hashlib.md5(data, usedforsecurity=False).digest() + _NOISE[:answer]
                        seen["requests"] += 1
                if pick.random() < 0.3:
                    writer.transport.abort()
                else:
                    writer.close()
            except TimeoutError:
                seen["hung"] += 1
            except (OSError, asyncio.IncompleteReadError):
                seen["errors"] += 1

    async def main() -> None:
        await asyncio.gather(*(client(number) for number in range(tasks)))

    asyncio.run(main())
    return seen


def test_two_hundred_asyncio_clients(meshed: LabPod) -> None:
    """Pipelining, pauses, aborts: not one wrong byte, error or hang."""
    meshed.start(_stress_server).result()
    seen = meshed.run(_stress_clients, 200 if SCALE >= 1 else 40, 3.0)
    assert seen["requests"] > 200 * min(SCALE, 1)
    assert (seen["wrong"], seen["errors"], seen["hung"]) == (0, 0, 0), seen
