"""What the record of a connection tells of how it ended."""

from __future__ import annotations

from typing import Any

from core.addrs import Addr
from policy.authorize import Client
from proxy.telemetry.access_log import Mode
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.record import Recorder


def test_requests_among_opaque_bytes_are_logged_with_what_to_do() -> None:
    """The app saw no request and its caller a reset: nobody else could say why."""
    logged: list[tuple[str, str, str]] = []

    def log(level: str, event: str, **fields: Any) -> None:
        logged.append((level, event, fields["detail"]))

    recorder = Recorder(Metrics(lambda: 0.0), lambda: 0.0, log, Mode.OFF, lambda _: None)
    record = recorder.inbound(Addr("10.0.0.9", 1), Addr("10.0.0.5", 8080), Client("10.0.0.9", None, "plaintext"))
    for cause in ("", "reset", "http"):
        record.ended(cause)
    assert logged == [("info", "inbound opaque-http", "a request among opaque bytes: the port must be opaque for both sides, or for none")]
