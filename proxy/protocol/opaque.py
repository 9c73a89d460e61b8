"""Opaque bytes: two connections joined, each end of one passed on as the end of the other. RST is carried as RST.

A slow reader stops its writer: while one side is blocked the other is not read.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.protocol.detect import FIRST_BYTES, FirstLine, may_be_http_server_untrusted
from proxy.protocol.sides import Sink


class Half:
    """The receiver of one connection of a splice; what arrives goes to the connection of `peer`, the other half."""

    __slots__ = ("_ended", "_splice", "peer", "sink")

    peer: Half

    def __init__(self, splice: Splice, sink: Sink) -> None:
        self._splice = splice
        self.sink = sink
        self._ended = False

    def received(self, data: bytes) -> None:
        """Pass on; stop reading here while the other side cannot take more."""
        other = self.peer.sink
        other.write(data)
        self._splice.touched()
        if other.blocked:
            self.sink.pause()

    def ended(self) -> None:
        """Half-close: the other direction lives on."""
        self._ended = True
        self.peer.sink.end()
        if self.peer._ended:
            self._splice.close()

    def lost(self, reset: bool) -> None:
        """A reset here is a reset there; so is a stream cut off without its proper end."""
        self.peer.sink.abort()
        self._splice.report("reset" if reset else "truncated")

    def drained(self) -> None:
        """We took everything: let the other side be read again."""
        self.peer.sink.resume()

    def expired(self) -> None:
        """Nothing moved for the idle time."""
        self._splice.cut("idle")


class ScreenedClient(Half):
    """A client's half that is cut when its bytes turn out to be HTTP.

    A request that is carried as opaque bytes would keep what is otherwise removed from it, such as the client's claim to another identity.
    When it is cut, the app has seen at most a part of the request line. A client whose server speaks first may send anything, unless what
    the server said is how servers of HTTP begin (`ScreenedServer`).
    """

    __slots__ = ("_line",)

    def __init__(self, splice: Splice, sink: Sink) -> None:
        Half.__init__(self, splice, sink)
        self._line: FirstLine | None = FirstLine()

    def received(self, data: bytes) -> None:
        """Pass on what is not HTTP."""
        if self._line is not None:
            http = self._line.is_http_untrusted(data)
            if http:
                return self._splice.cut("http")
            if http is False:
                self._line = None
        return Half.received(self, data)


class ScreenedServer(Half):
    """The upstream's half of a screened splice: a server that speaks first, and not HTTP, ends the screening of its client."""

    __slots__ = ("_first",)

    def __init__(self, splice: Splice, sink: Sink) -> None:
        Half.__init__(self, splice, sink)
        self._first: bytes | None = b""  # its first bytes, until they say what it is

    def received(self, data: bytes) -> None:
        """Pass on."""
        if self._first is not None:
            self._judge(self._first + data[:FIRST_BYTES])
        Half.received(self, data)

    def _judge(self, first: bytes) -> None:
        client = self.peer
        assert isinstance(client, ScreenedClient)
        if not may_be_http_server_untrusted(first):
            client._line = None
            self._first = None
        else:
            self._first = first if len(first) < FIRST_BYTES else None


class Splice:
    """Two joined connections. on_finished is called exactly once, with ``""`` for an orderly end or the cause.

    screened: whether the client's bytes may not be HTTP.
    """

    __slots__ = ("_done", "_idle_s", "_on_finished", "client", "upstream")

    def __init__(
        self, client: Sink, upstream: Sink, on_finished: Callable[[str], None], idle_s: float | None = None, *, screened: bool = False
    ) -> None:
        self.client = ScreenedClient(self, client) if screened else Half(self, client)
        self.upstream = ScreenedServer(self, upstream) if screened else Half(self, upstream)
        self.client.peer, self.upstream.peer = self.upstream, self.client
        self._on_finished = on_finished
        self._idle_s = idle_s
        self._done = False
        self.touched()

    def touched(self) -> None:
        """Bytes moved: the idle time starts again."""
        if self._idle_s is not None:
            self.client.sink.expire_after(self._idle_s)

    def close(self) -> None:
        """Both directions ended in order."""
        self.client.sink.close()
        self.upstream.sink.close()
        self.report("")

    def cut(self, cause: str) -> None:
        """Reset both ends: policy withdrew its permit, or nothing moved for too long."""
        self.client.sink.abort()
        self.upstream.sink.abort()
        self.report(cause)

    def report(self, cause: str) -> None:
        """Tell `on_finished`, once."""
        if not self._done:
            self._done = True
            self._on_finished(cause)
