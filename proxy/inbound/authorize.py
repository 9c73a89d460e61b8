"""Step 11: facts and policy become a permit or a cause. The evaluation itself is policy.authorize; here it meets a live connection.

`ConnectionAuthorizer` belongs to one client connection and follows the policy of its port: a replaced policy is noticed with the next
request, so the memo of decisions never outlives the policy it came from. What goes on without another request, such as a tunnel, has to
be told of it: `follow`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from core.spelling import Spellings
from policy.authorize import BadTarget, Client, ClientAuthorizer, Denied, NoRoute, Permit, PortAuthorizer
from proxy.protocol.requests import RequestHead
from proxy.rescue import Cause

_CAUSES: dict[type, Cause] = {Denied: Cause.DENIED, NoRoute: Cause.NO_ROUTE, BadTarget: Cause.BAD_TARGET}


class PolicyOfPort(Protocol):
    """The policy of the dialled port, which discovery keeps current (proxy.discover.PortState)."""

    authorizer: PortAuthorizer | None
    changed: set[Callable[[], None]]


class ConnectionAuthorizer:
    """The policy as one client connection meets it: may this client do this now?

    spellings: of the header fields that the policy looks at; None where requests may have other spellings of them.
    """

    __slots__ = ("_client", "_made_from", "_names", "_port", "_view", "spellings")

    def __init__(self, port: PolicyOfPort, client: Client) -> None:
        self._port = port
        self._client = client
        self._made_from: PortAuthorizer | None = None
        self._view: ClientAuthorizer | None = None
        self._names: tuple[bytes, ...] = ()
        self.spellings: Spellings | None = None

    def _current(self) -> ClientAuthorizer:
        authorizer = self._port.authorizer
        if authorizer is not self._made_from or self._view is None:
            if authorizer is None:
                raise RuntimeError("a connection was admitted before the policy of its port was known")
            self._made_from = authorizer
            self._names = authorizer.header_names
            self.spellings = authorizer.spellings
            self._view = authorizer.for_client(self._client)
        return self._view

    def request(self, head: RequestHead) -> Permit | Denied | NoRoute | BadTarget:
        """Decide about one request under the policy of this moment."""
        view = self._view if self._port.authorizer is self._made_from and self._view is not None else self._current()
        names, spellings = self._names, self.spellings
        if spellings is not None and head.respelled(spellings):
            return view.respelled
        return view.request(head.method, head.target, head.authority, head.values(names) if names else ())

    def connection(self) -> Permit | Denied:
        """Decide about the connection as opaque bytes."""
        return self._current().connection()

    def some_request(self) -> bool:
        """Whether this client may make requests of some kind."""
        return self._current().some_request()

    def follow(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` at every replacement of the policy, until `unfollow`. Idempotent."""
        self._port.changed.add(changed)

    def unfollow(self, changed: Callable[[], None]) -> None:
        """The connection is over. Idempotent."""
        self._port.changed.discard(changed)


def cause_of(decision: Denied | NoRoute | BadTarget) -> Cause:
    """What rescue.py is to answer."""
    return _CAUSES[type(decision)]
