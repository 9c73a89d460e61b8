"""Apps that answer and close before they have read their request, as servers do that refuse an upload."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from core.addrs import Addr
from tests.scenarios.mesh import mesh
from tests.scenarios.peers import read_until

_UPLOAD = b"POST /upload HTTP/1.1\r\nhost: web.shop\r\ncontent-length: 100000000\r\n\r\n"
_REFUSAL = b"HTTP/1.1 501 Unsupported method\r\nconnection: close\r\ncontent-length: 3\r\n\r\nno\n"


@contextmanager
def _refusing_server() -> Iterator[Addr]:
    """In threads of its own, so that it closes while the sidecar sends."""

    class Refuse(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(_REFUSAL)  # closing over what was not read makes the system reset the connection behind it

    with socketserver.TCPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Addr(*server.server_address)
        finally:
            server.shutdown()
            thread.join()


async def test_the_answer_to_an_upload_arrives_however_the_app_closes():
    with _refusing_server() as app:
        async with mesh(app) as made:
            for _ in range(40):  # which of them meet the reset first is a matter of moments
                async with await made.dial() as client, trio.open_nursery() as nursery:

                    async def upload(client: trio.SocketStream = client) -> None:
                        try:
                            await client.send_all(_UPLOAD)
                            while True:
                                await client.send_all(bytes(65536))
                        except (trio.BrokenResourceError, trio.ClosedResourceError):
                            return

                    nursery.start_soon(upload)
                    assert await read_until(client, b"no\n") == _REFUSAL
                    nursery.cancel_scope.cancel()
