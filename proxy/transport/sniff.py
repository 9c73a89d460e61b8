"""Step 3: read until it is clear what the client speaks, without consuming anything: the bytes are handed on as they came.

A client that stays silent may be waiting for the server to speak first (SMTP, MySQL). After ``silence_s`` that is assumed: the caller
dials the server, and the first to speak decides. A client that began to speak has ``finish_s`` to send enough to be recognised.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from proxy.protocol.client_hello import HELLO_MAX, ClientHello, NotTls, read_client_hello_untrusted
from proxy.protocol.detect import Detected, detect_untrusted
from proxy.rescue import Cause, Failure

_READ_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Sniffed:
    """data: what was read so far. protocol None: the client is silent. hello: the ClientHello when the protocol is TLS and readable.

    ended: the client's FIN came with it.
    """

    data: bytes
    protocol: Detected | None
    hello: ClientHello | None = None
    ended: bool = False


async def sniff(stream: trio.abc.ReceiveStream, silence_s: float, finish_s: float, data: bytes = b"") -> Sniffed:
    """Read the first bytes; raises Failure(HEAD_TIMEOUT) when a beginning is never finished, BrokenResourceError on reset."""
    if not data:
        with trio.move_on_after(silence_s):
            data = bytes(await stream.receive_some(_READ_BYTES))
            if not data:
                return Sniffed(b"", Detected.OPAQUE, ended=True)
        if not data:
            return Sniffed(b"", None)
    if (sniffed := classify(data)) is not None:
        return sniffed
    with trio.move_on_after(finish_s):
        while True:
            more = bytes(await stream.receive_some(_READ_BYTES))
            if not more:
                return Sniffed(data, detect_untrusted(data, ended=True), ended=True)
            data += more
            if (sniffed := classify(data)) is not None:
                return sniffed
    raise Failure(Cause.HEAD_TIMEOUT, f"the client began with {len(data)} bytes and did not go on for {finish_s:g} s")


def classify(data: bytes) -> Sniffed | None:
    """What these first bytes are; None when more are needed to say."""
    protocol = detect_untrusted(data)
    if protocol is not Detected.TLS:
        return None if protocol is None else Sniffed(data, protocol)
    try:
        hello = read_client_hello_untrusted(data)
    except NotTls:
        return Sniffed(data, Detected.OPAQUE)
    if hello is None:
        return None if len(data) <= 2 * HELLO_MAX else Sniffed(data, Detected.OPAQUE)
    return Sniffed(data, Detected.TLS, hello)
