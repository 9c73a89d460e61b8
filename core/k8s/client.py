"""Requests to one API server: where it is, who we are there, which connections are kept, and what may be sent again.

Knows HTTP's verbs and status codes, nothing of objects. `core.k8s.api` asks for objects through it, `core.k8s.watch` follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import urlencode

import trio

from core.k8s.errors import Unauthorized, Unavailable, error_of
from core.k8s.http import Access, Broken, Connection, Head

REQUEST_S = 60.0  # kube-apiserver's own bound of a request that is not a watch
_AUTHORIZATION_S = 60.0  # how long a token is used before its source is asked again; client-go re-reads token files as often
_IDLE_S, _IDLE_MAX = 30.0, 4  # for how long, and how many, connections without a request are kept
_RESPONSE_BYTES = 128 << 20


class Client:
    """Asks one API server. load: finds out how to reach it; asked again (in a thread) when it does not know us or we do not trust it."""

    def __init__(self, load: Callable[[], Access], user_agent: str) -> None:
        self._load = load
        self._user_agent = user_agent
        self._access: Access | None = None
        self._authorization: tuple[float, str] | None = None
        self._idle: list[Connection] = []

    async def access(self) -> Access:
        """How the API server is reached, found out at the first use."""
        if self._access is None:
            self._access = await trio.to_thread.run_sync(self._load)
        return self._access

    async def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            await self._idle.pop().close()

    async def call(
        self, method: str, path: str, query: Mapping[str, str], body: bytes | None = None, content: str = "application/json"
    ) -> bytes:
        """The body of a good response; any other is raised as ApiError. Sent again only when nothing can have come of it."""
        target = target_of(path, query)
        headers = {"content-type": content} if body is not None else {}
        for last in (False, True):
            try:
                with trio.fail_after(REQUEST_S):
                    head, answer = await self._exchange(method, target, headers, body)
            except trio.TooSlowError:
                raise Unavailable(f"{method} {path}: no answer within {REQUEST_S:g} s") from None
            except Broken as error:
                self.reconsider(error.untrusted)
                if last or not error.untrusted:
                    raise Unavailable(f"{method} {path}: {error}") from error
                continue
            if head.status < 300:
                return answer
            failed = error_of(head.status, answer, f"{method} {path}", head.headers)
            if last or not isinstance(failed, Unauthorized):
                raise failed
            self.reconsider(True)
        raise AssertionError  # the second round returns or raises

    async def connect(self) -> Connection:
        """A connection that is not shared, for a caller that keeps it for long; raises Broken."""
        return await Connection.open(await self.access())

    async def headers(self) -> dict[str, str]:
        """What every request carries; the token among it is never older than a minute."""
        now = trio.current_time()
        if self._authorization is None or now >= self._authorization[0]:
            access = await self.access()
            self._authorization = now + _AUTHORIZATION_S, await trio.to_thread.run_sync(access.authorization)
        value = self._authorization[1]
        headers = {"accept": "application/json", "user-agent": self._user_agent}
        return headers | {"authorization": value} if value else headers

    def reconsider(self, everything: bool) -> None:
        """The next request asks for the token again, and with ``everything`` for address, trust and certificate too."""
        self._authorization = None
        if everything:
            self._access = None
            while self._idle:
                self._idle.pop().abandon()

    async def _exchange(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> tuple[Head, bytes]:
        reused = self._reusable()
        if reused is not None:
            try:
                return await self._use(reused, method, target, headers, body)
            except Broken:
                if method != "GET":  # may have been carried out; the caller decides
                    raise
        return await self._use(await self.connect(), method, target, headers, body)

    async def _use(
        self, connection: Connection, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[Head, bytes]:
        try:
            head = await connection.request(method, target, await self.headers() | dict(headers), body)
            chunks, size = [], 0
            while chunk := await connection.chunk():
                chunks.append(chunk)
                size += len(chunk)
                if size > _RESPONSE_BYTES:
                    raise Broken(f"an answer of more than {_RESPONSE_BYTES >> 20} MiB")
        except BaseException:
            await connection.close()
            raise
        if len(self._idle) < _IDLE_MAX and connection.recycle():
            self._idle.append(connection)
        else:
            await connection.close()
        return head, b"".join(chunks)

    def _reusable(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if trio.current_time() - connection.idle_since < _IDLE_S:
                return connection
            connection.abandon()
        return None


def target_of(path: str, query: Mapping[str, str]) -> str:
    """The target of a request; parameters without a value are left out."""
    given = {key: value for key, value in query.items() if value}
    return f"{path}?{urlencode(given)}" if given else path
