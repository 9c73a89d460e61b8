"""HTTP/2, gRPC, opaque bytes and a rotation through the whole mesh, past TCP on both hops: the programs' counters say that they were.

What the mesh's own tests ask of these protocols is asked once more by calling them; gRPC comes with a server and a client of its own.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import test_netns_interception as interception
import test_netns_requests as requests
import test_netns_robustness as robustness
import test_netns_wire as wire
from arena import OPAQUE, Arena
from local_lab import COMMAND, wait_until

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
