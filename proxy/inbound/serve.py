"""The path of an inbound connection, in order. Each step is one line of `Inbound.serve` and one module.

 8 accept      transport/accept.py         Accepted(client, original destination)
   discover    discover.py                 the policy of the dialled port, or no connection
   sniff       transport/sniff.py          TLS addressed to us? something else's TLS? plaintext? silence?
 9 secure      transport/secure.py         the peer's verified identity, or the reason there is none
10 protocol    ALPN, policy, or first bytes
11 authorize   inbound/authorize.py        Permit | Denied, for each request or for the connection
12 forward     inbound/forward.py          to the app, needs the Permit

Most connections come here only after their first steps, which `inbound/arrive.py` takes without a task where nothing has to be waited for.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import trio

from core import alpn
from core.names import WorkloadId
from core.runtime.tls import Handshake, HandshakeFailed
from policy.authorize import Client, Denied, Permit
from proxy.config import Config
from proxy.discover import Discovery, PortState
from proxy.engines import HttpEngines
from proxy.inbound.authorize import ConnectionAuthorizer
from proxy.inbound.forward import Forwarder
from proxy.inbound.gate import InboundGate, Session, forwarded_fields
from proxy.inbound.refuse import RefusingGate
from proxy.live import Live
from proxy.protocol.detect import DECLARED, HTTP, Detected, FirstLine
from proxy.rescue import Cause, Failure
from proxy.telemetry.record import Recorder
from proxy.transport.accept import Accepted
from proxy.transport.connect import Dialer, Dialled
from proxy.transport.join import ClientSide, join, who_speaks_first
from proxy.transport.link import NO_RECEIVER, Link
from proxy.transport.relay import Relay
from proxy.transport.secure import Security
from proxy.transport.sniff import Sniffed, sniff
from proxy.transport.tls_bio import Records, records

_BETWEEN_SIDECARS = frozenset(alpn.BETWEEN_SIDECARS)
_INSIDE = {alpn.HTTP1: Detected.HTTP1, alpn.HTTP2: Detected.HTTP2, alpn.OPAQUE: Detected.OPAQUE}
_SILENT = Sniffed(b"", Detected.OPAQUE)


class Heard(NamedTuple):
    """The client's first bytes. to_app: a connection made while the client was silent; used if what it said then turns out opaque."""

    sniffed: Sniffed
    to_app: Dialled | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """Who the client is, as far as it has proven that, and what it speaks.

    reason: why there is no identity, "" with one. data: plaintext that was received already. records: None without our TLS.
    """

    identity: WorkloadId | None
    reason: str
    protocol: Detected
    data: bytes
    records: Records | None


