"""The gate of inbound requests: authorize each, then forward it to the app (steps 11 and 12).

One gate for each client connection. A permitted request goes to this connection's own upstream, which is dialled with the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import trio

from core.runtime.sockets import Connecting
from core.spelling import Spellings
from policy.authorize import Permit
from proxy.inbound.authorize import ConnectionAuthorizer, cause_of
from proxy.inbound.forward import Forwarder
from proxy.protocol.http1 import Http1Client, Http1Upstream
from proxy.protocol.http2 import Http2Client, Http2Upstream
from proxy.protocol.requests import LATER, Answer, Bodies, Forward, HeadEdit, RequestHead, Verdict
from proxy.rescue import Cause, Failure
from proxy.telemetry.record import InboundRecord, InFlight
from proxy.transport.connect import Dialled
from proxy.transport.relay import Relay

CLIENT_ID = b"pillion-client-id"


class Session(NamedTuple):
    """One client connection whose peer is known: what it may do, how the app is reached, and who counts it.

    identity: the client's verified SPIFFE URI, None without one.
    """

    identity: str | None
    authorizer: ConnectionAuthorizer
    forwarder: Forwarder
    record: InboundRecord


class InboundGate:
    """Decides about the requests of one client connection; `engine` is set by `HttpEngines.start`.

    The app is told the client's identity; a value that the client sends itself is removed in any case. forwarded: fields that tell the
    app the caller's address, if it wants them.
    """

    engine: Http1Client | Http2Client

    def __init__(self, session: Session, relay: Relay, nursery: trio.Nursery, forwarded: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        identity, self._authorizer, self._forwarder, self._record = session
        self._relay = relay
        self._nursery = nursery
        self.explain = identity is not None
        added = ((CLIENT_ID, identity.encode()),) if identity is not None else ()
        self._edit = HeadEdit(strip=(CLIENT_ID,), add=(*added, *forwarded))
        self._guarded: Spellings | None = None  # what `_edit` keeps from trailers
        self._upstream: Http1Upstream | Http2Upstream | None = None
        self._waiting: dict[int, InFlight] = {}
        self._connecting = False

    # --- Gate ----------------------------------------------------------------------------------------------------------

    def request(self, head: RequestHead, token: int) -> Verdict | None:
        """See requests.Gate."""
        decision = self._authorizer.request(head)
        exchange = self._record.begin(decision, head)
        if not isinstance(decision, Permit):
            return Answer(cause_of(decision), self.explain, exchange)
        if self._authorizer.spellings is not self._guarded:
            self._guard_trailers()
        return self._forward(decision, exchange, token)

    def retry_unprocessed(self, exchange: object, head: RequestHead, token: int, cause: Cause) -> Verdict | None:
        """See requests.Gate: a fresh connection to the same app, under the policy of now."""
        assert isinstance(exchange, InFlight)
        self._record.retried(cause)
        decision = self._authorizer.request(head)
        if not isinstance(decision, Permit):
            return Answer(cause_of(decision), self.explain, exchange)
        self._upstream = None
        return self._forward(decision, exchange, token)

    def retry_by_rule(self, exchange: object, token: int, cause: Cause) -> bool:
        """See requests.Gate: no rule asks for it here."""
        return False

    def tunnel(self, exchange: object, head: RequestHead) -> Cause | None:
        """See requests.Gate: under the policy of now, and of whatever follows it."""
        assert isinstance(exchange, InFlight)
        self._authorizer.follow(self._review)
        decision = self._authorizer.request(head)
        if isinstance(decision, Permit):
            return None
        self._record.withdrawn(exchange, decision)
        return Cause.TERMINATED

    def finished(self, exchange: object, status: int, cause: Cause | None, grpc_status: int, bodies: Bodies) -> None:
        """See requests.Gate."""
        assert isinstance(exchange, InFlight)
        self._record.finish(exchange, status, cause, grpc_status, bodies)

    def refused(self, cause: Cause, detail: str) -> None:
        """See requests.Gate."""
        self._record.refused(cause, detail)

    def cancelled(self, token: int) -> None:
        """See requests.Gate."""
        exchange = self._waiting.pop(token, None)
        if exchange is not None:
            self._record.finish(exchange, 0, Cause.CLIENT_GONE)

    def closed(self) -> None:
        """The client's connection is over, in whatever way. Called once, after everything else."""
        self._authorizer.unfollow(self._review)
        for token in list(self._waiting):
            self.cancelled(token)
        upstream, self._upstream = self._upstream, None
        if isinstance(upstream, Http1Upstream):
            upstream.close()
        elif upstream is not None:
            upstream.drain()

    def _guard_trailers(self) -> None:
        """The policy looks at other header fields than before: these must not come in trailers."""
        self._guarded = spellings = self._authorizer.spellings
        self._edit = self._edit._replace(trailers=spellings.names if spellings is not None else ())

    # --- the upstream --------------------------------------------------------------------------------------------------

    def _forward(self, permit: Permit, exchange: InFlight, token: int) -> Verdict | None:
        upstream = self._upstream
        if upstream is not None:
            return Forward(upstream, self._edit, exchange)
        if not self._connecting:
            try:
                connecting = self._forwarder.begin(permit)
            except Failure as failure:
                self._record.log_failure(failure)
                return Answer(failure.cause, self.explain, exchange)
            if connecting.done:
                return Forward(self._adopt(Dialled(connecting.sock, None)), self._edit, exchange)
            self._connecting = True
            self._nursery.start_soon(self._connect, connecting)
        self._waiting[token] = exchange
        return LATER

    async def _connect(self, connecting: Connecting) -> None:
        """Wait for the app on behalf of everybody who wants it."""
        try:
            dialled = await self._forwarder.finish(connecting)
        except Failure as failure:
            self._record.log_failure(failure)
            cause = failure.cause
            self._tell(lambda exchange: Answer(cause, self.explain, exchange))
            return
        finally:
            self._connecting = False
        if not self._waiting:
            dialled.close()  # everybody who wanted it went away meanwhile
            return
        with self._relay.batch():
            upstream = self._adopt(dialled)
            self._tell(lambda exchange: Forward(upstream, self._edit, exchange))

    def _adopt(self, dialled: Dialled) -> Http1Upstream | Http2Upstream:
        """A fresh connection to the app, of the client's protocol."""
        upstream: Http1Upstream | Http2Upstream
        if isinstance(self.engine, Http1Client):
            upstream = self._forwarder.http1(dialled, self._gone)
        else:
            upstream = self._forwarder.http2(dialled, self._gone)
        self._upstream = upstream
        return upstream

    def _tell(self, verdict: Callable[[InFlight], Verdict]) -> None:
        waiting, self._waiting = self._waiting, {}
        with self._relay.batch():
            for token, exchange in waiting.items():
                self.engine.proceed(token, verdict(exchange))

    def _review(self) -> None:
        """The policy was replaced, and there are or were tunnels."""
        self._relay.later(self.engine.review)

    def _gone(self, upstream: Http1Upstream | Http2Upstream) -> None:
        if self._upstream is upstream:
            self._upstream = None


def forwarded_fields(setting: str, client_ip: str) -> tuple[tuple[bytes, bytes], ...]:
    """The fields of the setting PILLION_FORWARDED: RFC 7239 section 4, or the older X-Forwarded-For."""
    if setting == "off":
        return ()
    if setting == "x-forwarded-for":
        return ((b"x-forwarded-for", client_ip.encode()),)
    node = f'"[{client_ip}]"' if ":" in client_ip else client_ip
    return ((b"forwarded", f"for={node};proto=http".encode()),)
