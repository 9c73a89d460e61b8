"""What a workload proves its identity with, and what it verifies others against: values, always replaced whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.names import WorkloadId


@dataclass(frozen=True)
class Credentials:
    """A certified key together with the trust bundle that was current when it was fetched.

    key_pem: PKCS#8, unencrypted; lives in memory only and is kept out of repr. chain_pem: leaf first, then intermediates up to but
    not including the anchor. bundle_pem: every trust anchor in force. not_before, not_after: seconds since the epoch.
    """

    identity: WorkloadId
    key_pem: bytes = field(repr=False)
    chain_pem: bytes
    bundle_pem: bytes
    not_before: float
    not_after: float
