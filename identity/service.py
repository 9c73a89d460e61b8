"""The identity service on the wire: HTTPS by hypercorn and starlette on trio. See `wire` for what is said.

Moves requests to the reviewer of tokens, the check of requests and the authority, in that order; what any of them refuses becomes
401, 400, 403 or 503 with one sentence. It must not decide rotations (`authority`). Called by `__main__`.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from core.k8s.https import BadBody, read_body
from core.names import WorkloadId
from core.runtime import logs
from core.runtime.rooms import Full, Rooms
from core.runtime.throttle import Throttle
from identity.authority import Authority
from identity.csr import CsrRefused, read_csr_untrusted
from identity.issuer import IssuerExpired
from identity.pace import Pace
from identity.tokens import ReviewUnavailable, Subject, TokenRefused, TokenReviewer
from identity.wire import BODY_MAX_BYTES, POLL_S, TOKEN_MAX_BYTES, Known, Refused, WireError, certify_request_untrusted

_REVIEWS_AT_ONCE = 64
_SIGNATURES_AT_ONCE = 256  # requests in work; for one more the client that has most of them loses its oldest
_FEW_AT_ONCE = 4  # of one client, which loses none of them
_A_MINUTE = 20  # certificates of one pod; with the shortest life that leaves have, and every renewal tried anew, it needs six
_REMEMBER_REVIEW_S = 300.0  # a poll every 30 s must not cost the API server a review each; only polls are answered on a memory
_REMEMBERED_MAX = 20_000

log = logs.logger("identity")


class Rejected(Exception):
    """An answer other than success: status and sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


@dataclass
class Counters:
    """What the metrics report. refused: by status."""

    certified: int = 0
    polls: int = 0
    refused: dict[int, int] = field(default_factory=dict)