@dataclass(frozen=True, slots=True)
class Inbound:
    """Serves connections to this pod. Everything here is shared by all of them."""

    config: Config
    discovery: Discovery
    security: Security
    dialer: Dialer
    relay: Relay
    live: Live
    recorder: Recorder
    nursery: trio.Nursery
    engines: HttpEngines

    async def serve(self, accepted: Accepted, received: bytes = b"", *, silent: bool = False) -> None:
        """Take one connection from accept to the relay; raises Failure, HandshakeFailed, trio.BrokenResourceError.

        received: what was read of it already. silent: it said nothing for the time in which a client would have spoken.
        """
        self._refuse_loops(accepted)
        try:
            port = await self.discovery.wait_port(accepted.dst.port)
        except Failure as failure:
            await self._refuse(accepted, failure.cause)
            raise
        heard = None if silent else await self._sniff(accepted, received)
        if heard is None:
            heard = await self._break_silence(accepted, port)
        try:
            peer = await self._authenticate(accepted, heard.sniffed, _declared(port))
        except BaseException:
            if heard.to_app is not None:
                heard.to_app.close()
            raise
        if peer.protocol in HTTP:
            if heard.to_app is not None:
                heard.to_app.close()  # requests are permitted one by one; none was yet
            self.serve_http(accepted, self.relay.adopt(accepted.stream.release(), NO_RECEIVER, peer.records), peer, port)
        else:
            await self.serve_opaque(accepted, peer, port, heard.to_app)

    def known_port(self, accepted: Accepted) -> PortState | None:
        """The dialled port when its policy is known; raises Failure."""
        self._refuse_loops(accepted)
        return self.discovery.known_port(accepted.dst.port)

    def _session(self, accepted: Accepted, peer: Peer, port: PortState) -> Session:
        client = Client(accepted.client.ip, peer.identity.uri if peer.identity else None, peer.reason)
        record = self.recorder.inbound(accepted.client, accepted.dst, client)
        return Session(client.identity, ConnectionAuthorizer(port, client), self._forwarder(accepted), record)

    def _refuse_loops(self, accepted: Accepted) -> None:
        """Our own ports are never an app: a connection made to them directly would be forwarded to ourselves for ever."""
        if accepted.dst.port in (self.config.inbound_listen.port, self.config.outbound_listen.port):
            raise Failure(Cause.LOOP, f"{accepted.dst} is a port of the sidecar itself")

    async def _sniff(self, accepted: Accepted, received: bytes) -> Heard | None:
        """The client's first bytes; None when it stays silent."""
        sniffed = await sniff(accepted.stream, self.config.detect_silence_s, self.config.detect_timeout_s, received)
        return Heard(sniffed) if sniffed.protocol is not None else None

    async def _break_silence(self, accepted: Accepted, port: PortState) -> Heard:
        """The client may be waiting for the app to speak (SMTP, MySQL): dial the app for it, and let whoever speaks first decide.

        The app is dialled only for a client that may use the port as opaque bytes. One whose requests may pass may be silent as long as any
        idle connection; one that has to prove its identity, as long as a handshake may take; and one that no policy can let in is treated
        as opaque at once, and refused.
        """
        config = self.config
        authorizer = ConnectionAuthorizer(port, Client(accepted.client.ip, None, "plaintext"))
        permit = authorizer.connection()
        if authorizer.some_request() and (_declared(port) in HTTP or not isinstance(permit, Permit)):
            return Heard(await self._wait_for_client(accepted, config.idle_timeout_s))
        if not isinstance(permit, Permit):
            assert port.authorizer is not None
            if not port.authorizer.names_network_of(accepted.client.ip):
                return Heard(_SILENT)
            return Heard(await self._wait_for_client(accepted, config.handshake_timeout_s, _SILENT))
        to_app = await self._forwarder(accepted).open(permit)
        try:
            with trio.fail_after(config.opaque_idle_timeout_s), self.live.silent():
                first = await who_speaks_first(accepted.stream, to_app)
            if first == "http2":
                to_app.close()  # the requests of this client get a connection of their own, once they are let in
                return Heard(await self._wait_for_client(accepted, config.idle_timeout_s))
            if first != "client":
                return Heard(_SILENT, to_app)
            return Heard(await self._wait_for_client(accepted, config.idle_timeout_s), to_app)
        except BaseException:
            to_app.close()
            raise

    def _forwarder(self, accepted: Accepted) -> Forwarder:
        return Forwarder(self.relay, self.dialer, accepted.dst, accepted.client, self.engines.http2)

    async def _wait_for_client(self, accepted: Accepted, patience_s: float, otherwise: Sniffed | None = None) -> Sniffed:
        """The first bytes of a client that was silent so far; ``otherwise``, or Failure(HEAD_TIMEOUT) without it, when it stays silent."""
        with trio.move_on_after(patience_s) as scope, self.live.silent():
            await trio.lowlevel.wait_readable(accepted.stream.sock)
        if not scope.cancelled_caught:
            return await sniff(accepted.stream, patience_s, self.config.detect_timeout_s)
        if otherwise is None:
            raise Failure(Cause.HEAD_TIMEOUT, f"the client said nothing for {patience_s:g} s")
        return otherwise

    async def _refuse(self, accepted: Accepted, cause: Cause) -> None:
        """Answer a client of HTTP; any other is cut by the caller."""
        with contextlib.suppress(Failure, HandshakeFailed, trio.BrokenResourceError):
            config = self.config
            sniffed = await sniff(accepted.stream, config.detect_silence_s, config.detect_timeout_s)
            peer = await self._authenticate(accepted, sniffed, None)
            if peer.protocol not in HTTP:
                return
            gate = RefusingGate(cause, self.relay, explain=peer.identity is not None)
            link = self.relay.adopt(accepted.stream.release(), NO_RECEIVER, peer.records)
            engines = self.engines.with_idle_timeout(config.detect_timeout_s)
            engines.start(link, gate, peer.protocol, peer.data, lambda: None)

    async def _authenticate(self, accepted: Accepted, sniffed: Sniffed, declared: Detected | None) -> Peer:
        if self.addressed_to_us(sniffed):
            secured = await self.security.accept(accepted.stream, sniffed.data)
            return Peer(secured.peer, "", _INSIDE[secured.alpn], b"", secured.records)
        return _peer_without_identity(sniffed, declared)

    def addressed_to_us(self, sniffed: Sniffed) -> bool:
        """TLS is ours to terminate when it names this workload and offers what only sidecars speak; any other is the app's own."""
        hello = sniffed.hello
        if hello is None or hello.server_name != self.security.identity.server_name:
            return False
        return not _BETWEEN_SIDECARS.isdisjoint(hello.alpn)

    def peer_of_handshake(self, handshake: Handshake) -> Peer:
        """The peer of a handshake that is done."""
        return Peer(handshake.peer, "", _INSIDE[handshake.alpn], b"", records(handshake.connection))

    def peer_without_identity(self, sniffed: Sniffed, port: PortState) -> Peer:
        """A client whose bytes are not addressed to us as TLS."""
        return _peer_without_identity(sniffed, _declared(port))

    def serve_http(self, accepted: Accepted, link: Link, peer: Peer, port: PortState) -> None:
        """Requests of this connection are decided on one by one from now on; the link carries it already."""
        session = self._session(accepted, peer, port)
        record = session.record
        record.protocol = "HTTP/1.1" if peer.protocol is Detected.HTTP1 else "HTTP/2"
        gate = InboundGate(session, self.relay, self.nursery, forwarded_fields(self.config.forwarded, accepted.client.ip))

        def closed() -> None:
            gate.closed()
            record.closed(link.read_bytes, link.written_bytes)

        self.engines.start(link, gate, peer.protocol, peer.data, closed)

    async def serve_opaque(self, accepted: Accepted, peer: Peer, port: PortState, to_app: Dialled | None = None) -> None:
        """Join the connection with the app; cut it when a later policy takes the permit back."""
        session = self._session(accepted, peer, port)
        authorizer, record = session.authorizer, session.record
        screened = _declared(port) is not Detected.OPAQUE
        try:
            app = await self._open_opaque(session, to_app, peer.data if screened else b"")
        except BaseException as error:
            if isinstance(error, Failure):
                record.failed(error.cause)
                if error.cause is Cause.DENIED and not authorizer.some_request():
                    await _send_close_notify(accepted, peer.records)
            record.closed(0, 0)
            raise

        def finished(cause: str) -> None:
            port.changed.discard(recheck)
            record.ended(cause)

        def recheck() -> None:
            now = authorizer.connection()
            if isinstance(now, Denied):
                record.terminated(now)
                splice.cut("denied")

        idle_s = self.config.opaque_idle_timeout_s
        with self.relay.batch():  # nothing of it ends before it is counted
            client = ClientSide(accepted.stream, peer.records, peer.data)
            link, splice = join(self.relay, client, app, finished, idle_s, screened=screened)
            self.live.add(link, None, lambda: record.closed(link.read_bytes, link.written_bytes))
            port.changed.add(recheck)
            recheck()  # the policy may have changed while the app was dialled

    async def _open_opaque(self, session: Session, to_app: Dialled | None, screened: bytes) -> Dialled:
        """The connection to the app, if the client may use the port as opaque bytes; raises Failure.

        to_app: one that exists already. screened: what the client sent, if requests must not pass as opaque bytes here.
        """
        decision = session.authorizer.connection()
        session.record.connection(decision)
        if isinstance(decision, Permit) and not (screened and FirstLine().is_http_untrusted(screened)):
            return to_app or await session.forwarder.open(decision)
        if to_app is not None:
            to_app.close()
        if isinstance(decision, Permit):
            raise Failure(Cause.BAD_REQUEST, "a request that no usual client would send, among opaque bytes")
        raise Failure(Cause.DENIED, decision.reason)


