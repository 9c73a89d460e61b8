"""The validating webhook: whether an object may be stored, answered by the same model that reads it (policy.admission).

Moves AdmissionReviews; decides nothing itself, and never fails for what it is sent. An object that is refused but whose spec somebody
did not touch (a label, a finalizer, our own upgrade became stricter) is let through with a warning, or it could never be cleaned up.
Called by policy.cluster.
"""

from __future__ import annotations

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from core.k8s import review
from core.k8s.https import BadBody, Bodies
from core.runtime import logs
from policy.admission import admit

_log = logs.logger("webhook")

_ORDINARY_BYTES = 256 << 10  # of a review; our kinds stay far below it
_TURN_S = 8.0  # the API server waits 10 s for us


class Webhook:
    """The application, with its counters: allowed, refused, and what was no review."""

    def __init__(self) -> None:
        self.allowed = 0
        self.refused = 0
        self.failed = 0
        self._bodies = Bodies(_ORDINARY_BYTES, review.BODY_MAX_BYTES)

    def application(self) -> Starlette:
        """For `core.k8s.https`."""
        return Starlette(routes=[Route("/validate", self._validate, methods=["POST"])])

    async def _validate(self, request: Request) -> Response:
        try:
            with trio.fail_after(_TURN_S):
                answer = await self._bodies.work(request, self._answer)
        except trio.TooSlowError:
            self.failed += 1
            return Response("too many reviews are in work, try again\n", 503)
        except BadBody as error:
            self.failed += 1
            return Response(f"{error}\n", error.status)
        except review.InvalidReview as error:
            self.failed += 1
            return Response(f"{error}\n", 400)
        except Exception as error:  # our bug: the failurePolicy decides
            self.failed += 1
            _log.error("review failed", exc_info=error)
            return Response("the policy controller failed on this request, see its log\n", 500)
        return Response(answer, media_type="application/json")

    async def _answer(self, body: bytes) -> bytes:
        return self.answer(review.read_review_untrusted(body))

    def answer(self, asked: review.Request) -> bytes:
        """The verdict on a request."""
        sentence = None
        if asked.operation in ("CREATE", "UPDATE") and asked.object is not None:
            sentence = admit(asked.object)
        if sentence is None:
            self.allowed += 1
            return review.allowed(asked)
        assert asked.object is not None
        if asked.operation == "UPDATE" and asked.old_object is not None and asked.old_object.get("spec") == asked.object.get("spec"):
            self.allowed += 1
            return review.allowed(asked, warnings=[f"has no effect as it is: {sentence}"])
        self.refused += 1
        _log.info("refused", kind=asked.kind.kind, namespace=asked.namespace, name=asked.name, reason=sentence)
        return review.refused(asked, sentence)
