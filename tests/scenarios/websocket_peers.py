"""A WebSocket server made with the websockets library, which runs in its own thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import websockets.exceptions
import websockets.sync.server

from core.addrs import Addr


@contextlib.contextmanager
def websocket_server() -> Iterator[Addr]:
    """Says whom it welcomes, then what it is told."""

    def serve(socket: websockets.sync.server.ServerConnection) -> None:
        socket.send("welcome " + (socket.request.headers.get("pillion-client-id") if socket.request else ""))
        with contextlib.suppress(websockets.exceptions.ConnectionClosedError):  # cut, as some tests mean it
            for message in socket:
                socket.send(message)

    with websockets.sync.server.serve(serve, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Addr(*server.socket.getsockname())
        finally:
            server.shutdown()
            thread.join()
