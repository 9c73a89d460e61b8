"""No proxy at all: what load, kernel and server cost by themselves, and what latency is added to."""

from __future__ import annotations

from bench.contestants.base import Context, Running, Setup
from bench.stage import APP_PORT, Stage


class NoProxy:
    """The client dials the server pod."""

    name = "none"

    def missing(self, setup: Setup) -> str | None:
        """Takes part wherever the client speaks to the app directly."""
        return "the load itself speaks mutual TLS here" if setup.inbound_only else None

    def start(self, context: Context, stage: Stage, setup: Setup) -> Running:
        """Nothing to start."""
        return Running((stage.endpoints[0], APP_PORT), {}, {})
