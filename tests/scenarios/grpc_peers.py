"""A gRPC server and client made with grpcio, which run in their own threads; messages are plain bytes, so nothing is generated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from core.addrs import Addr

SERVICE = "/shop.Cart/"
_BIG = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


class Cart(grpc.GenericRpcHandler):
    """The service. cancelled: set when a client cancelled the method Wait. left_s: the deadline the last call came with."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.waiting = threading.Event()
        self.left_s: float | None = None
        self.calls = 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        self.calls += 1
        return {
            "Echo": grpc.unary_unary_rpc_method_handler(self._echo),
            "Count": grpc.unary_stream_rpc_method_handler(self._count),
            "Sum": grpc.stream_unary_rpc_method_handler(self._sum),
            "Chat": grpc.stream_stream_rpc_method_handler(self._chat),
            "Wait": grpc.unary_unary_rpc_method_handler(self._wait),
            "Fail": grpc.unary_unary_rpc_method_handler(self._fail),
        }.get(details.method.rpartition("/")[2])

    def _echo(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.left_s = context.time_remaining()
        sent = {key: value for key, value in context.invocation_metadata() if key.startswith("x-") or key == "pillion-client-id"}
        context.send_initial_metadata(tuple((f"x-saw-{key}", value) for key, value in sent.items() if not key.endswith("-bin")))
        context.set_trailing_metadata((("x-end", "here"), ("x-bytes-bin", sent.get("x-bytes-bin", b""))))
        return request

    def _count(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from (b"%d" % number for number in range(int(request)))

    def _sum(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return b"%d" % sum(map(int, requests))

    def _chat(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"hello"
        for request in requests:
            yield request.upper()

    def _wait(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        if not context.add_callback(self.cancelled.set):
            self.cancelled.set()  # it was, before we got here
        self.waiting.set()
        self.cancelled.wait()
        return b"too late"

    def _fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.DATA_LOSS, request.decode())
        raise AssertionError("abort raises")


@contextmanager
def grpc_server(service: Cart) -> Iterator[Addr]:
    server = grpc.server(ThreadPoolExecutor(16), handlers=[service], options=[*_BIG, ("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Addr("127.0.0.1", port)
    finally:
        service.cancelled.set()
        server.stop(0).wait()


def calling(entry: Addr, talk: Callable[[Client], Any]) -> Any:
    """Run ``talk`` with a client of one channel; for a thread."""
    options = [*_BIG, ("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(str(entry), options=options) as channel:
        return talk(Client(channel))


class Client:
    """The methods of the service as callables."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.echo = channel.unary_unary(SERVICE + "Echo")
        self.count = channel.unary_stream(SERVICE + "Count")
        self.sum = channel.stream_unary(SERVICE + "Sum")
        self.chat = channel.stream_stream(SERVICE + "Chat")
        self.wait = channel.unary_unary(SERVICE + "Wait")
        self.fail = channel.unary_unary(SERVICE + "Fail")
        self.missing = channel.unary_unary(SERVICE + "Missing")


def status_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """The status a call fails with, and its message. One that is not DEADLINE_EXCEEDED came before the call's deadline."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""
