"""HTTP/2, gRPC, opaque bytes and a rotation through the whole mesh, past TCP on both hops: the programs' counters say that they were.

What the mesh's own tests ask of these protocols is asked once more by calling them; gRPC comes with a server and a client of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import test_netns_interception as interception
import test_netns_requests as requests
import test_netns_robustness as robustness
import test_netns_wire as wire
from arena import OPAQUE, Arena
from local_lab import COMMAND, PATIENCE_S, command_line, wait_until

from ebpf import client
from ebpf.plan import CONNECT
from ebpf.wire import Status

pytestmark = [pytest.mark.netns, pytest.mark.kernel, pytest.mark.slow]

_BULK_BYTES = 16 << 20
_PIECE_BYTES = 64 << 10

_GRPC_SERVER = """
import sys, threading
from concurrent import futures
import grpc

ended = threading.Event()
rpcs = {
    "Echo": grpc.unary_unary_rpc_method_handler(lambda request, _: request),
    "Stream": grpc.stream_stream_rpc_method_handler(lambda requests, _: requests),
    "End": grpc.unary_unary_rpc_method_handler(lambda request, _: ended.set() or request),
}
server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", rpcs),))
server.add_insecure_port("[::]:50051")
server.start()
print("listening", flush=True)
ended.wait(120)
server.stop(5).wait()
"""
_GRPC_CLIENT = """
import random, sys
import grpc

with grpc.insecure_channel(f"{sys.argv[1]}:50051") as channel:
    messages = [random.Random(turn).randbytes(1 + turn * 500) for turn in range(100)]
    echo = channel.unary_unary("/test.Echo/Echo")
    assert [echo(message, timeout=60) for message in messages] == messages
    assert list(channel.stream_stream("/test.Echo/Stream")(iter(messages), timeout=60)) == messages
    channel.unary_unary("/test.Echo/End")(b"", timeout=60)
print("the same")
"""


_NGINX_PORT = 50062
_NGINX = """daemon off; master_process off; pid {folder}/pid; error_log stderr; events {{}}
http {{ access_log off; client_max_body_size 0; client_body_buffer_size 16k; client_body_temp_path {folder}/bodies;
proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
server {{ listen {port}; root {folder}; dav_methods PUT; }} }}
"""
_UPLOAD_BYTES = 8 << 20


@pytest.fixture(autouse=True)
def _on_the_first_rung(arena: Arena) -> Iterator[None]:
    if arena.level != CONNECT:
        pytest.skip(f"pods are captured on level {arena.level} here")
    yield
    wait_until(lambda: arena.status()["ready"], "everything is ready again")


def _counters(arena: Arena, workload: str) -> dict[str, int]:
    pods = client.ask(arena.state / "agent.sock", Status())["pods"]
    found: dict[str, int] = next(pod["counters"] for pod in pods if pod["name"] == arena.pod(workload))
    return found


@contextlib.contextmanager
def _past_tcp(arena: Arena, least_bytes: int = 1) -> Iterator[None]:
    """On both hops: between the client's app and its sidecar, and between web's."""
    before = {workload: _counters(arena, workload)["bytes"] for workload in ("client", "web")}
    yield
    grown = {workload: _counters(arena, workload)["bytes"] - before[workload] for workload in before}
    assert min(grown.values()) >= least_bytes, grown


AGAIN: dict[str, Callable[[Arena], None]] = {
    "HTTP/2": wire.test_http2_between_meshed_pods_is_tls_1_3,
    "HTTP/2, an identity that is checked": lambda arena: requests.test_the_same_in_http2(arena, requests.H2_FORGED[0]),
    "opaque, IPv4": lambda arena: interception.test_opaque_bytes_pass_both_sidecars(arena, 0),
    "opaque, IPv6": lambda arena: interception.test_opaque_bytes_pass_both_sidecars(arena, 1),
    "rotation": robustness.test_a_rotation_of_the_trust_anchor_fails_no_request,
}


@pytest.mark.parametrize("test", AGAIN.values(), ids=AGAIN)
def test_what_the_mesh_is_asked_holds_past_tcp(arena: Arena, test: Callable[[Arena], None]) -> None:
    with _past_tcp(arena):
        test(arena)


def test_opaque_megabytes_come_back_as_they_were(arena: Arena) -> None:
    """In pieces, each answered before the next: what is ahead of its reader may go by TCP."""
    sent = random.Random(1).randbytes(_BULK_BYTES)
    received = bytearray()
    with _past_tcp(arena, _BULK_BYTES // 2), arena.dial("client", arena.vip("web"), OPAQUE) as sock:
        for at in range(0, _BULK_BYTES, _PIECE_BYTES):
            sock.sendall(sent[at : at + _PIECE_BYTES])
            while len(received) < at + _PIECE_BYTES:
                data = sock.recv(_PIECE_BYTES)
                assert data, len(received)
                received += data
    assert received == sent


def test_grpc_messages_come_back_as_they_were(arena: Arena) -> None:
    """One by one, and as a stream both ways."""
    words = [*COMMAND, "exec", "--name", arena.name, "-n", "arena", "web", "--", sys.executable, "-c", _GRPC_SERVER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == "listening\n"
            with _past_tcp(arena, 1 << 20):
                asked = arena.run("exec", "-n", "arena", "client", "--", sys.executable, "-c", _GRPC_CLIENT, arena.ip("web"))
            assert asked.stdout == "the same\n", asked.stderr
        finally:
            server.kill()


@contextlib.contextmanager
def _nginx(arena: Arena, folder: Path) -> Iterator[int]:
    """One process of it in web's pod, which stores what is PUT in the folder; its process id as seen from here."""
    folder.chmod(0o777)
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, port=_NGINX_PORT))
    words = [*COMMAND, "exec", "--name", arena.name, "-n", "arena", "web", "--", "nginx", "-e", "stderr", "-c", str(config)]
    with subprocess.Popen(words) as server:
        try:
            wait_until((folder / "pid").exists, "nginx listens")
            yield next(pid for pid in arena.members() if command_line(pid)[:1] == ["nginx"] and str(config) in command_line(pid))
        finally:
            server.kill()


def _send_what_goes(sock: socket.socket, data: bytes) -> int:
    """Until nothing more went for half a second: every buffer on the way is full. The number of bytes."""
    sent = 0
    while select.select([], [sock], [], 0.5)[1] and sent < len(data):
        sent += sock.send(data[sent : sent + _PIECE_BYTES])
    return sent


def test_an_upload_into_a_busy_nginx_ends(arena: Arena) -> None:
    """nginx waits edge-triggered, and takes FIONREAD's 0 for the end of what is there: nothing may wait behind the queue in TCP."""
    body = random.Random(2).randbytes(_UPLOAD_BYTES)
    head = f"PUT /upload HTTP/1.1\r\nHost: web\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    with tempfile.TemporaryDirectory() as name, _nginx(arena, Path(name)) as nginx:
        before = _counters(arena, "web")["by_tcp_memory"]
        with _past_tcp(arena, 1 << 20), arena.dial("client", arena.ip("web"), _NGINX_PORT) as sock:
            os.kill(nginx, signal.SIGSTOP)
            try:
                sent = _send_what_goes(sock, head + body)
            finally:
                os.kill(nginx, signal.SIGCONT)
            sock.settimeout(PATIENCE_S)
            sock.sendall((head + body)[sent:])
            assert b"".join(iter(partial(sock.recv, 65536), b"")).startswith(b"HTTP/1.1 201 ")
        assert (Path(name) / "upload").read_bytes() == body
        assert _counters(arena, "web")["by_tcp_memory"] == before
