"""One HTTP/1.1 request and its answer over a connected stream, bounded. The caller bounds the time. For `client` and `tokens`."""

from __future__ import annotations

import h11
import trio

_READ_BYTES = 16 * 1024


class ExchangeFailed(Exception):
    """The other end broke HTTP, ended early, or answered more than the bound."""


async def exchange(
    stream: trio.abc.Stream, connection: h11.Connection, request: h11.Request, body: bytes, max_bytes: int
) -> tuple[int, bytes]:
    """Send ``request`` with ``body``, return status and body of the answer; leaves the connection ready for the next one.

    Raises ExchangeFailed, or trio's stream errors. After either, and on cancellation, the stream is of no more use.
    """
    try:
        await stream.send_all(connection.send(request) + connection.send(h11.Data(data=body)) + connection.send(h11.EndOfMessage()))
        status, answer = 0, bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(_READ_BYTES)))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                answer += event.data
                if len(answer) > max_bytes:
                    raise ExchangeFailed(f"the answer is longer than {max_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                raise ExchangeFailed("the connection ended before the answer")
        if connection.our_state is h11.DONE and connection.their_state is h11.DONE:
            connection.start_next_cycle()
    except h11.ProtocolError as error:
        raise ExchangeFailed(f"not HTTP/1.1 as expected: {error}") from None
    return status, bytes(answer)