def _peer_without_identity(sniffed: Sniffed, declared: Detected | None) -> Peer:
    if sniffed.hello is not None:
        return Peer(None, "tls-not-addressed-to-us", Detected.OPAQUE, sniffed.data, None)
    return Peer(None, "plaintext", _plain_protocol(sniffed, declared), sniffed.data, None)


async def _send_close_notify(accepted: Accepted, records: Records | None) -> None:
    """Tell a meshed peer before its connection is reset that nothing its client could say would change the refusal.

    A reset alone, while its client is silent, would tell the peer that the port takes requests only (`Outbound._break_silence`).
    """
    if records is not None:
        with trio.move_on_after(1):
            await accepted.stream.send_all(records.close_notify())


def _declared(port: PortState) -> Detected | None:
    """The protocol that the policy declares for the port, None when it is to be detected."""
    assert port.authorizer is not None
    return DECLARED.get(port.authorizer.policy.protocol)


def _plain_protocol(sniffed: Sniffed, declared: Detected | None) -> Detected:
    """The protocol of plaintext: as declared, else as it looks. HTTP/2 on a port declared HTTP/1 is still HTTP, with the same rules."""
    seen = Detected.OPAQUE if sniffed.protocol in (None, Detected.TLS) else sniffed.protocol
    assert seen is not None
    if declared is None or (declared in HTTP and seen in HTTP):
        return seen
    return declared