class IdentityService:
    """The application. draining: set it to end the long polls at once.

    peer: who may ask what we know of the workloads (other replicas of ours); None for nobody. failed: learns why a caller whose token was
    good got no certificate: a word, and a sentence without secrets. catch_up: called when a caller may know a newer trust state than we do.
    polls_max: how many may wait for news; more are told to come back.
    """

    def __init__(
        self,
        authority: Authority,
        reviewer: TokenReviewer,
        *,
        peer: WorkloadId | None = None,
        failed: Callable[[Subject, str, str], None] = lambda subject, word, sentence: None,
        catch_up: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
        polls_max: int = 20_000,
    ) -> None:
        self._authority = authority
        self._reviewer = reviewer
        self._peer = peer
        self._failed = failed
        self._catch_up = catch_up
        self._started_at = trio.current_time()
        self._polls_max = polls_max
        self._reviews = trio.CapacityLimiter(_REVIEWS_AT_ONCE)
        self._in_work = Rooms(_SIGNATURES_AT_ONCE, _SIGNATURES_AT_ONCE, _FEW_AT_ONCE)
        self._pace = Pace(_A_MINUTE, _REMEMBERED_MAX)
        self._polls: dict[str, trio.CancelScope] = {}
        self._remembered: OrderedDict[bytes, tuple[float, Subject]] = OrderedDict()
        self.counters = Counters()
        self.draining = False
        self._throttle = Throttle(time.monotonic)

    def application(self) -> Starlette:
        """For hypercorn."""
        routes = [
            Route("/v1/certify", self._answering(self._certify), methods=["POST"]),
            Route("/v1/bundle", self._answering(self._bundle), methods=["GET"]),
        ]
        if self._peer is not None:
            routes.append(Route("/v1/ledger", self._answering(self._ledger), methods=["GET"]))
        return Starlette(routes=routes)

    def drain(self) -> None:
        """Answer every long poll now and take no new one."""
        self.draining = True
        for scope in tuple(self._polls.values()):
            scope.cancel()

    def _answering(self, work: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                if request.scope["http_version"] != "1.1":
                    raise Rejected(400, "HTTP/1.1 only")
                return await work(request)
            except Rejected as rejected:
                self.counters.refused[rejected.status] = self.counters.refused.get(rejected.status, 0) + 1
                peer = request.client.host if request.client else ""
                about = {"path": request.url.path, "status": rejected.status, "reason": rejected.sentence, "client": peer}
                self._throttle.say(log.info, str(rejected.status), "refused", **about)
                return _json(rejected.status, Refused(rejected.sentence))
            except Exception as error:  # our bug: hypercorn would end the connection and say nothing
                log.error("request failed", path=request.url.path, exc_info=error)
                return _json(500, Refused("the service failed on this request, see its log"))

        return answer

    async def _certify(self, request: Request) -> Response:
        token = _bearer(request)
        body = await _body(request)  # before it counts: whoever sends slowly must not use up what is in work
        try:
            with self._in_work.one(request.client.host if request.client else ""):
                return await self._signed(token, body)
        except Full:
            pass
        raise Rejected(503, "too many requests are in work, try again")

    async def _signed(self, token: str, body: bytes) -> Response:
        _, known = self._remembered.get(_digest(token), (0.0, None))
        if known is not None:  # before anybody is asked about the token again
            self._check_pace(known)
        subject = await self._reviewed(token)
        self._check_pace(subject)
        try:
            key, named = read_csr_untrusted(certify_request_untrusted(body).csr.encode())
        except (WireError, CsrRefused) as error:
            raise self._told(subject, "InvalidCertificateRequest", 400, str(error)) from None
        if named != subject.identity:
            sentence = f"the request is for {named.uri}, the token is of {subject.identity.uri}"
            raise self._told(subject, "IdentityMismatch", 403, sentence)
        try:
            certified = self._authority.certify(key, subject)
        except IssuerExpired as error:
            raise self._told(subject, "IssuerExpired", 503, str(error)) from None
        self._pace.had_one(subject.pod_uid, trio.current_time())
        self.counters.certified += 1
        log.info("certified", identity=named.uri, pod=subject.pod, issuer=certified.issuer, not_after=certified.not_after)
        return _json(200, certified)

    def _check_pace(self, subject: Subject) -> None:
        wait_s = self._pace.wait_s(subject.pod_uid, trio.current_time())
        if wait_s:
            raise Rejected(429, f"pod {subject.pod} had {_A_MINUTE} certificates within a minute, try again in {wait_s:.0f} s")

    async def _bundle(self, request: Request) -> Response:
        generation, issuer = _reported(request)
        subject = await self._remembered_review(_bearer(request))
        if self._authority.behind(generation, issuer):
            await self._catch_up()
        self._authority.report(subject, generation, issuer)
        self.counters.polls += 1
        trust = self._authority.trust
        with self._one_poll(subject.pod_uid):
            await trust.wait_for(lambda now: now.generation != generation or now.issuer.id != issuer)
        if trust.value.generation == generation and trust.value.issuer.id == issuer:
            return Response(status_code=204)
        return _json(200, self._authority.bundle())

    async def _ledger(self, request: Request) -> Response:
        subject = await self._reviewed(_bearer(request))
        if subject.identity != self._peer:
            raise Rejected(403, f"this is for replicas of the identity service, the token is of {subject.identity.uri}")
        return _json(200, self.known())

    def known(self) -> Known:
        """What this replica knows of the workloads."""
        trust, authority = self._authority.trust.value, self._authority
        holdings = list(authority.ledger.live(authority.clock()))
        return Known(trust.generation, trust.issuer.id, trio.current_time() - self._started_at, holdings)

    def _told(self, subject: Subject, word: str, status: int, sentence: str) -> Rejected:
        self._failed(subject, word, sentence)
        return Rejected(status, sentence)

    @contextmanager
    def _one_poll(self, instance: str) -> Iterator[None]:
        """Room for one waiting poll an instance: a sidecar that reconnects ends its earlier one, and cannot pile them up."""
        earlier = self._polls.pop(instance, None)
        if earlier is not None:
            earlier.cancel()
        if self.draining or len(self._polls) >= self._polls_max:
            raise Rejected(503, "the service is draining" if self.draining else "too many workloads wait here, try again")
        scope = self._polls[instance] = trio.CancelScope(deadline=trio.current_time() + POLL_S)
        try:
            with scope:
                yield
        finally:
            if self._polls.get(instance) is scope:
                del self._polls[instance]

    async def _reviewed(self, token: str) -> Subject:
        try:
            async with self._reviews:
                subject = await self._reviewer.review(token)
        except TokenRefused as error:
            raise Rejected(401, error.reason) from None
        except ReviewUnavailable as error:
            log.warning("review unavailable", reason=str(error))
            raise Rejected(503, "the token cannot be checked now, try again") from None
        self._remembered[_digest(token)] = (trio.current_time() + _REMEMBER_REVIEW_S, subject)
        while len(self._remembered) > _REMEMBERED_MAX:
            self._remembered.popitem(last=False)
        return subject

    async def _remembered_review(self, token: str) -> Subject:
        until, subject = self._remembered.get(_digest(token), (0.0, None))
        if subject is not None and trio.current_time() < until:
            return subject
        return await self._reviewed(token)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _json(status: int, content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")


def _bearer(request: Request) -> str:
    values = request.headers.getlist("authorization")
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Rejected(401, "expected one header Authorization: Bearer <token>")
    if len(token) > TOKEN_MAX_BYTES or not token.isascii():
        raise Rejected(401, f"the token is longer than {TOKEN_MAX_BYTES} bytes or not ASCII")
    return token


def _reported(request: Request) -> tuple[int, str]:
    generation, issuer = request.query_params.get("generation", ""), request.query_params.get("issuer", "")
    if not (generation.isascii() and generation.isdigit() and len(generation) <= 12):
        raise Rejected(400, "generation: expected the number of the bundle you trust, 0 for none")
    if len(issuer) > 64 or not issuer.isascii() or not issuer.isalnum():
        raise Rejected(400, "issuer: expected the id of the issuer of your certificate")
    return int(generation), issuer


async def _body(request: Request) -> bytes:
    try:
        return await read_body(request, BODY_MAX_BYTES)
    except BadBody as error:
        raise Rejected(error.status, str(error)) from None
