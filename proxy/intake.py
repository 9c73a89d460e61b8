"""What becomes of an accepted connection: whether there is room for it, which path serves it, and what is said if it gets no further.

A connection is served by a task, or by the relay alone from its first byte (`inbound/arrive.py`). Whichever it is, whatever goes wrong ends
this connection only, and is counted and logged here, once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from core.runtime.tls import HandshakeFailed
from proxy.capture_proof import CaptureProof
from proxy.inbound.arrive import Arrivals
from proxy.inbound.serve import Inbound
from proxy.outbound.serve import Outbound
from proxy.rescue import Cause, Failure, effect
from proxy.telemetry.metrics import Direction
from proxy.transport.accept import Accepted

_OWN_FILES = 256  # descriptors kept free of connections: without one for the admin port, probes fail and the pod is taken for dead


class Intake:
    """Takes what both listeners accept.

    files: the most descriptors that this process may have open. crashed: told of an exception that no peer can cause, so a bug of ours.
    """

    def __init__(
        self, inbound: Inbound, outbound: Outbound, proof: CaptureProof, files: int, crashed: Callable[[BaseException], None]
    ) -> None:
        self._inbound = inbound
        self._outbound = outbound
        self._proof = proof
        self._crashed = crashed
        self._config = inbound.config
        self._live = inbound.live
        self._nursery = inbound.nursery
        self._recorder = inbound.recorder
        self._relay = inbound.relay
        self.arrivals = Arrivals(inbound, partial(self._start_task, "inbound"), partial(self._settle, "inbound"))
        self._most_sockets = min(2 * inbound.config.max_connections, max(files - _OWN_FILES, files // 2))

    def admit_outbound(self) -> bool:
        """Whether one more connection of the app may be accepted."""
        return self._sockets() < self._most_sockets

    def admit_inbound(self) -> bool:
        """Whether one more connection from outside may be accepted. The last eighth is the app's: callers must not keep it from calling."""
        return self._sockets() < self._most_sockets - self._most_sockets // 8

    def _sockets(self) -> int:
        """Sockets in use, and those that connections still on their way to the relay will use: two each."""
        return self._relay.open_links - len(self.arrivals) + 2 * self._live.arriving

    def take_inbound(self, accepted: Accepted) -> None:
        """Begin to serve what was meant for this pod, and refuse anything else.

        Redirection catches whatever is delivered to the pod's link, and the original destination is what the sender wrote. Without this
        check a neighbour on the same network could write 127.0.0.1, or any other host, and have it dialled from inside the pod.
        """
        config = self._config
        if accepted.dst.ip in config.pod_ips or accepted.dst.port in (config.inbound_listen.port, config.outbound_listen.port):
            self.serve_inbound(accepted)
            return
        self._live.arrived()
        detail = f"{accepted.dst} is not an address of this pod ({', '.join(config.pod_ips)})"
        self._settle("inbound", accepted, Failure(Cause.FOREIGN, detail))

    def serve_inbound(self, accepted: Accepted) -> None:
        """Begin to serve a connection to a port of this pod."""
        self._live.arrived()
        if not self.arrivals.take(accepted):
            self._start_task("inbound", accepted, self._inbound.serve)

    def take_outbound(self, accepted: Accepted) -> None:
        """Begin to serve a connection that the app made."""
        self._live.arrived()
        self._start_task("outbound", accepted, self._proof.take if self._proof.concerns(accepted) else self._outbound.serve)

    def _start_task(self, direction: Direction, accepted: Accepted, serve: Callable[[Accepted], Awaitable[None]]) -> None:
        self._nursery.start_soon(self._serve, direction, accepted, serve)

    async def _serve(self, direction: Direction, accepted: Accepted, serve: Callable[[Accepted], Awaitable[None]]) -> None:
        failed: Exception | None = None
        try:
            await serve(accepted)
        except Exception as error:
            failed = error
        finally:
            self._settle(direction, accepted, failed)

    def _settle(self, direction: Direction, accepted: Accepted, error: Exception | None) -> None:
        """A connection has left its path: the relay serves it now, or ``error`` says why not."""
        if error is not None:
            self._report(direction, accepted, error)
            accepted.stream.abort()
        self._live.settled()

    def _report(self, direction: Direction, accepted: Accepted, error: Exception) -> None:
        client, dst = accepted.client, accepted.dst
        if isinstance(error, Failure):
            self._recorder.failed(direction, client, dst, error.cause.value, error.detail, effect(error.cause).level)
        elif isinstance(error, HandshakeFailed):
            self._recorder.failed(direction, client, dst, f"tls-{error.reason}", error.detail, "warning")
        elif isinstance(error, (trio.BrokenResourceError, trio.TooSlowError, OSError)):
            self._recorder.failed(direction, client, dst, "connection-lost", str(error), "debug")
        else:
            self._recorder.metrics.error(direction, Cause.INTERNAL.value)
            self._crashed(error)
