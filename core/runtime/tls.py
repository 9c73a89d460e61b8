"""Mutual TLS between Pillion's processes: contexts made from credentials, peers known by their SPIFFE id, a trio stream over memory BIOs.

Rules, the same everywhere: TLS 1.3 only; AES-128-GCM first, whatever the client prefers (with SHA-384 a handshake takes twice the time);
X25519MLKEM768 first among the groups when the linked OpenSSL has it; no session resumption and no renegotiation (TLS 1.3 has none). OpenSSL
verifies the chain against the trust bundle. The name inside is verified here: a leaf must carry exactly one SAN, a URI that is a workload
identity of our own trust domain. Whoever dials also names the identity it expects.

A `Handshake` is bytes in, bytes out: the data path drives it from its relay loop and moves records itself afterwards. Everything else
(identity, policy) uses `TlsStream`, which waits for its transport.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL
from OpenSSL._util import ffi, lib
from OpenSSL.crypto import FILETYPE_ASN1, X509, dump_certificate

from core.credentials import Credentials
from core.names import InvalidName, WorkloadId, parse_workload_id

CIPHERSUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
_GROUPS_POST_QUANTUM = b"X25519MLKEM768:X25519:P-256:P-384"
_GROUPS_CLASSIC = b"X25519:P-256:P-384"
_MODE_ENABLE_PARTIAL_WRITE = 0x1  # switched on by pyOpenSSL, off by us: with it one call writes only one record of 16 KiB
_MODE_RELEASE_BUFFERS = 0x10  # an idle connection gives its 34 KiB of record buffers back
_MODE_NO_AUTO_CHAIN = 0x8  # otherwise OpenSSL verifies our own chain in every handshake, looking for certificates it does not lack
_OP_NO_TICKET = 0x4000
_OP_NO_RENEGOTIATION = 0x40000000
_READ_BYTES = 65536
_FLIGHT_BYTES = 32768  # at most, from the BIO at once: more than a handshake's flight
_flight = ffi.new("char[]", _FLIGHT_BYTES)  # one for all: pyOpenSSL's bio_read allocates a buffer of this size at every call
_ERROR_WANT_READ = 2
_HANDSHAKE_BYTES_MAX = 256 * 1024  # far beyond any chain of ours; bounds what an unauthenticated peer makes us parse

_VERIFY_OK = 0
_VERIFY_REASONS = {
    9: "not-yet-valid",
    10: "expired",
    18: "self-signed",
    19: "unknown-issuer",
    20: "unknown-issuer",
    21: "unknown-issuer",
    26: "wrong-purpose",
}


class HandshakeFailed(Exception):
    """The peer could not be authenticated, or did not speak TLS 1.3 with us.

    reason: a stable word for metrics: ``expired``, ``not-yet-valid``, ``unknown-issuer``, ``self-signed``, ``no-certificate``,
    ``identity-mismatch``, ``foreign-trust-domain``, ``invalid-identity``, ``closed``, ``reset``, ``alert``, ``protocol``, ``timeout``.
    farewell: bytes to send to the peer before the connection ends, mostly an alert.
    """

    def __init__(self, reason: str, detail: str, farewell: bytes = b"") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.farewell = farewell


def server_context(credentials: Credentials, *, client: Literal["required", "optional"], alpn: Sequence[bytes]) -> SSL.Context:
    """A context for accepting. alpn: what we speak, best first; a client that offers none of them is refused
    after the handshake (pyOpenSSL cannot send the alert of RFC 7301 itself).

    client: ``optional`` lets clients without a certificate in (their ``peer`` is None); a certificate that is shown must verify.
    """
    context = _context(credentials.bundle_pem)
    _present(context, credentials)
    context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE)
    verify = SSL.VERIFY_PEER | (SSL.VERIFY_FAIL_IF_NO_PEER_CERT if client == "required" else 0)
    context.set_verify(verify)
    accepted = tuple(alpn)

    def select(_: SSL.Connection, offered: list[bytes]) -> bytes | object:
        return next((name for name in accepted if name in offered), SSL.NO_OVERLAPPING_PROTOCOLS)

    context.set_alpn_select_callback(select)  # type: ignore[arg-type]
    context.set_tlsext_servername_callback(_send_no_tickets)
    context.set_app_data(accepted)
    return context


def client_context(credentials: Credentials | None, bundle_pem: bytes, alpn: Sequence[bytes] = ()) -> SSL.Context:
    """A context for dialling; without credentials we show no certificate (only the identity service accepts that)."""
    context = _context(bundle_pem)
    if credentials is not None:
        _present(context, credentials)
    context.set_options(_OP_NO_TICKET)
    context.set_verify(SSL.VERIFY_PEER)
    if alpn:
        context.set_alpn_protos(list(alpn))
    return context


def _context(bundle_pem: bytes) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(CIPHERSUITES)
    if lib.SSL_CTX_set1_curves_list(context._context, _GROUPS_POST_QUANTUM) != 1:
        lib.ERR_clear_error()
        lib.SSL_CTX_set1_curves_list(context._context, _GROUPS_CLASSIC)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(_OP_NO_RENEGOTIATION)
    context.set_mode(_MODE_NO_AUTO_CHAIN)
    context.clear_mode(_MODE_ENABLE_PARTIAL_WRITE)
    context.set_mode(_MODE_RELEASE_BUFFERS)
    store = context.get_cert_store()
    if store is None:
        raise RuntimeError("OpenSSL gave no certificate store")
    for anchor in x509.load_pem_x509_certificates(bundle_pem):
        store.add_cert(X509.from_cryptography(anchor))
    return context


def _present(context: SSL.Context, credentials: Credentials) -> None:
    leaf, *intermediates = x509.load_pem_x509_certificates(credentials.chain_pem)
    context.use_certificate(leaf)
    for certificate in intermediates:
        context.add_extra_chain_cert(certificate)
    context.use_privatekey(load_pem_private_key(credentials.key_pem, None))  # type: ignore[arg-type]


def _send_no_tickets(connection: SSL.Connection) -> None:
    """Called once the ClientHello is read, with or without a server name in it.

    A server of TLS 1.3 that has the option from the start sends two tickets nevertheless, of another kind; one that gets it here
    sends none (final_server_name in OpenSSL's extensions.c). They would cost a packet and a wake-up at the peer for each connection.
    """
    connection.set_options(_OP_NO_TICKET)


def peer_identity(connection: SSL.Connection, trust_domain: str) -> WorkloadId | None:
    """Who the verified peer is, None when it showed no certificate; raises HandshakeFailed when its name is not one of ours."""
    certificate = connection.get_peer_certificate()
    if certificate is None:
        return None
    der = dump_certificate(FILETYPE_ASN1, certificate)
    identity = _known_leaves.get(der)
    if identity is None:
        identity = _leaf_identity(x509.load_der_x509_certificate(der))
        if len(_known_leaves) >= _KNOWN_LEAVES_MAX:
            _known_leaves.clear()
        _known_leaves[der] = identity
    if identity.trust_domain != trust_domain:
        raise HandshakeFailed("foreign-trust-domain", f"peer is {identity.uri}, our trust domain is {trust_domain}")
    return identity


# Reading a SAN costs as much as a third of a handshake, and the same few peers connect again and again. Only verified chains get here.
_known_leaves: dict[bytes, WorkloadId] = {}
_KNOWN_LEAVES_MAX = 1024


def _leaf_identity(certificate: x509.Certificate) -> WorkloadId:
    try:
        names = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        signs = any(isinstance(one.value, x509.BasicConstraints) and one.value.ca for one in certificate.extensions)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        raise HandshakeFailed("invalid-identity", "the certificate has no readable subject alternative name") from None
    if signs:
        raise HandshakeFailed("invalid-identity", "the certificate is one that signs others, which names no workload")
    if len(names) != 1 or not isinstance(names[0], x509.UniformResourceIdentifier):
        raise HandshakeFailed("invalid-identity", "the certificate must carry exactly one subject alternative name, a URI")
    try:
        return parse_workload_id(names[0].value)
    except InvalidName as error:
        raise HandshakeFailed("invalid-identity", str(error)) from None


class Handshake:
    """One end of a handshake: takes what was received, gives what is to be sent. Whoever moves the bytes bounds the time.

    peer, alpn: who the other end has proven to be and what is inside, once `done`.
    """

    __slots__ = ("_expect", "_received", "_trust_domain", "alpn", "connection", "done", "peer")

    def __init__(self, connection: SSL.Connection, expect: WorkloadId | None, trust_domain: str) -> None:
        self.connection = connection
        self.done = False
        self.peer: WorkloadId | None = None
        self.alpn = b""
        self._expect = expect
        self._trust_domain = trust_domain
        self._received = 0

    @classmethod
    def client(cls, context: SSL.Context, server_name: str, expect: WorkloadId) -> Handshake:
        """The dialling end. expect: the identity discovery names for this endpoint; any other is refused."""
        connection = SSL.Connection(context, None)
        connection.set_connect_state()
        connection.set_tlsext_host_name(server_name.encode("ascii"))
        return cls(connection, expect, expect.trust_domain)

    @classmethod
    def server(cls, context: SSL.Context, trust_domain: str) -> Handshake:
        """The accepting end."""
        connection = SSL.Connection(context, None)
        connection.set_accept_state()
        return cls(connection, None, trust_domain)

    def step(self, data: bytes) -> bytes:
        """Go on with what was received (nothing yet at the beginning); returns what is to be sent. Raises HandshakeFailed."""
        self._received += len(data)
        if self._received > _HANDSHAKE_BYTES_MAX:
            raise HandshakeFailed("protocol", "the peer's handshake is too long")
        connection = self.connection
        ssl = connection._ssl
        if data:
            lib.BIO_write(connection._into_ssl, data, len(data))
        result = lib.SSL_do_handshake(ssl)
        if result != 1:
            if lib.SSL_get_error(ssl, result) == _ERROR_WANT_READ:
                return _output(connection)
            try:
                connection._raise_ssl_error(ssl, result)
            except (SSL.Error, SSL.SysCallError) as error:
                raise _failure(connection, error, _output(connection)) from None
        flight = _output(connection)
        try:
            self._check_peer()
        except HandshakeFailed as error:
            error.farewell = flight
            raise
        self.done = True
        return flight

    def _check_peer(self) -> None:
        self.alpn = self.connection.get_alpn_proto_negotiated()
        if not self.alpn and self.connection.get_context().get_app_data():
            raise HandshakeFailed("protocol", "the client offers no application protocol that is spoken here")
        self.peer = peer_identity(self.connection, self._trust_domain)
        if self._expect is not None and self.peer != self._expect:
            found = self.peer.uri if self.peer else "nobody"
            raise HandshakeFailed("identity-mismatch", f"expected {self._expect.uri}, the peer is {found}")


def _output(connection: SSL.Connection) -> bytes:
    """Everything that OpenSSL wants sent by now, mostly one piece."""
    output = b""
    while (n := lib.BIO_read(connection._from_ssl, _flight, _FLIGHT_BYTES)) > 0:
        output += ffi.buffer(_flight, n)[:]
        if n < _FLIGHT_BYTES:
            break
    return output


def _failure(connection: SSL.Connection, error: SSL.Error, farewell: bytes = b"") -> HandshakeFailed:
    """Why OpenSSL gave up. The result of verifying the chain is read here, not by a callback, which every good handshake would pay for."""
    code = lib.SSL_get_verify_result(connection._ssl)
    if code != _VERIFY_OK:
        return HandshakeFailed(_VERIFY_REASONS.get(code, "unverified"), f"the peer's certificate: X.509 verify error {code}", farewell)
    parts = error.args[0] if error.args and isinstance(error.args[0], list) else []
    text = "; ".join(part[2] for part in parts if len(part) > 2) or "connection closed"
    if "peer did not return a certificate" in text:
        return HandshakeFailed("no-certificate", text, farewell)
    return HandshakeFailed("alert" if "alert" in text else "protocol", text, farewell)


class TlsStream(trio.abc.HalfCloseableStream):
    """TLS over any trio stream, by memory BIOs: call OpenSSL, then wait for exactly one thing, then again.

    One task may send while another receives. close_notify is a real half-close: after `send_eof` the peer's bytes still arrive
    (RFC 8446 section 6.1), and a peer that vanishes without it raises BrokenResourceError instead of ending the stream.
    """

    def __init__(self, transport: trio.abc.HalfCloseableStream, handshake: Handshake) -> None:
        self.transport = transport
        self.connection = handshake.connection
        self._handshake = handshake
        self._send_lock = trio.StrictFIFOLock()

    @classmethod
    def client(cls, transport: trio.abc.HalfCloseableStream, context: SSL.Context, server_name: str, expect: WorkloadId) -> TlsStream:
        """See Handshake.client."""
        return cls(transport, Handshake.client(context, server_name, expect))

    @classmethod
    def server(cls, transport: trio.abc.HalfCloseableStream, context: SSL.Context, trust_domain: str) -> TlsStream:
        """See Handshake.server."""
        return cls(transport, Handshake.server(context, trust_domain))

    @property
    def peer(self) -> WorkloadId | None:
        """Who the other end is, after the handshake; None: it showed no certificate."""
        return self._handshake.peer

    @property
    def alpn(self) -> bytes:
        """What is inside, after the handshake."""
        return self._handshake.alpn

    async def do_handshake(self, already_received: bytes = b"") -> None:
        """Run the handshake and learn `peer` and `alpn`; raises HandshakeFailed. already_received: bytes sniffed from the transport.

        The caller bounds the time. On failure an alert was sent if TLS had one to send; the transport is left open.
        """
        handshake, data = self._handshake, already_received
        try:
            while True:
                if flight := handshake.step(data):
                    await self.transport.send_all(flight)
                if handshake.done:
                    return
                data = bytes(await self.transport.receive_some(_READ_BYTES))
                if not data:
                    raise HandshakeFailed("closed", "the peer ended the handshake early")
        except HandshakeFailed as failed:
            if failed.farewell:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # the peer is gone already
                    await self.transport.send_all(failed.farewell)
            raise
        except trio.BrokenResourceError:
            raise HandshakeFailed("reset", "the peer reset the connection during the handshake") from None

    async def _flush_alert(self) -> None:
        try:
            await self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the peer is gone already; the cause we report is the handshake's

    async def _flush(self) -> None:
        async with self._send_lock:
            while data := _output(self.connection):  # also what a reader left to us meanwhile
                await self.transport.send_all(data)

    async def _answer(self) -> None:
        """Send what reading has TLS say: key updates are answered. Never what our sender has to send, nor after waiting for it, because two
        ends that both send more than the network holds would then both not read."""
        try:
            self._send_lock.acquire_nowait()
        except trio.WouldBlock:
            return  # the sender takes it along
        try:
            if data := _output(self.connection):
                await self.transport.send_all(data)
        finally:
            self._send_lock.release()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send everything; on cancellation an unknown part was sent and the stream is unusable."""
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            try:
                view = view[self.connection.send(view[:_READ_BYTES]) :]
            except SSL.Error as error:
                raise trio.BrokenResourceError("TLS connection is unusable") from error
            await self._flush()

    async def wait_send_all_might_not_block(self) -> None:
        """As the transport's."""
        await self.transport.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Up to ``max_bytes`` decrypted bytes, ``b""`` after the peer's close_notify; BrokenResourceError when it was cut off."""
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self.connection.recv(max_bytes or _READ_BYTES)
            except SSL.WantReadError:
                pass
            except SSL.ZeroReturnError:
                return b""
            except SSL.Error as error:
                await self._flush_alert()
                raise trio.BrokenResourceError(f"TLS: {_failure(self.connection, error)}") from error
            await self._answer()
            data = await self.transport.receive_some(_READ_BYTES)
            if not data:
                raise trio.BrokenResourceError("the peer closed the connection without close_notify")
            self.connection.bio_write(data)

    async def send_eof(self) -> None:
        """close_notify: nothing more comes from us; receiving goes on."""
        try:
            self.connection.shutdown()
        except SSL.Error as error:
            raise trio.BrokenResourceError("TLS connection is unusable") from error
        await self._flush()

    async def aclose(self) -> None:
        """Send close_notify if the peer still takes it, then close the transport."""
        try:
            with trio.move_on_after(1):
                await self.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            pass  # closing a dead connection: nobody is left to tell
        finally:
            await self.transport.aclose()
