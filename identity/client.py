"""Keeps a sidecar certified: makes its key, has it certified, renews in time, follows the trust bundle.

Moves certificates from the identity service into the cell that the data path reads; it must not decide what a missing or expired
certificate means (the proxy does). Runs in the sidecar: no starlette, no hypercorn. Called by `proxy.app`, and by the policy
controller for its own identity.

Theory of operation. Two tasks. *Renewing* certifies a fresh key at 70 % of the certificate's life, or soon after the issuer changed.
*Following* holds a long poll that reports the bundle generation and issuer in use, and returns as soon as either differs: a new
bundle goes into the cell at once, beside the present key and chain; a new issuer wakes the renewing task. While the service is away
both retry with capped backoff, and the cell keeps its value: when `Credentials.not_after` has passed, that value is of no more use
and the proxy refuses traffic by it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import h11
import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from core.credentials import Credentials
from core.names import WorkloadId
from core.runtime.tls import HandshakeFailed, TlsStream, client_context
from core.runtime.watch import Cell
from identity.chains import InvalidBundle, leaf_unfit, read_bundle_untrusted
from identity.csr import make_csr
from identity.exchange import ExchangeFailed, exchange
from identity.schedule import follow_after_s, renew_after_s, retry_after_s
from identity.wire import (
    ANSWER_MAX_BYTES,
    POLL_S,
    TOKEN_MAX_BYTES,
    Bundle,
    Certified,
    CertifyRequest,
    Refused,
    WireError,
    bundle_untrusted,
    certified_untrusted,
)

_CONNECT_TIMEOUT_S = 5.0
_CERTIFY_TIMEOUT_S = 15.0
_POLL_TIMEOUT_S = POLL_S + 10.0
_LOOK_S = 30.0  # the wall clock may jump: look again at least this often
_RENEWAL_WAIT_S = 5.0  # how long following waits for renewing before it polls again
_BREATH_S = 0.1  # between polls: whatever the service answers, we do not spin
_ANCHORS_MAX_BYTES = 64 * 1024


class IdentityAway(Exception):
    """The service could not be asked, or refused; the text says why and never holds the token. reason: a stable word for metrics."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Observer(Protocol):
    """Learns what happens, for metrics and logs. Called synchronously."""

    def certified(self, credentials: Credentials) -> None:
        """A fresh certificate is in use: ``not_after`` for the expiry metric, one more refresh."""

    def bundle_changed(self, credentials: Credentials, generation: int) -> None:
        """The trust bundle was replaced."""

    def failed(self, reason: str, detail: str, retry_in_s: float) -> None:
        """Certifying or following failed; one more failure."""


class Silent:
    """An observer that nobody asks."""

    def certified(self, credentials: Credentials) -> None:
        """Nothing."""

    def bundle_changed(self, credentials: Credentials, generation: int) -> None:
        """Nothing."""

    def failed(self, reason: str, detail: str, retry_in_s: float) -> None:
        """Nothing."""


@dataclass(frozen=True)
class IdentitySettings:
    """addr: the service, host (name or IP) and port. expect: its identity. identity: ours. token_file, anchors_file: read anew when
    needed. dial: how to connect. clock: seconds since the epoch. chance: uniform in [0, 1)."""

    addr: tuple[str, int]
    expect: WorkloadId
    identity: WorkloadId
    token_file: Path
    anchors_file: Path
    dial: Callable[[str, int], Awaitable[trio.abc.HalfCloseableStream]] = trio.open_tcp_stream
    clock: Callable[[], float] = time.time
    chance: Callable[[], float] = random.random


async def keep_certified(settings: IdentitySettings, cell: Cell[Credentials | None], observe: Observer | None = None) -> None:
    """Run for ever: the cell holds None until the first certificate, then always the newest credentials.

    Nothing that the service or the network does ends this; on cancellation the cell keeps its value.
    """
    follower = _Workload(settings, cell, observe or Silent())
    await follower.renew_until_done()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.keep_renewing)
        nursery.start_soon(follower.keep_following)


