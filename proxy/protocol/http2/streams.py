"""The two ends of an exchange, with what each needs to know beyond flow control. Values; decided on by exchanges.py and upstream.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.protocol.http2.flow import NOBODY, StreamEnd, drop_held
from proxy.protocol.requests import HeadEdit
from proxy.rescue import Cause

if TYPE_CHECKING:
    from proxy.protocol.http2.blocks import RequestHead
    from proxy.protocol.http2.exchanges import Exchanges
    from proxy.protocol.http2.upstream import Http2Upstream

_NO_EDIT = HeadEdit()


class UpstreamStream(StreamEnd):
    """The end at an upstream; moves to another one when a request is retried. Its other end is a ClientStream while that is not over.

    announced: the first value of `expect`, before the response's body. informational: 1xx responses so far. waiting_at: the upstream in
    whose queue the request waits.
    """

    __slots__ = ("announced", "head", "informational", "waiting_at")

    def __init__(self) -> None:
        StreamEnd.__init__(self, None, 0, 0, 0)
        self.accepts_data = False
        self.announced = -1
        self.informational = 0
        self.head: RequestHead
        self.waiting_at: Http2Upstream | None = None

    def detach(self) -> None:
        """No connection carries it any more. What is held stays, for the next connection. So does the count of the response's body, because
        the request is sent again only when nothing of it has come."""
        self.conn = None
        self.id = self.window = self.owed = 0
        self.accepts_data = self.remote_done = self.local_done = self.over = False
        self.informational = 0


class ClientStream(StreamEnd):
    """The end at the client; its other end is an UpstreamStream. exchange: the gate's note.

    status: of the response head the client was sent, 0 before. grpc_status: of that response, -1 without one. deciding: the gate owes a
    verdict. attempts: upstreams tried. cause: why the proxy answered. reset_after: the upstream wants the rest of the request not to be
    sent, after its whole response (RFC 9113 section 8.1).
    """

    __slots__ = ("attempts", "cause", "client", "deciding", "edit", "exchange", "grpc_status", "head", "reset_after", "status")

    def __init__(self, client: Exchanges, stream_id: int, window: int, credit: int, head: RequestHead) -> None:
        StreamEnd.__init__(self, client, stream_id, window, credit)
        self.client = client
        self.head = head
        self.expect = head.content_length
        self.exchange: object = None
        self.edit = _NO_EDIT
        self.status = 0
        self.grpc_status = -1
        self.attempts = 0
        self.cause: Cause | None = None
        self.deciding = self.reset_after = False
        other = UpstreamStream()
        if client.limits.replay_bytes and not head.bodiless:
            other.kept = bytearray()
        other.other = self
        self.other = other

    def body_bytes(self) -> tuple[int, int]:
        """See requests.Bodies."""
        other = self.other
        return self.head.content_length - self.expect, other.announced - other.expect if isinstance(other, UpstreamStream) else 0


def unlink(end: StreamEnd) -> None:
    """Both ends are over: let go of each other."""
    if end.held_bytes:
        drop_held(end)
    end.other = NOBODY  # a plain StreamEnd suffices here: it is over, so nobody asks it for more
