"""A webhook's serving certificate: made, shared between replicas by a Secret, renewed, and made known to the API server as caBundle.

Or issued into that Secret by cert-manager, and made known all the same by us. Moves what `core.k8s.serving_pair` decides. The order of a
change is: the Secret, then caBundle, then our own listener, so that at no moment a replica serves what the API server does not trust.
Called by the app modules of injector and policy controller.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from core.k8s.api import Api, object_path
from core.k8s.errors import ApiError, Conflict, NotFound
from core.k8s.https import server_context
from core.k8s.serving_pair import InvalidPair, Pair, Replace, plan, read_pair, trusts, unfit, with_earlier
from core.runtime import logs

_LOOK_S = 10.0  # how soon a renewal by another replica, or a caBundle that somebody emptied, is noticed; costs two reads
_RETRY_S = 2.0
_SETTLE_S = 5.0  # until every API server has seen a changed caBundle; they watch it, so it is milliseconds
_TRIES = 5
_OVERLAP_S = 3600.0  # replicas look every 10 s: after that none serves what an earlier issuer signed
_CERT_MANAGER = "cert-manager.io/certificate-name"

log = logs.logger("serving")


class NotServing(Exception):
    """There is no certificate to serve with, or the API server would not trust it; the text says why and what to do."""


class Source(Protocol):
    """Where a pair comes from."""

    async def current(self) -> Pair:
        """The pair to serve with from now on, made known to whoever must trust it. Raises NotServing."""
        ...


def service_name(service: str, namespace: str) -> str:
    """The name that the API server asks for."""
    return f"{service}.{namespace}.svc"


class SharedSecret:
    """A Secret that all replicas serve from; each of them renews it and keeps the caBundle of ``webhooks`` equal to its ca.crt.

    webhooks: (plural, name) of webhook configurations, such as ``("mutatingwebhookconfigurations", "pillion-injector")``. The Secret must
    exist, empty at first: the right to create Secrets in this namespace would include tokens of every service account in it.

    Where cert-manager keeps the Secret, it is only read. Its cainjector is not asked to write caBundle: before 1.19 that replaces the
    earlier authority at once, while every replica still serves what only that one vouches for; since then it keeps each until it expires.
    So here too the new one is added first, and the earlier is dropped after an hour.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        secret: str,
        names: Sequence[str],
        webhooks: Sequence[tuple[str, str]],
        clock: Callable[[], float] = time.time,
        settle_s: float = _SETTLE_S,
    ) -> None:
        self._api = api
        self._settle_s = settle_s
        self._began = False
        self._authority, self._since = b"", 0.0  # whose certificates are to be known, and from when on
        self._path = object_path("", "v1", "secrets", namespace, secret)
        self._what = f"secret {namespace}/{secret}"
        self._names = tuple(names)
        self._webhooks = tuple(webhooks)
        self._clock = clock

    async def current(self) -> Pair:
        """Raises NotServing."""
        for _ in range(_TRIES):
            try:
                secret = await self._api.get(self._path)
                issued = _CERT_MANAGER in ((secret.get("metadata") or {}).get("annotations") or {})
                pair = self._issued(secret) if issued else await self._stored(secret)
                overlap = issued and self._known_for(pair.ca_pem) < _OVERLAP_S
                changed = [await self._make_known(plural, name, pair.ca_pem, overlap) for plural, name in self._webhooks]
                if any(changed) and self._began:
                    await trio.sleep(self._settle_s)
                self._began = True
                return pair
            except InvalidPair as error:
                raise NotServing(f"{self._what}, which cert-manager keeps: {error}") from error
            except Conflict:
                continue  # another replica was faster: what it stored counts
            except NotFound as error:
                raise NotServing(f"{error.message}; `pillion install` creates it, or cert-manager") from error
            except ApiError as error:
                raise NotServing(error.message) from error
        raise NotServing(f"{self._what} changes faster than it can be read")

    def _issued(self, secret: dict[str, Any]) -> Pair:
        """What cert-manager put there; raises InvalidPair when the API server would not believe it."""
        pair = read_pair(decoded(secret.get("data")))
        if why := unfit(pair, self._names, self._clock()):
            raise InvalidPair(why)
        return pair

    def _known_for(self, ca_pem: bytes) -> float:
        """Seconds since we first saw this authority."""
        if ca_pem != self._authority:
            self._authority, self._since = ca_pem, self._clock()
        return self._clock() - self._since

    async def _stored(self, secret: dict[str, Any]) -> Pair:
        step = plan(decoded(secret.get("data")), self._names, self._clock())
        if isinstance(step, Replace):
            data = {name: base64.b64encode(content).decode() for name, content in step.pair.files().items()}
            await self._api.put(self._path, secret | {"data": {**(secret.get("data") or {}), **data}})
            log.info("serving certificate made", object=self._what, reason=step.why, not_after=step.pair.not_after)
        return step.pair

    async def _make_known(self, plural: str, name: str, ca_pem: bytes, overlap: bool) -> bool:
        """True when something had to be written."""
        path = object_path("admissionregistration.k8s.io", "v1", plural, "", name)
        found = await self._api.get(path)
        patch = ca_bundle_patch(found, ca_pem, self._clock() if overlap else None)
        if patch:
            await self._api.patch(path, patch, "json")
            log.info("caBundle written", webhook=name)
        return bool(patch)


