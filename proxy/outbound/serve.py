"""The path of an outbound connection, in order. Each step is one line of `Outbound.serve` and one module.

1 accept      transport/accept.py       Accepted(client, original destination)
2 discover    discover.py               what stands behind the dialled address, or no connection
3 sniff       transport/sniff.py        the protocol, when discovery does not name it
4 head        protocol/http1, http2     a request, decided on by the gate
5-6 choose    outbound/gate.py          endpoint by balance.py, its identity from discovery
7 connect     outbound/pool.py, transport/connect.py, transport/secure.py; then transport/relay.py
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import NamedTuple

import trio

from core import alpn
from core.addrs import from_sockaddr, parse_addr
from policy.wire import Destination, Endpoint
from proxy.balance import EndpointLoad
from proxy.config import Config
from proxy.discover import DestinationState, Discovery
from proxy.engines import HttpEngines
from proxy.live import Live
from proxy.outbound.gate import Http1Gate, Http2Gate, Toolkit
from proxy.protocol.detect import DECLARED, HTTP, Detected
from proxy.rescue import Cause, Failure
from proxy.telemetry.record import OutboundRecord, Recorder
from proxy.transport.accept import Accepted
from proxy.transport.connect import Dialled
from proxy.transport.join import ClientSide, join, who_speaks_first
from proxy.transport.link import NO_RECEIVER
from proxy.transport.sniff import Sniffed, sniff

_UNKNOWN = Sniffed(b"", Detected.OPAQUE)


class Chosen(NamedTuple):
    """A connection for opaque bytes and the endpoint it goes to."""

    load: EndpointLoad
    dialled: Dialled


@dataclass(frozen=True, slots=True)
class Outbound:
    """Serves connections that the app makes. Everything here is shared by all of them."""

    config: Config
    discovery: Discovery
    toolkit: Toolkit
    live: Live
    recorder: Recorder
    engines: HttpEngines

    async def serve(self, accepted: Accepted) -> None:
        """Take one connection from accept to the relay; raises Failure, trio.BrokenResourceError."""
        self._refuse_loops(accepted)
        state = await self.discovery.wait_destination(accepted.dst)
        try:
            await self._serve_known(accepted, state)
        except BaseException:
            state.release(self.toolkit.now())
            raise

    async def _serve_known(self, accepted: Accepted, state: DestinationState) -> None:
        destination = _usable(state, accepted)
        record = self.recorder.outbound(accepted.client, accepted.dst, destination.ref)
        try:
            chosen, sniffed = await self._decide(accepted, state, destination, record)
        except BaseException as error:
            if isinstance(error, Failure):
                record.failed(error.cause)
            record.closed(0, 0)
            raise
        if chosen is None:
            self._serve_http(accepted, sniffed, state, record)
        else:
            self._join(accepted, sniffed, chosen, state, record)

    async def _decide(
        self, accepted: Accepted, state: DestinationState, destination: Destination, record: OutboundRecord
    ) -> tuple[Chosen | None, Sniffed]:
        """What the client speaks, and for opaque bytes the connection they go to; requests are balanced one by one instead."""
        chosen: Chosen | None = None
        sniffed = await self._sniff(accepted, destination)
        if sniffed.protocol is None:
            chosen, sniffed = await self._break_silence(accepted, state, destination, record)
        if sniffed.protocol not in HTTP:
            return chosen or await self._connect_opaque(state, destination, accepted, record), sniffed
        if chosen is not None:
            _discard(chosen)  # it speaks HTTP after all
        return None, sniffed

    def _refuse_loops(self, accepted: Accepted) -> None:
        """Our own ports are never a destination: a connection made to them directly would be forwarded to ourselves for ever.

        They are reached by every address of the pod, not only by those that Kubernetes lists: all of 127.0.0.0/8, a second interface's.
        Nor is the caller a destination. While one way of capture replaces another, conntrack first sees some connections when they are
        already open, may take the answering packet for the opening one, and then names the caller itself as the original destination.
        """
        if tuple(accepted.dst) == tuple(accepted.client):
            raise Failure(Cause.LOOP, f"{accepted.dst} is the caller itself, which it did not dial")
        ours = (self.config.inbound_listen.port, self.config.outbound_listen.port)
        if accepted.dst.port in ours and (_is_local(accepted.dst.ip, self.config.pod_ips) or not _was_led_here(accepted)):
            raise Failure(Cause.LOOP, f"{accepted.dst} is a port of the sidecar itself")

    async def _sniff(self, accepted: Accepted, destination: Destination) -> Sniffed:
        """The protocol: as declared, opaque beyond the mesh, else by the client's first bytes."""
        declared = Detected.OPAQUE if destination.kind == "external" else DECLARED.get(destination.protocol)
        if declared is Detected.OPAQUE:
            return _UNKNOWN
        return await sniff(accepted.stream, self.config.detect_silence_s, self.config.detect_timeout_s)

    async def _break_silence(
        self, accepted: Accepted, state: DestinationState, destination: Destination, record: OutboundRecord
    ) -> tuple[Chosen | None, Sniffed]:
        """The client may be waiting for the server to speak: dial an endpoint for it, and let whoever speaks first decide.

        An endpoint whose policy has routes admits nothing opaque and cuts this connection. The silent client then either does not speak
        HTTP, and will be cut too, or has not sent its request yet. Because of the second kind it gets `detect_timeout_s` to begin.
        """
        declared = DECLARED.get(destination.protocol)
        chosen = None if declared in HTTP else await self._connect_opaque(state, destination, accepted, record)
        patience_s = self.config.idle_timeout_s
        try:
            if chosen is not None:
                with trio.fail_after(self.config.opaque_idle_timeout_s), self.live.silent():
                    first = await who_speaks_first(accepted.stream, chosen.dialled)
                if first == "server":
                    return chosen, _UNKNOWN
                if first != "client":
                    _discard(chosen)
                    chosen = None
                    if first == "nobody":
                        patience_s = self.config.detect_timeout_s
            with trio.move_on_after(patience_s) as scope, self.live.silent():
                await trio.lowlevel.wait_readable(accepted.stream.sock)
            if scope.cancelled_caught:
                raise Failure(Cause.HEAD_TIMEOUT, f"the client said nothing for {patience_s:g} s")
            sniffed = await sniff(accepted.stream, patience_s, self.config.detect_timeout_s)
        except BaseException:
            if chosen is not None:
                _discard(chosen)
            raise
        return chosen, sniffed

    async def _connect_opaque(
        self, state: DestinationState, destination: Destination, accepted: Accepted, record: OutboundRecord
    ) -> Chosen:
        """A connection to one endpoint, another one when the first cannot be reached; raises Failure."""
        dialer, now = self.toolkit.dialer, self.toolkit.now
        if destination.kind == "external":
            return Chosen(EndpointLoad(Endpoint(str(accepted.dst)), now()), await dialer.plain(accepted.dst))
        tried: frozenset[str] = frozenset()
        last = Failure(Cause.NO_ENDPOINTS, f"{destination.ref} has no ready endpoint")
        while (load := state.balancer.choose(now(), avoid=tried)) is not None and len(tried) < 3:
            load.active += 1  # from dialling on: otherwise clients that arrive together would all choose the same endpoint
            try:
                return Chosen(load, await dialer.endpoint(load.endpoint, parse_addr(load.endpoint.addr), alpn.OPAQUE))
            except BaseException as error:
                load.active -= 1
                if not isinstance(error, Failure):
                    raise
                record.log_failure(error)
                load.failed(now())
                tried |= {load.endpoint.addr}
                last = error
        raise last

    def _serve_http(self, accepted: Accepted, sniffed: Sniffed, state: DestinationState, record: OutboundRecord) -> None:
        http1 = sniffed.protocol is Detected.HTTP1
        record.protocol = "HTTP/1.1" if http1 else "HTTP/2"
        link = self.toolkit.relay.adopt(accepted.stream.release(), NO_RECEIVER)
        gate = Http1Gate(self.toolkit, state, record) if http1 else Http2Gate(self.toolkit, state, record)

        def closed() -> None:
            gate.closed()
            record.closed(link.read_bytes, link.written_bytes)

        assert sniffed.protocol is not None
        self.engines.start(link, gate, sniffed.protocol, sniffed.data, closed)

    def _join(self, accepted: Accepted, sniffed: Sniffed, chosen: Chosen, state: DestinationState, record: OutboundRecord) -> None:
        load, dialled = chosen
        relay, idle_s = self.toolkit.relay, self.config.opaque_idle_timeout_s
        secured = dialled.records is not None

        def recheck() -> None:
            """A pod that was dialled before the controller knew it looked external. Once it is known as meshed, plaintext must end."""
            if not secured and _must_be_secured(state, load.endpoint, self.config.pod_ips):
                splice.cut("now-meshed")

        def closed() -> None:
            state.changed.discard(recheck)
            load.active -= 1
            state.release(self.toolkit.now())
            record.closed(link.read_bytes, link.written_bytes)

        with relay.batch():  # nothing of it ends before it is counted
            link, splice = join(relay, ClientSide(accepted.stream, None, sniffed.data), dialled, record.ended, idle_s)
            state.changed.add(recheck)
            self.live.add(link, None, closed)


def _is_local(ip: str, pod_ips: tuple[str, ...]) -> bool:
    return ip in pod_ips or ipaddress.ip_address(ip).is_loopback


def _was_led_here(accepted: Accepted) -> bool:
    """Whether capture brought the connection; another one was made to our listener by the address that it came in at."""
    return from_sockaddr(accepted.stream.sock.getsockname()) != accepted.dst


def _discard(chosen: Chosen) -> None:
    """Nobody wants the connection after all."""
    chosen.dialled.close()
    chosen.load.active -= 1


def _must_be_secured(state: DestinationState, endpoint: Endpoint, own_ips: tuple[str, ...]) -> bool:
    """Whether discovery now names an identity for the very address that a connection goes to."""
    known = state.destination.endpoints if state.destination else ()
    return any(one.addr == endpoint.addr and one.identity is not None and parse_addr(one.addr).ip not in own_ips for one in known)


def _usable(state: DestinationState, accepted: Accepted) -> Destination:
    destination = state.destination
    if destination is None:
        raise Failure(Cause.NO_POLICY, f"nothing is known about {accepted.dst}")
    if destination.kind == "refused":
        raise Failure(Cause.PORT_UNDEFINED, f"{destination.ref} has no port {accepted.dst.port}")
    return destination
