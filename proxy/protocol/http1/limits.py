"""What one client connection of HTTP/1.1 may cost, and what it is answered when it asks for more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Http1Limits:
    """What one client connection may cost. Times in seconds; in brackets, what happens when a limit is exceeded."""

    target_bytes: int = 8192  # [414]
    head_bytes: int = 65536  # request line and fields [431]
    header_count: int = 100  # [431]
    header_timeout_s: float = 10.0  # first byte of a head to its last [408]
    idle_timeout_s: float = 300.0  # keep-alive without a request [close]; up to a quarter more
    body_stall_s: float = 300.0  # a request body that stops arriving [408]; up to a quarter of idle_timeout_s more
    unread_s: float = 300.0  # a client that takes nothing of its response [reset]; up to a quarter of idle_timeout_s more
    held_bytes: int = 65536  # pipelined requests, or a body whose request is not decided yet; then reading stops
    discard_bytes: int = 65536  # unread request body thrown away to keep the connection, or to let the client read the response
    replay_bytes: int = 0  # of a request's body kept until its response begins, so that it can be sent again; none of a longer one is
    linger_s: float = 2.0  # how long the client may take to read the response before the connection is gone