def ca_bundle_patch(configuration: Mapping[str, Any], ca_pem: bytes, keep_in_force_at: float | None = None) -> list[dict[str, Any]]:
    """The JSON patch that makes every webhook of a configuration trust exactly ``ca_pem``; empty when they do.

    keep_in_force_at: a time; what is trusted already and in force then stays beside it.
    """
    version = (configuration.get("metadata") or {}).get("resourceVersion")
    patch: list[dict[str, Any]] = []
    for number, webhook in enumerate(configuration.get("webhooks") or []):
        known = decoded({"ca": (webhook.get("clientConfig") or {}).get("caBundle")}).get("ca", b"")
        if not trusts(known, ca_pem) or (keep_in_force_at is None and not trusts(ca_pem, known)):
            wanted = ca_pem if keep_in_force_at is None else with_earlier(ca_pem, known, keep_in_force_at)
            text = base64.b64encode(wanted).decode()
            patch.append({"op": "add", "path": f"/webhooks/{number}/clientConfig/caBundle", "value": text})
    # by position: nobody may have inserted a webhook in between
    return [{"op": "test", "path": "/metadata/resourceVersion", "value": version}, *patch] if patch else []


def decoded(data: object) -> dict[str, bytes]:
    """Secret.data; what is no base64 is empty."""
    found = {}
    for name, value in (data if isinstance(data, dict) else {}).items():
        try:
            found[str(name)] = base64.b64decode(value or "", validate=True)
        except (binascii.Error, TypeError, ValueError):
            found[str(name)] = b""
    return found


class ServingCertificate:
    """Our certificate inside the context that the listener uses: connections made later present it, those that exist go on.

    problem: why the newest state could not be reached, empty when all is well. What is loaded goes on serving meanwhile.
    """

    def __init__(self, source: Source, clock: Callable[[], float] = time.time) -> None:
        self.context: ssl.SSLContext = server_context()
        self.not_after = 0.0
        self.problem = "there is no serving certificate yet"
        self._source = source
        self._clock = clock
        self._loaded = b""

    @property
    def not_ready(self) -> list[str]:
        """Why no connection to us could be made, for ``/ready``."""
        if not self._loaded:
            return [self.problem]
        return [f"the serving certificate has expired: {self.problem}"] if self.not_after <= self._clock() else []

    async def refresh(self) -> None:
        """Look once, and serve with what there is; raises NotServing, which `problem` then repeats."""
        try:
            pair = await self._source.current()
            if pair.certificate_pem != self._loaded:
                load(self.context, pair)
                self._loaded, self.not_after = pair.certificate_pem, pair.not_after
                log.info("serving certificate loaded", not_after=pair.not_after)
        except NotServing as error:
            self.problem = str(error)
            raise
        except ssl.SSLError as error:
            self.problem = f"OpenSSL refuses the serving certificate: {error.reason or error}"
            raise NotServing(self.problem) from error
        self.problem = ""

    async def keep(self) -> None:
        """Refresh for ever; never raises but for cancellation."""
        while True:
            before = self.problem
            try:
                await self.refresh()
            except NotServing as error:
                if str(error) != before:
                    log.warning("serving certificate not refreshed", reason=str(error), not_after=self.not_after)
            await trio.sleep(_LOOK_S if not self.problem else _RETRY_S)


def load(context: ssl.SSLContext, pair: Pair) -> None:
    """Load the pair into a context; raises ssl.SSLError."""
    fd = os.memfd_create("serving", os.MFD_CLOEXEC)  # ssl loads from files only: an anonymous one in memory, gone when it is closed
    with os.fdopen(fd, "wb") as file:
        file.write(pair.key_pem + pair.certificate_pem)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{fd}")
