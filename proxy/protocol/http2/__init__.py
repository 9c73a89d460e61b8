"""The HTTP/2 engine: requests of clients' connections on streams of upstreams' connections, frames inspected and relayed, not rebuilt.

Reading order: limits (what may be spent), frames (bytes), hpack_codec and messages (what a header list may say), blocks (both,
remembered), flow (windows, what is held), lifetime (ticks, budgets, the end), connection (the scan, frames about a connection),
streams (the two ends of an exchange), exchanges (what becomes of them), client, upstream.

Preface, SETTINGS, PING and flow control end here on either side; stream numbers are ours on each connection. What keeps its meaning from
end to end: heads, 1xx, DATA, trailers, END_STREAM, RST_STREAM with its code, GOAWAY as "these were not processed".
"""

from __future__ import annotations

from proxy.protocol.http2.client import Http2Client
from proxy.protocol.http2.limits import Http2Limits
from proxy.protocol.http2.upstream import Http2Upstream

__all__ = ["Http2Client", "Http2Limits", "Http2Upstream"]
