"""What can change for a subscriber: the inbound policy of a pod, or what stands behind an address. Pure."""

from __future__ import annotations

from typing import NamedTuple


class PodKey(NamedTuple):
    """The policy of some port of this pod may be another one now."""

    namespace: str
    pod: str


class IpKey(NamedTuple):
    """What stands behind some port of this address may be something else now. ip: canonical text."""

    ip: str


Key = PodKey | IpKey
