"""The contract between protocol engines and whoever moves their bytes.

An engine is a pair of receivers, one for the client's connection and one for the upstream's. The relay loop (or a test) calls a
`Receiver` with what arrived on one connection; the receiver answers by calling the `Sink` of either. Everything is synchronous:
no call waits, and a call into a sink never calls back into a receiver before it returned.

A question that takes time (connect to an endpoint, fetch a policy) goes to the engine's gate, which answers later by calling the
engine again. Until then the engine keeps what it has, bounded, and pauses the connection it came from.
"""

from __future__ import annotations

from typing import Protocol


class Sink(Protocol):
    """What an engine may do to one of its connections."""

    blocked: bool
    """True while bytes wait because the peer does not read. Producing more is allowed but costs memory: whoever has a choice stops
    reading what feeds this sink, until the receiver's `drained` is called."""

    def write(self, data: bytes) -> None:
        """Send now; what the socket does not take is kept, in order. Never raises; writing to a dead connection does nothing."""

    def queue(self, data: bytes) -> None:
        """Send in order, at the latest at the end of the current pass over ready connections: many small frames become one send."""

    def pause(self) -> None:
        """Stop delivering what the peer sends. Idempotent."""

    def resume(self) -> None:
        """Deliver again. Idempotent. Bytes may be delivered only after the current call into the receiver returned."""

    def end(self) -> None:
        """Nothing more will be written: after what is queued, FIN (and close_notify under TLS). Receiving goes on."""

    def close(self) -> None:
        """Send what is queued, then close both directions in order. The receiver is not called again."""

    def abort(self) -> None:
        """RST at once; queued bytes are dropped. The receiver is not called again."""

    def expire_after(self, seconds: float | None) -> None:
        """(Re)start this connection's only timer; coarse, up to a second late. None stops it. At expiry: `Receiver.expired`."""


class Receiver(Protocol):
    """What an engine wants to hear about one of its connections."""

    def received(self, data: bytes) -> None:
        """Bytes arrived, never empty."""

    def ended(self) -> None:
        """The peer will send nothing more (FIN, under TLS after close_notify). Called at most once; writing may go on."""

    def lost(self, reset: bool) -> None:
        """The connection is dead: RST (reset), a failed send, or a TLS stream cut off without close_notify. Called at most once,
        nothing after it. Bytes delivered before are all there will be."""

    def drained(self) -> None:
        """A sink that was blocked took everything."""

    def expired(self) -> None:
        """The timer set by `Sink.expire_after` ran out."""
