"""Step 12: to the app, at the address that was dialled, and only with a permit.

The address is never replaced by loopback: what an app binds to 127.0.0.1 stays private to the pod. Every client connection has its own
connection to the app, so the app sees as many peers as there are, and by their own addresses where the kernel can show them
(transport/caller.py).
"""

from __future__ import annotations

from collections.abc import Callable

from core.addrs import Addr, ClientAddr
from core.runtime.sockets import Connecting
from policy.authorize import Permit
from proxy.protocol.http1 import Http1Upstream
from proxy.protocol.http2 import Http2Limits, Http2Upstream
from proxy.transport.connect import Dialer, Dialled
from proxy.transport.relay import Relay


class Forwarder:
    """Connections to the app of one port, for one client connection."""

    def __init__(self, relay: Relay, dialer: Dialer, app: Addr, caller: ClientAddr, limits: Http2Limits) -> None:
        self._relay = relay
        self._dialer = dialer
        self._limits = limits
        self.app = app
        self._caller = caller

    def begin(self, permit: Permit) -> Connecting:
        """Begin to connect to the app; raises Failure. The permit proves that somebody may go there."""
        if not isinstance(permit, Permit):
            raise TypeError("forwarding needs a permit")
        return self._dialer.begin_app(self.app, self._caller)

    async def finish(self, connecting: Connecting) -> Dialled:
        """The connection once it is made; raises Failure."""
        return await self._dialer.finish(self.app, connecting)

    async def open(self, permit: Permit) -> Dialled:
        """Both; raises Failure."""
        return await self.finish(self.begin(permit))

    def http1(self, dialled: Dialled, gone: Callable[[Http1Upstream], None]) -> Http1Upstream:
        """An HTTP/1.1 upstream on a fresh connection."""
        return self._relay.attach(dialled.sock, lambda sink: Http1Upstream(sink, _stay, gone), dialled.records)

    def http2(self, dialled: Dialled, gone: Callable[[Http2Upstream], None]) -> Http2Upstream:
        """An HTTP/2 upstream on a fresh connection."""
        limits = self._limits
        return self._relay.attach(dialled.sock, lambda sink: Http2Upstream(sink, limits, on_gone=gone), dialled.records)


def _stay(_: object) -> None:
    """An idle upstream waits for the next request of its client connection."""
