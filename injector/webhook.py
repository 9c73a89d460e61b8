"""The mutating webhook: a pod that somebody wants to create, and what of it is changed or why it is refused.

Moves an AdmissionReview to the decision of `injector.patch` and its answer back; decides nothing itself. Never fails for what it is sent:
other bytes than a review are answered with 4xx. What it cannot know (the namespace's annotations) is answered with 503, so that the
webhook's failurePolicy decides; what fails in here for a pod that somebody wants in the mesh is a refusal, because a pod must not slip
around the mesh by our mistake. Called by `injector.app`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from core.k8s import review
from core.k8s.https import BadBody, Bodies
from core.runtime import logs
from injector.decide import Decision, Inject, Refuse, Skip, wants
from injector.mesh import Mesh
from injector.metrics import Metrics
from injector.patch import Operation
from injector.patch import review as review_pod

# What strangers can make us hold: JSON becomes up to 20 times its size as objects. A review of an ordinary pod has some 20 KiB; those
# that are much larger are taken one at a time, the others by the number of connections, and of all only a few are objects at once.
_ORDINARY_BYTES = 256 << 10
_AT_ONCE = 8
_NAMESPACE_S = 4.0  # the API server waits 10 s for us
_TURN_S = 8.0

log = logs.logger("injector")

TELLING = frozenset({"host-network", "unsupported-os", "foreign-sidecar"})
"""Reasons to skip a pod that was wanted in the mesh: said to whoever creates it, and in an Event."""


class NamespaceUnknown(Exception):
    """Nobody could say now what the namespace's annotations are."""


class Namespaces(Protocol):
    """Knows namespaces."""

    async def annotations(self, namespace: str) -> Mapping[str, str]:
        """Of a namespace; none when it does not exist. Raises NamespaceUnknown."""
        ...


class Teller(Protocol):
    """Tells the owner of a pod what became of it."""

    def tell(self, pod: Mapping[str, Any], namespace: str, decision: Skip | Refuse) -> None:
        """Must return at once and never raise."""
        ...


class Webhook:
    """The application. mesh: read at each request, so that new settings count at once.

    closing: set it when the process is about to end; answers then ask the API server to connect anew, elsewhere, because a request on a
    connection that ends under it is not sent again, and failurePolicy would decide.
    """

    def __init__(self, mesh: MeshSource, namespaces: Namespaces, teller: Teller, metrics: Metrics) -> None:
        self.closing = False
        self._mesh = mesh
        self._namespaces = namespaces
        self._teller = teller
        self._metrics = metrics
        self._work = trio.CapacityLimiter(_AT_ONCE)
        self._bodies = Bodies(_ORDINARY_BYTES, review.BODY_MAX_BYTES)

    def application(self) -> Starlette:
        """For `core.k8s.https`."""
        return Starlette(routes=[Route("/mutate", self._mutate, methods=["POST"])])

    async def _mutate(self, request: Request) -> Response:
        started = time.perf_counter()
        try:
            with trio.fail_after(_TURN_S):
                answer = await self._bodies.work(request, self._reviewed)
        except trio.TooSlowError:
            self._metrics.failed("busy")
            return Response("too many reviews are in work, try again\n", 503)
        except BadBody as error:
            self._metrics.failed("bad-request")
            return Response(f"{error}\n", error.status)
        except review.InvalidReview as error:
            self._metrics.failed("bad-request")
            return Response(f"{error}\n", 400)
        except NamespaceUnknown as error:
            self._metrics.failed("namespace-unknown")
            log.error("cannot decide", reason=str(error))
            return Response(f"{error}\n", 503)
        except Exception as error:  # our bug: the failurePolicy decides
            self._metrics.failed("internal")
            log.error("review failed", exc_info=error)
            return Response("the injector failed on this request, see its log\n", 500)
        self._metrics.took(time.perf_counter() - started)
        return Response(answer, media_type="application/json", headers={"connection": "close"} if self.closing else None)

    async def _reviewed(self, body: bytes) -> bytes:
        async with self._work:
            return await self._answer(review.read_review_untrusted(body))

    async def _answer(self, asked: review.Request) -> bytes:
        if (asked.kind.group, asked.kind.kind, asked.operation) != ("", "Pod", "CREATE") or asked.object is None:
            return review.allowed(asked)
        annotations: Mapping[str, str] = {}
        if asked.namespace:
            with trio.move_on_after(_NAMESPACE_S) as scope:
                annotations = await self._namespaces.annotations(asked.namespace)
            if scope.cancelled_caught:
                raise NamespaceUnknown(f"namespace {asked.namespace}: the API server did not answer within {_NAMESPACE_S:g} s")
        decision, patch = self._decide(asked.object, annotations)
        self._note(asked, decision)
        audit = {"injection": _short(decision)}
        if isinstance(decision, Refuse):
            return review.refused(asked, decision.sentence, audit=audit)
        warnings = [f"not in the mesh: {decision.sentence}"] if isinstance(decision, Skip) and decision.reason in TELLING else []
        return review.allowed(asked, patch, warnings, audit)

    def _decide(self, pod: dict[str, Any], annotations: Mapping[str, str]) -> tuple[Decision, list[Operation]]:
        try:
            return review_pod(pod, annotations, self._mesh.value)
        except Exception as error:
            try:
                wanted = wants(pod, annotations)
            except Exception:  # not even that can be read
                wanted = False
            if not wanted:
                raise
            log.error("review failed", exc_info=error)
            return Refuse(
                "internal", "the injector failed on this pod, its log says why; it does not start outside of the mesh instead"
            ), []

    def _note(self, asked: review.Request, decision: Decision) -> None:
        self._metrics.decided(_verb(decision), "" if isinstance(decision, Inject) else decision.reason)
        metadata = (asked.object or {}).get("metadata")
        name = str(metadata.get("name") or metadata.get("generateName") or "") if isinstance(metadata, dict) else ""
        say = log.info if isinstance(decision, Inject | Refuse) else log.debug
        reason = {} if isinstance(decision, Inject) else {"reason": decision.reason, "sentence": decision.sentence}
        say(_verb(decision), namespace=asked.namespace, pod=name[:253], dry_run=bool(asked.dry_run), **reason)
        if not asked.dry_run and (isinstance(decision, Refuse) or (isinstance(decision, Skip) and decision.reason in TELLING)):
            self._teller.tell(asked.object or {}, asked.namespace, decision)


class MeshSource(Protocol):
    """A cell with the settings in force."""

    @property
    def value(self) -> Mesh: ...


def _verb(decision: Decision) -> str:
    return {Inject: "injected", Skip: "skipped", Refuse: "refused"}[type(decision)]


def _short(decision: Decision) -> str:
    return _verb(decision) if isinstance(decision, Inject) else f"{_verb(decision)}: {decision.reason}"
