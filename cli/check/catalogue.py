"""Which categories each way of calling `pillion check` asks, in order."""

from __future__ import annotations

from cli.check.certificates import CERTIFICATES, WEBHOOKS
from cli.check.installation import KINDS, SETTINGS
from cli.check.roles import ROLES
from cli.check.running import CAPTURE, CONTROL
from cli.check.server import API, BEFORE, GATEWAY
from cli.check.workloads import INJECTION, POLICY, SIDECARS

PRE = (API, GATEWAY, BEFORE)
CONTROL_PLANE = (API, GATEWAY, KINDS, SETTINGS, ROLES, CERTIFICATES, CONTROL, WEBHOOKS, CAPTURE, POLICY, INJECTION)
DATA_PLANE = (SIDECARS,)
