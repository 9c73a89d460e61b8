"""TLS contexts made from the newest credentials, and the two handshakes of a sidecar.

Credentials are replaced while we run (renewal, rotation); contexts follow with the next connection, open ones are not touched.
Without a valid certificate there is no handshake: fail closed.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import trio
from OpenSSL import SSL

from core import alpn
from core.credentials import Credentials
from core.names import WorkloadId
from core.runtime.sockets import RawStream
from core.runtime.tls import Handshake, HandshakeFailed, TlsStream, client_context, server_context
from core.runtime.watch import Cell
from proxy.rescue import Cause, Failure
from proxy.transport.tls_bio import Records, records


class Secured(NamedTuple):
    """A handshaken connection: its peer, the ALPN name of what is inside, and its records for the relay."""

    peer: WorkloadId | None
    alpn: bytes
    records: Records


class Security:
    """This workload's identity, as contexts."""

    def __init__(self, identity: WorkloadId, credentials: Cell[Credentials | None], handshake_s: float) -> None:
        self.identity = identity
        self._credentials = credentials
        self._handshake_s = handshake_s
        self._made_from: Credentials | None = None
        self._server: SSL.Context | None = None
        self._clients: dict[bytes, SSL.Context] = {}

    def current(self) -> Credentials:
        """Our credentials, with contexts made from them; raises Failure(NO_IDENTITY). Call it before dialling, not to dial in vain."""
        credentials = self._credentials.value
        if credentials is None:
            raise Failure(Cause.NO_IDENTITY, "no certificate was issued to this workload yet")
        if credentials.not_after <= time.time():
            raise Failure(Cause.NO_IDENTITY, "this workload's certificate has expired and could not be renewed")
        if credentials is not self._made_from:
            self._made_from = credentials
            self._server = server_context(credentials, client="required", alpn=alpn.BETWEEN_SIDECARS)
            self._clients = {name: client_context(credentials, credentials.bundle_pem, [name]) for name in alpn.BETWEEN_SIDECARS}
        return credentials

    def accepting(self) -> Handshake:
        """Our end of a handshake with a peer that addressed us; raises Failure."""
        self.current()
        assert self._server is not None
        return Handshake.server(self._server, self.identity.trust_domain)

    async def accept(self, stream: RawStream, received: bytes) -> Secured:
        """Authenticate a peer that addressed us; raises Failure or HandshakeFailed."""
        return await self._shake(TlsStream(stream, self.accepting()), received)

    async def dial(self, stream: RawStream, expect: WorkloadId, inside: bytes) -> Secured:
        """Authenticate to an endpoint and demand that it is ``expect``; raises Failure or HandshakeFailed."""
        self.current()
        return await self._shake(TlsStream.client(stream, self._clients[inside], expect.server_name, expect), b"")

    async def _shake(self, tls: TlsStream, received: bytes) -> Secured:
        with trio.move_on_after(self._handshake_s) as scope:
            await tls.do_handshake(received)
        if scope.cancelled_caught:
            raise HandshakeFailed("timeout", f"the handshake was not finished within {self._handshake_s:g} s")
        return Secured(tls.peer, tls.alpn, records(tls.connection))
