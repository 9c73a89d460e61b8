"""Opaque connections: who speaks first, and joining the two sides in the relay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import trio

from core.runtime.sockets import RawStream
from proxy.protocol.detect import is_http2_server_untrusted
from proxy.protocol.opaque import Splice
from proxy.protocol.sides import Receiver
from proxy.transport.connect import Dialled
from proxy.transport.link import NO_RECEIVER, Link
from proxy.transport.relay import Relay
from proxy.transport.tls_bio import Records

Speaker = Literal["client", "server", "http2", "nobody"]


async def who_speaks_first(client: RawStream, upstream: Dialled) -> Speaker:
    """Wait until either side says something or closes, without losing any of it. The caller bounds the time.

    "http2": the server spoke first, and what it said is HTTP/2, so the client will make requests. "nobody": the server's connection was
    cut before it said anything, while the client was silent.
    """
    spoken: list[Speaker] = []
    async with trio.open_nursery() as nursery:

        async def listen_to_client() -> None:
            await trio.lowlevel.wait_readable(client.sock)
            spoken.append("client")
            nursery.cancel_scope.cancel()

        async def listen_to_server() -> None:
            first = await upstream.wait_first_bytes()
            spoken.append("nobody" if first is None else "http2" if is_http2_server_untrusted(first) else "server")
            nursery.cancel_scope.cancel()

        nursery.start_soon(listen_to_client)
        nursery.start_soon(listen_to_server)
    return next((one for one in spoken if one in ("server", "http2")), spoken[0])


def begin(relay: Relay, link: Link, receiver: Receiver, received: bytes) -> None:
    """Hand a connection to its receiver, with what was already received first. A receiver that raises loses this connection only."""
    link.receiver = receiver

    def deliver() -> None:
        if received:
            receiver.received(received)
        link.start()

    with relay.batch():
        relay.later(deliver, link)


class ClientSide(NamedTuple):
    """A client's connection that is ready to be joined. records: None means plaintext. received: plaintext that was read already."""

    stream: RawStream
    records: Records | None
    received: bytes


def join(
    relay: Relay, client: ClientSide, upstream: Dialled, on_finished: Callable[[str], None], idle_s: float, *, screened: bool = False
) -> tuple[Link, Splice]:
    """Hand both connections to the relay as one splice, with what was already received from either side first.

    on_finished, idle_s, screened: see Splice.
    """
    client_link = relay.adopt(client.stream.release(), NO_RECEIVER, client.records)
    upstream_link = relay.adopt(upstream.sock, NO_RECEIVER, upstream.records)
    splice = Splice(client_link, upstream_link, on_finished, idle_s, screened=screened)
    client_link.receiver, upstream_link.receiver = splice.client, splice.upstream
    with relay.batch():
        if client.received:
            splice.client.received(client.received)
        if upstream.early:
            splice.upstream.received(upstream.early)
        client_link.start()
        upstream_link.start()
    return client_link, splice
