"""What is said over the operator's socket, for both ends (`admin`, `admin_client`): one JSON value per line each way. Pure."""

from __future__ import annotations

import msgspec


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """verb: ``status`` or ``rotate``; step: ``add``, ``switch``, ``drop``, ``abort``, empty for the one that is due."""

    verb: str
    step: str = ""
    ignore_absent: bool = False
    force: bool = False


class AnchorStatus(msgspec.Struct, frozen=True):
    """A trusted anchor. generation: of the bundle it first appeared in."""

    id: str
    generation: int
    not_after: float


class WorkloadStatus(msgspec.Struct, frozen=True):
    """What an instance has picked up. issuer: of the leaf it presents. absent: not heard for three polls."""

    pod: str
    workload: str
    instance: str
    generation: int
    issuer: str
    not_after: float
    heard_s_ago: float
    absent: bool


class Status(msgspec.Struct, frozen=True):
    """due: the next step of a rotation. blocking: what it waits for. workloads: with an unexpired leaf, at most 10 000."""

    trust_domain: str
    generation: int
    anchors: list[AnchorStatus]
    issuer: str
    issuer_not_after: float
    due: str
    blocking: list[str]
    workloads: list[WorkloadStatus]


class Answer(msgspec.Struct):
    """error: a sentence when the request was refused, and what blocks it; else the status after it was done. again: ask again soon."""

    error: str = ""
    blocking: list[str] = []
    done: str = ""
    status: Status | None = None
    again: bool = False
