"""Refusing a connection with an answer that says why, where the client speaks HTTP. Nothing is forwarded from here: there is no permit.

For what is wrong with the connection and not with a request, such as a port whose policy did not arrive. Called by serve.py.
"""

from __future__ import annotations

from proxy.protocol.http1 import Http1Client
from proxy.protocol.http2 import Http2Client
from proxy.protocol.requests import Answer, Bodies, RequestHead, Verdict
from proxy.rescue import Cause
from proxy.transport.relay import Relay


class RefusingGate:
    """Gives every request of a connection the same answer, and ends the connection after the first; `engine` is set by `HttpEngines.start`.

    explain: the client is meshed and may know the cause. Whoever refuses counts it, once for the connection.
    """

    engine: Http1Client | Http2Client

    def __init__(self, cause: Cause, relay: Relay, *, explain: bool) -> None:
        self._cause = cause
        self._relay = relay
        self.explain = explain

    def request(self, head: RequestHead, token: int) -> Verdict | None:
        """See requests.Gate."""
        self._relay.later(self.engine.drain)
        return Answer(self._cause, self.explain)

    def retry_unprocessed(self, exchange: object, head: RequestHead, token: int, cause: Cause) -> Verdict | None:
        """See requests.Gate; nothing was ever sent anywhere."""
        return self.request(head, token)

    def retry_by_rule(self, exchange: object, token: int, cause: Cause) -> bool:
        """See requests.Gate; nothing was ever sent anywhere."""
        return False

    def tunnel(self, exchange: object, head: RequestHead) -> Cause | None:
        """See requests.Gate; nothing was ever answered but here."""
        return self._cause

    def finished(self, exchange: object, status: int, cause: Cause | None, grpc_status: int, bodies: Bodies) -> None:
        """See requests.Gate."""

    def refused(self, cause: Cause, detail: str) -> None:
        """See requests.Gate."""

    def cancelled(self, token: int) -> None:
        """See requests.Gate."""
