"""How long a connection lives: its ticks, its budgets against floods, and its end.

Theory of operation. The connection's one timer ticks every `tick_s` while there are streams, and four times per idle timeout while there
are none. What is late is found out by a tick: SETTINGS, the rest of a header block, a peer that reads nothing.

Floods. Time is only known by `expired`, so budgets are tokens: each frame that makes no progress costs one of `control_tokens`, each
stream that the peer causes to be reset before its response began costs one of `reset_tokens`. Progress earns them back (limits.py says how
much), and so does every tick. A peer that has none left is told ENHANCE_YOUR_CALM.

Pure; the base of connection.py.
"""

from __future__ import annotations

from typing import Final

from proxy.protocol.http2 import frames
from proxy.protocol.http2.flow import FlowControl, StreamEnd
from proxy.protocol.http2.frames import ConnectionFault
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.sides import Sink

_REMEMBERED_RESETS: Final = 1024


class Lifetime(FlowControl):
    """One HTTP/2 connection apart from what its frames say."""

    __slots__ = (
        "_block_id", "_block_s", "_blocked_s", "_quiet_s", "_reset_ids", "_seen_id", "_settled", "_timer_s", "last_id", "reset_tokens",
    )  # fmt: skip

    def __init__(self, sink: Sink, limits: Http2Limits) -> None:
        super().__init__(sink, limits)
        self.last_id = 0  # the highest stream id that was opened
        self.reset_tokens = limits.reset_budget
        self._settled = False  # the peer's first SETTINGS arrived
        self._block_id = 0  # the stream whose header block comes in several frames, 0 while none does
        self._block_s = 0.0  # ticks since it began
        self._reset_ids: dict[int, None] = {}  # the last streams that we reset
        self._timer_s = limits.head_timeout_s
        self._quiet_s = 0.0  # without a stream
        self._blocked_s = 0.0  # in which the peer read nothing
        self._seen_id = 0  # `last_id` at the last tick
        sink.expire_after(self._timer_s)

    # ---- what the ends decide

    def busy(self) -> bool:
        """There are streams."""
        return bool(self.streams_by_id)

    def stalled(self, end: StreamEnd) -> None:
        """The peer takes nothing of what is held for it on this stream."""
        raise NotImplementedError

    def die(self) -> None:
        """The connection is gone, or is about to be closed: end its streams."""
        raise NotImplementedError

    # ---- time

    def expired(self) -> None:
        """A tick."""
        if self.dead:
            return None
        passed, limits = self._timer_s, self.limits
        self.control_tokens = min(limits.control_budget, self.control_tokens + int(passed * limits.controls_per_s))
        self.reset_tokens = min(limits.reset_budget, self.reset_tokens + int(passed * limits.resets_per_s))
        if not self._settled:
            return self.fail(frames.SETTINGS_TIMEOUT, "no SETTINGS in time")
        if self._block_id:
            self._block_s += passed
            if self._block_s >= limits.head_timeout_s:
                return self.fail(frames.ENHANCE_YOUR_CALM, "header block not ended in time")
        self._blocked_s = self._blocked_s + passed if self.sink.blocked else 0.0
        if self._blocked_s >= limits.stall_timeout_s:
            self.die()
            return self.sink.abort()
        self.end_stalled(passed)
        if self.busy() or self.last_id != self._seen_id:
            self._seen_id = self.last_id
            self._quiet_s = 0.0
        else:
            self._quiet_s += passed
            if self._quiet_s >= limits.idle_timeout_s:
                return self.leave()
        self._arm(limits.tick_s if self.busy() or self._block_id else limits.idle_timeout_s / 4)
        return None

    def _arm(self, seconds: float) -> None:
        self._timer_s = seconds
        self.sink.expire_after(seconds)

    def end_stalled(self, passed: float) -> None:
        """A tick has passed: end the streams that nothing was taken of for too long."""
        for end in list(self.holding):
            if end.progress:
                end.progress = False
                end.stalled_s = 0.0
            else:
                end.stalled_s += passed
                if end.stalled_s >= self.limits.stall_timeout_s and not end.over:
                    self.stalled(end)

    # ---- budgets

    def spend_reset(self) -> None:
        """The peer caused a reset. Raises ConnectionFault."""
        self.reset_tokens -= 1
        if self.reset_tokens < 0:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "streams reset faster than they complete")

    def spend(self, cost: int = 1) -> None:
        """A frame without progress. Raises ConnectionFault."""
        self.control_tokens = min(self.control_tokens, self.limits.control_budget) - cost
        if self.control_tokens < 0:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many frames without progress")

    # ---- ending

    def ended(self) -> None:
        """FIN: HTTP/2 has no half-close, so this is the peer leaving."""
        if not self.dead:
            self.die()
            self.sink.close()

    def lost(self, reset: bool) -> None:
        """The connection is dead."""
        if not self.dead:
            self.die()

    def fail(self, code: int, detail: str) -> None:
        """A connection error: GOAWAY, then close."""
        self.control(frames.goaway(self.answered_id(), code, detail.encode()[:128]))
        self.die()
        self.sink.close()

    def leave(self) -> None:
        """Close a connection that has no streams, saying so."""
        self.control(frames.goaway(self.answered_id(), frames.NO_ERROR))
        self.die()
        self.sink.close()

    def answered_id(self) -> int:
        """The highest stream of the peer that was looked at; 0 at the end that opens the streams itself."""
        return 0

    def send_reset(self, stream_id: int, code: int) -> None:
        """RST_STREAM; frames of that stream that are still on their way are ignored."""
        if len(self._reset_ids) >= _REMEMBERED_RESETS:
            del self._reset_ids[next(iter(self._reset_ids))]
        self._reset_ids[stream_id] = None
        self.control(frames.rst_stream(stream_id, code))
