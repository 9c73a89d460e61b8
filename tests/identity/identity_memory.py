"""The real application behind real TLS over in-memory streams, so that a virtual clock can run days in milliseconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import h11
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from core.credentials import Credentials
from core.names import WorkloadId
from core.runtime.tls import HandshakeFailed, TlsStream, server_context
from core.runtime.watch import Cell
from identity.authority import Authority
from identity.client import IdentitySettings
from identity.issuer import sign_leaf
from identity.service import IdentityService
from identity.tokens import Subject, TokenRefused
from tests.identity.identity_lab import SERVICE, TRUST_DOMAIN, Recorder, Workload

_started = trio.lowlevel.RunVar[float]("started")


def started() -> float:
    """When the test began, by the real clock, which is the one that OpenSSL reads."""
    try:
        return _started.get()
    except LookupError:
        _started.set(time.time() - trio.current_time())
        return _started.get()


def virtual_now() -> float:
    """The wall clock that belongs to trio's (virtual) clock."""
    return started() + trio.current_time()


@dataclass
class Guests:
    """A reviewer that knows its callers by token."""

    known: dict[str, Subject] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    async def review(self, token: str) -> Subject:
        self.seen.append(token)
        if token not in self.known:
            raise TokenRefused("nobody knows this token")
        return self.known[token]


class MemoryLab:
    """dial: what a workload connects by. down: the service is away. serves_as: the identity its certificate names."""

    def __init__(self, directory: Path, nursery: trio.Nursery, lifetime_s: float = 86400) -> None:
        self.directory = directory
        self.nursery = nursery
        self.authority = Authority.self_made(TRUST_DOMAIN, None, lifetime_s=lifetime_s, clock=virtual_now)
        self.guests = Guests()
        self.service = IdentityService(self.authority, self.guests)
        self.serves_as = SERVICE
        self.down = False
        self.streams: list[trio.abc.Stream] = []
        self.requests: list[tuple[float, str]] = []
        self.answer_instead: tuple[int, bytes] | None = None
        self.anchors_file = directory / "anchors.pem"
        self.anchors_file.write_bytes(self.authority.trust.value.bundle_pem)

    def workload(self, service_account: str = "cart", chance: float = 0.0) -> Workload:
        identity = WorkloadId(TRUST_DOMAIN, "shop", service_account)
        token_file = self.directory / f"{service_account}.token"
        token_file.write_text(f"token-of-{service_account}")
        self.guests.known[f"token-of-{service_account}"] = Subject(identity, f"{service_account}-0", f"uid-{service_account}")
        settings = IdentitySettings(
            ("identity", 8080), SERVICE, identity, token_file, self.anchors_file, self.dial, virtual_now, lambda: chance
        )
        return Workload(settings, Cell[Credentials | None](None), Recorder())

    async def dial(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        if self.down:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self.streams.append(ours)
        self.nursery.start_soon(self._serve, ours)
        return theirs

    async def go_down(self) -> None:
        self.down = True
        for stream in self.streams:
            await trio.aclose_forcefully(stream)

    def _credentials(self) -> Credentials:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = sign_leaf(self.authority.issuer, key.public_key(), self.serves_as, started(), 86400).chain_pem
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Credentials(self.serves_as, key_pem, leaf, self.authority.trust.value.bundle_pem, 0, 0)

    async def _serve(self, transport: trio.abc.HalfCloseableStream) -> None:
        context = server_context(self._credentials(), client="optional", alpn=[b"http/1.1"])
        stream = TlsStream.server(transport, context, TRUST_DOMAIN)
        try:
            await stream.do_handshake()
            connection = h11.Connection(h11.SERVER)
            while connection.our_state is h11.IDLE:
                await self._answer(stream, connection)
        except (trio.BrokenResourceError, trio.ClosedResourceError, HandshakeFailed, h11.RemoteProtocolError):
            pass

    async def _answer(self, stream: TlsStream, connection: h11.Connection) -> None:
        """One request through the ASGI application."""
        request, body = None, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some()))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.ConnectionClosed):
                raise trio.ClosedResourceError
            else:
                break
        assert request is not None
        self.requests.append((trio.current_time(), request.target.decode()))
        status, answer = self.answer_instead or await self._asgi(request, body)
        response = h11.Response(status_code=status, headers=[("content-length", str(len(answer)))])
        sent = connection.send(response) + connection.send(h11.Data(data=answer)) + connection.send(h11.EndOfMessage())
        await stream.send_all(sent)
        connection.start_next_cycle()

    async def _asgi(self, request: h11.Request, body: bytes) -> tuple[int, bytes]:
        path, _, query = request.target.partition(b"?")
        scope = {"type": "http", "http_version": "1.1", "method": request.method.decode(), "path": path.decode(), "query_string": query}
        scope |= {"headers": list(request.headers), "raw_path": path, "root_path": "", "scheme": "https", "client": ("10.0.0.1", 1)}
        status, parts, asked = 0, [b""], False

        async def receive() -> dict[str, object]:
            nonlocal asked
            if asked:
                await trio.sleep_forever()
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, object]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(str(message["status"]))
            else:
                parts.append(bytes(message.get("body", b"")))  # type: ignore[call-overload]

        await self.service.application()(scope, receive, send)  # type: ignore[arg-type]
        return status, b"".join(parts)
