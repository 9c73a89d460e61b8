"""What sidecars that ask for policy may cost the controller, and what is counted about them. Pure; read by policy.server.

`policy.diagnostics` shows the counters as metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_FILES_OF_OUR_OWN = 256  # listeners, the API server, the webhook's and the admin port's connections


@dataclass(frozen=True)
class Limits:
    """What one peer, and all together, may cost. Times in seconds.

    line_bytes: of a request; the longest honest one is under 1 KiB. subscriptions: per connection; more are ignored, and the sidecar
    refuses connections whose policy never comes. per_pod: connections of one pod; the oldest is closed for the next. pod_wait_s: how long
    to wait for a pod that is not known yet, because its sidecar may start before the API server has told us of it. send_s: how long a peer
    may read nothing. newcomers: connections that have not said who they are, or whose pod is not known. memory_bytes: what all subscribers
    together may take, see policy.shares.
    """

    handshake_s: float = 10
    hello_s: float = 5
    pod_wait_s: float = 5
    send_s: float = 60
    line_bytes: int = 64 * 1024
    subscriptions: int = 8192  # a sidecar's own bounds are 4096 destinations and 1024 undeclared ports
    handshakes: int = 512
    newcomers: int = 512
    connections: int = 20_000
    per_pod: int = 4
    memory_bytes: int = 1 << 30

    @classmethod
    def of_process(cls, memory_bytes: int, files: int) -> Limits:
        """Of a process that may use this much memory, and so many descriptors: the index and what is in work have the rest."""
        return cls(memory_bytes=memory_bytes * 2 // 3, connections=max(1, min(cls.connections, files - _FILES_OF_OUR_OWN)))


@dataclass
class Counters:
    """For metrics; refused: by stable word."""

    connected: int = 0
    accepted: int = 0
    bytes_taken: int = 0
    messages_sent: int = 0
    subscriptions_ignored: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def refuse(self, word: str) -> None:
        """One more peer was refused because of ``word``."""
        self.refused[word] = self.refused.get(word, 0) + 1
