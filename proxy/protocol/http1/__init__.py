"""HTTP/1.1, forwarded as received: the engine of one client connection and of one upstream connection."""

from __future__ import annotations

from proxy.protocol.http1.client import Http1Client
from proxy.protocol.http1.limits import Http1Limits
from proxy.protocol.http1.upstream import Http1Upstream

__all__ = ["Http1Client", "Http1Limits", "Http1Upstream"]
