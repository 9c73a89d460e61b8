"""Names and numbers that injection, capture and the sidecar agree on, and that no setting changes. Pure, and importable at no cost."""

from __future__ import annotations

INJECT = "pillion.dev/inject"
STATUS = "pillion.dev/status"
INJECTED = "injected"
BEFORE = "pillion.dev/before"
"""What stood where injection replaced something, for `injector.undo`."""
DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
SIDECAR_NAME = "pillion-proxy"
CAPTURE_NAME = "pillion-capture"
SIDECAR_UID = 2102
OUTBOUND_PORT = 4140
INBOUND_PORT = 4143
ADMIN_PORT = 4191
