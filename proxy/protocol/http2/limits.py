"""What one HTTP/2 connection may cost: every bound of the engine in one place, with its unit, its reason and its source.

Pure. Constructed by the wiring of the sidecar from its settings; read by both ends of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Http2Limits:
    """Bounds of a connection; the same type serves the client's end and the upstream's.

    Raises ValueError when a value would contradict what a peer may assume before it read our SETTINGS (RFC 9113 section 6.5.2).
    """

    max_streams: int = 250
    """Streams a client may have open at once. 250 is hyper's default; it also bounds what held data may cost."""
    header_list_bytes: int = 65536
    """Largest header list, counted as RFC 9113 section 6.5.2 does (name + value + 32 each): above it a request is answered with 431."""
    header_count: int = 100
    """Fields of a request: above it, it is answered with 431 (Envoy's default)."""
    stream_window: int = 256 << 10
    """Bytes one stream may send before they were forwarded, so also what one unread stream holds at most. Not below 65535, which a
    peer may use before it has read our SETTINGS; with 65535, Linkerd's value, a long body costs a sixth more CPU and stops at 64 KiB a
    round trip."""
    connection_window: int = 2 << 20
    """Bytes in flight on a connection: about bandwidth times delay, because this credit is returned on receipt."""
    max_frame: int = 16384
    """Largest frame accepted; the protocol's smallest maximum. Larger frames would only let one stream hold the line longer."""
    max_target: int = 8192
    """Longest ``:path``; above it the request is answered with 414."""
    max_continuations: int = 32
    """CONTINUATION frames of one header block (CVE-2024-27316 and its siblings sent them without end)."""
    held_bytes: int = 16 << 20
    """Data held for unread streams of one connection. Above it connection credit is returned on forwarding only: the one case in which
    unread streams slow their neighbours, chosen over memory without bound."""
    backlog_bytes: int = 256 << 10
    """Bytes other than DATA that may pile up on a blocked connection before it is no longer read (answers to PING and SETTINGS,
    WINDOW_UPDATE, responses of the proxy)."""
    reset_budget: int = 200
    """Streams that may end by a reset the peer caused, beyond those earned back: a stream that completes earns one, a second earns
    `resets_per_s` (CVE-2023-44487, and CVE-2025-8671 where the victim is made to reset)."""
    resets_per_s: int = 20
    control_budget: int = 2000
    """Frames without progress (PING, SETTINGS, PRIORITY, WINDOW_UPDATE, RST_STREAM, empty DATA, unknown types), beyond those earned
    back: each stream and each DATA frame earn four, a second earns `controls_per_s` (CVE-2019-9511 to 9518)."""
    controls_per_s: int = 200
    max_informational: int = 16
    """1xx responses per stream."""
    max_attempts: int = 3
    """Upstreams one request is tried on at most, whatever the gate says. Two, unless those that were tried before said themselves that
    they did not look at it."""
    replay_bytes: int = 0
    """Of a request's body, what is kept until its response begins, so that a request that nobody acted on can be sent again. 0: nothing.
    Of a longer body nothing is kept, and once a part of it was sent it goes nowhere else."""
    head_timeout_s: float = 10.0
    """Until the first SETTINGS are there, and between HEADERS and END_HEADERS."""
    idle_timeout_s: float = 300.0
    """Without a stream, the connection is closed after this time (and at most a quarter later)."""
    stall_timeout_s: float = 300.0
    """A stream whose data its receiver takes none of for this long is reset (Envoy's stream idle timeout: 5 minutes)."""
    tick_s: float = 5.0
    """How often a busy connection is looked at: the grain of the timeouts above and of what a second earns."""

    def __post_init__(self) -> None:
        if self.stream_window < 65535 or self.connection_window < 65535:
            raise ValueError("HTTP/2 windows below 65535 bytes contradict what a peer may send before it has read our SETTINGS")
        if max(self.stream_window, self.connection_window) > 0x7FFFFFFF:
            raise ValueError("HTTP/2 windows end at 2^31-1 bytes")
        if not 16384 <= self.max_frame <= 0xFFFFFF:
            raise ValueError("HTTP/2 frames are limited to between 16384 and 16777215 bytes")
        if min(self.tick_s, self.idle_timeout_s, self.stall_timeout_s, self.head_timeout_s) <= 0:
            raise ValueError("HTTP/2 timeouts are positive seconds")
