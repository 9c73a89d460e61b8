"""The response head that one client gets: what its connection needs said, put into the bytes that the upstream sent.

Decides which Connection options the client must see. Must not look at bodies or touch connections. Pure; called by client.py.
"""

from __future__ import annotations

from proxy.protocol.http1.heads import RequestHead, ResponseHead, without


def translated(head: ResponseHead, request: RequestHead, close: bool) -> bytes:
    """The bytes of a response head (not 101) for the client of ``request``. close: its connection ends with this response.

    HTTP/1.0 becomes HTTP/1.1 for a client that speaks it: a proxy answers with its own version (RFC 9110 section 2.5), and a keep-alive
    client would otherwise leave after each response.
    """
    options = []
    if head.status >= 200:
        if close:
            options.append(b"close")
        elif request.old:
            options.append(b"keep-alive")
        if head.status == 426:
            options.append(b"upgrade")
    wire = _with_connection(head, b", ".join(options))
    return b"HTTP/1.1" + wire[8:] if head.old and not request.old else wire


def switching(head: ResponseHead) -> bytes:
    """The head of a response after which the connection is a tunnel: 101, or 2xx to CONNECT, whose framing fields mean nothing."""
    if head.status == 101:
        return _with_connection(head, b"upgrade")
    return without(_with_connection(head, b""), (b"content-length", b"transfer-encoding"))


def _with_connection(head: ResponseHead, want: bytes) -> bytes:
    if head.connection == want or (not want and head.connection == b"keep-alive" and not head.old):
        return head.wire
    wire = without(head.wire, (b"connection",)) if head.connection else head.wire
    return wire[:-2] + b"connection: " + want + b"\r\n\r\n" if want else wire
