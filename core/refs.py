"""Which resource caused a decision: the value that becomes a log field, a metric label and a line of `pillion authz`."""

from __future__ import annotations

import msgspec


class Ref(msgspec.Struct, frozen=True, order=True):
    """group/kind/namespace/name of an API object, or a synthetic one (kind ``default``) when no object decided.

    group: API group, empty for core objects, ``policy.pillion.dev`` or ``gateway.networking.k8s.io`` otherwise.
    """

    group: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        where = f"{self.namespace}/" if self.namespace else ""
        return f"{self.kind.lower()} {where}{self.name}"


def default_ref(name: str) -> Ref:
    """The reference of a decision made by a default (``all-unauthenticated``, ``deny``, ``localhost``, ``probe`` ...)."""
    return Ref("", "default", "", name)