class Anchors:
    """What we believe the service by: the file at first, then the bundle that the service sent, and the file again once it changes.

    A file that did not change is never fallen back on: after a rotation it may still hold the anchor that was dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: bytes | None = None
        self._sent: bytes | None = None

    def bundle_pem(self) -> bytes:
        """The bundle to verify the service by; raises IdentityAway when there is none."""
        content = self._read()
        if content is not None and content != self._seen:
            self._seen, self._sent = content, None
        bundle_pem = self._sent or self._seen
        if bundle_pem is None:
            raise IdentityAway("no-trust-anchors", f"{self._path} cannot be read, or holds no certificates")
        return bundle_pem

    def sent(self, bundle_pem: bytes) -> None:
        """The service, believed so far, sent its bundle."""
        self._sent = bundle_pem

    def _read(self) -> bytes | None:
        try:
            with self._path.open("rb") as file:
                content = file.read(_ANCHORS_MAX_BYTES + 1)
            read_bundle_untrusted(content)
        except (OSError, InvalidBundle):
            return None
        return content


class _Workload:
    """The state of one `keep_certified`."""

    def __init__(self, settings: IdentitySettings, cell: Cell[Credentials | None], observe: Observer) -> None:
        self._settings = settings
        self._cell = cell
        self._observe = observe
        self._anchors = Anchors(settings.anchors_file)
        self._generation = 0
        self._issuer = ""
        self._renewals = Cell(0)
        self._wanted_issuer = Cell("")

    async def renew_until_done(self) -> None:
        """Certify a fresh key, however often it takes."""
        failures = 0
        while True:
            try:
                await self._renew()
                return
            except IdentityAway as error:
                failures += 1
                await self._pause(error, failures)

    async def keep_renewing(self) -> None:
        clock, chance = self._settings.clock, self._settings.chance
        while True:
            credentials = self._credentials()
            due = clock() + renew_after_s(clock(), credentials.not_after, chance())
            version = self._wanted_issuer.version
            while self._wanted_issuer.value in ("", self._issuer) and (left := due - clock()) > 0:
                with trio.move_on_after(min(left, _LOOK_S)):
                    version = await self._wanted_issuer.wait_newer(version)
            if clock() < due:
                await trio.sleep(follow_after_s(credentials.not_after - clock(), chance()))
            await self.renew_until_done()

    async def keep_following(self) -> None:
        failures = 0
        while True:
            try:
                async with await self._connect() as stream:
                    connection = h11.Connection(h11.CLIENT)
                    while connection.our_state is h11.IDLE:  # else the service wants a fresh connection
                        await self._follow_once(stream, connection)
                        failures = 0
                        await trio.sleep(_BREATH_S)
            except IdentityAway as error:
                failures += 1
                await self._pause(error, failures)

    async def _follow_once(self, stream: TlsStream, connection: h11.Connection) -> None:
        target = f"/v1/bundle?generation={self._generation}&issuer={self._issuer}"
        renewals = self._renewals.version
        status, answer = await self._ask(stream, connection, "GET", target, b"", _POLL_TIMEOUT_S)
        if status == 204:
            return
        try:
            news = bundle_untrusted(answer)
            read_bundle_untrusted(news.bundle.encode())
        except (WireError, InvalidBundle) as error:
            raise IdentityAway("invalid-answer", str(error)) from None
        self._trust(news)
        if news.issuer != self._issuer:
            self._wanted_issuer.set(news.issuer)
            with trio.move_on_after(_RENEWAL_WAIT_S):
                await self._renewals.wait_newer(renewals)

    def _trust(self, news: Bundle) -> None:
        credentials = self._credentials()
        bundle_pem = news.bundle.encode()
        self._generation = news.generation
        if bundle_pem != credentials.bundle_pem:
            self._anchors.sent(bundle_pem)
            fresh = replace(credentials, bundle_pem=bundle_pem)
            self._cell.set(fresh)
            self._observe.bundle_changed(fresh, news.generation)

    async def _renew(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        request = CertifyRequest(make_csr(key, self._settings.identity).decode())
        async with await self._connect() as stream:
            connection = h11.Connection(h11.CLIENT)
            body = msgspec.json.encode(request)
            status, answer = await self._ask(stream, connection, "POST", "/v1/certify", body, _CERTIFY_TIMEOUT_S)
        try:
            certified = certified_untrusted(answer)
            unfit = leaf_unfit(certified.chain.encode(), certified.bundle.encode(), key.public_key(), self._settings.identity)
        except (WireError, InvalidBundle) as error:
            raise IdentityAway("invalid-answer", f"status {status}: {error}") from None
        if unfit or certified.not_after <= self._settings.clock():
            raise IdentityAway("invalid-answer", unfit or "the certificate has expired already, compare the clocks")
        self._use(key, certified)

    def _use(self, key: ec.EllipticCurvePrivateKey, certified: Certified) -> None:
        bundle_pem = certified.bundle.encode()
        self._anchors.sent(bundle_pem)
        self._generation, self._issuer = certified.generation, certified.issuer
        credentials = Credentials(
            self._settings.identity,
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            certified.chain.encode(),
            bundle_pem,
            certified.not_before,
            certified.not_after,
        )
        self._cell.set(credentials)
        self._renewals.set(self._renewals.value + 1)
        self._observe.certified(credentials)

    def _credentials(self) -> Credentials:
        credentials = self._cell.value
        assert credentials is not None, "certified before the tasks start, and nobody takes a certificate away"
        return credentials

    async def _connect(self) -> TlsStream:
        host, port = self._settings.addr
        expect = self._settings.expect
        context = client_context(None, self._anchors.bundle_pem(), (b"http/1.1",))
        try:
            with trio.fail_after(_CONNECT_TIMEOUT_S):
                transport = await self._settings.dial(host, port)
                stream = TlsStream.client(transport, context, expect.server_name, expect)
                try:
                    await stream.do_handshake()
                except BaseException:
                    await trio.aclose_forcefully(transport)
                    raise
        except OSError as error:
            raise IdentityAway("connect-failed", f"{host}:{port}: {error.strerror or error}") from None
        except trio.TooSlowError:
            raise IdentityAway("connect-timeout", f"{host}:{port} did not answer within {_CONNECT_TIMEOUT_S:.0f} s") from None
        except (HandshakeFailed, trio.BrokenResourceError) as error:
            raise IdentityAway("tls-failed", f"{host}:{port}: {error}") from None
        return stream

    async def _ask(
        self, stream: TlsStream, connection: h11.Connection, method: str, target: str, body: bytes, timeout_s: float
    ) -> tuple[int, bytes]:
        headers = [
            ("host", self._settings.expect.server_name),
            ("authorization", f"Bearer {self._token()}"),
            ("content-length", str(len(body))),
        ]
        if body:
            headers.append(("content-type", "application/json"))
        request = h11.Request(method=method, target=target, headers=headers)
        try:
            with trio.fail_after(timeout_s):
                status, answer = await exchange(stream, connection, request, body, ANSWER_MAX_BYTES)
        except trio.TooSlowError:
            raise IdentityAway("timeout", f"no answer to {method} {target.partition('?')[0]} within {timeout_s:.0f} s") from None
        except (ExchangeFailed, trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise IdentityAway("connection-lost", str(error)) from None
        if status not in (200, 204):
            raise IdentityAway(f"status-{status}", _sentence(answer))
        return status, answer

    def _token(self) -> str:
        path = self._settings.token_file
        try:
            token = path.read_bytes()[: TOKEN_MAX_BYTES + 1].decode("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise IdentityAway("no-token", f"{path}: {error}") from None
        if not token or len(token) > TOKEN_MAX_BYTES or not token.isprintable() or " " in token:
            raise IdentityAway("no-token", f"{path} does not hold one token of at most {TOKEN_MAX_BYTES} bytes")
        return token

    async def _pause(self, error: IdentityAway, failures: int) -> None:
        credentials = self._cell.value
        left = credentials.not_after - self._settings.clock() if credentials else 0.0
        pause = retry_after_s(failures, left, self._settings.chance())
        self._observe.failed(error.reason, error.detail, pause)
        await trio.sleep(pause)


def _sentence(answer: bytes) -> str:
    try:
        return msgspec.json.decode(answer, type=Refused).error[:500]
    except (msgspec.DecodeError, RecursionError):
        return "the service gave no reason"
