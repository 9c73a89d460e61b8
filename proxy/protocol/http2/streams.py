"""The two ends of an exchange, with what each needs to know beyond flow control. Values; decided on by client.py and upstream.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.protocol.http2.flow import NOBODY, StreamEnd, drop_held
from proxy.protocol.requests import HeadEdit
from proxy.rescue import Cause

if TYPE_CHECKING:
    from proxy.protocol.http2.blocks import RequestHead
    from proxy.protocol.http2.client import Http2Client
    from proxy.protocol.http2.upstream import Http2Upstream

_NO_EDIT = HeadEdit()


class UpstreamStream(StreamEnd):
    """The end at an upstream; moves to another one when a request is retried. Its other end is a ClientStream while that is not over.

    informational: 1xx responses so far. waiting_at: whose queue the request is in.
    """

    __slots__ = ("head", "informational", "waiting_at")

    def __init__(self) -> None:
        StreamEnd.__init__(self, None, 0, 0, 0)
        self.answered = False
        self.informational = 0
        self.head: RequestHead
        self.waiting_at: Http2Upstream | None = None

    def detach(self) -> None:
        """No connection carries it any more; what is held stays, for the next one."""
        self.conn = None
        self.id = self.window = self.owed = 0
        self.answered = self.remote_done = self.local_done = self.over = False
        self.informational = 0
        self.expect = -1


class ClientStream(StreamEnd):
    """The end at the client; its other end is an UpstreamStream. exchange: the gate's note.

    status: of the response head the client was sent, 0 before. deciding: the gate owes a verdict. attempts: upstreams tried. cause: why
    the proxy answered. reset_after: the upstream wants the rest of the request not to be sent, after its whole response (RFC 9113
    section 8.1).
    """

    __slots__ = ("attempts", "cause", "client", "deciding", "edit", "exchange", "head", "reset_after", "status")

    def __init__(self, client: Http2Client, stream_id: int, window: int, credit: int, head: RequestHead) -> None:
        StreamEnd.__init__(self, client, stream_id, window, credit)
        self.client = client
        self.head = head
        self.expect = head.content_length
        self.exchange: object = None
        self.edit = _NO_EDIT
        self.status = 0
        self.attempts = 0
        self.cause: Cause | None = None
        self.deciding = self.reset_after = False
        other = UpstreamStream()
        other.other = self
        self.other = other


def part(end: StreamEnd) -> None:
    """Both ends are over: let go of each other."""
    if end.held_bytes:
        drop_held(end)
    end.other = NOBODY  # over, so that nobody asks it for more than StreamEnd has
