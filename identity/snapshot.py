"""An authority's state and keys as one value, and as the data of one Kubernetes Secret: what several replicas share. Pure.

One Secret holds all of it, because one write is all or nothing: no replica ever sees an anchor without its issuer. Layout of
kubernetes.io/tls for the issuer in force (``tls.crt``: it and its intermediates, ``tls.key``, ``ca.crt``: every anchor), and beside it
``state.json`` (`store.StoredState`) and a ``<kind>-<id>.key`` for every other key.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import msgspec

from identity.ledger import Holding
from identity.store import StoredState

STATE = "state.json"
_KEY_SUFFIX = ".key"
_VALUE_MAX = 256 * 1024


class SnapshotDamaged(ValueError):
    """The Secret does not hold what it must; the text says what, never a key."""


class SnapshotStore:
    """Satisfies `store.StateStore`, in memory. keys: PEM by ``(kind, id)``. The ledger is not part of it: nothing is journalled."""

    def __init__(self, state: StoredState | None = None, keys: Mapping[tuple[str, str], bytes] | None = None) -> None:
        self.state = state
        self.keys = dict(keys or {})

    def copy(self) -> SnapshotStore:
        """The same, to be changed without this one."""
        return SnapshotStore(self.state, self.keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SnapshotStore) and (self.state, self.keys) == (other.state, other.keys)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def load(self) -> StoredState | None:
        """The state."""
        return self.state

    def save(self, state: StoredState) -> None:
        """Replace the state and forget the keys that it does not name."""
        named = {("root", anchor.id) for anchor in state.anchors}
        named |= {("issuer", issuer.id) for issuer in (state.issuer, state.next) if issuer is not None}
        self.state, self.keys = state, {name: key for name, key in self.keys.items() if name in named}

    def save_key(self, kind: str, identifier: str, key_pem: bytes) -> None:
        """kind: ``root`` or ``issuer``."""
        self.keys[kind, identifier] = key_pem

    def load_key(self, kind: str, identifier: str) -> bytes | None:
        """None when there is none."""
        return self.keys.get((kind, identifier))

    def load_journal(self) -> list[Holding]:
        """Empty."""
        return []

    def append_journal(self, holding: Holding) -> None:
        """Nothing: every replica knows its own, and the leader asks them."""

    def journal_is_long(self, live: int) -> bool:
        """Never."""
        return False

    def compact_journal(self, holdings: list[Holding]) -> None:
        """Nothing."""


def secret_data(snapshot: SnapshotStore) -> dict[str, str]:
    """The ``data`` of the Secret, base64."""
    state = snapshot.state
    assert state is not None, "an authority exists before it is stored"
    data = {
        STATE: msgspec.json.encode(state),
        "tls.crt": state.issuer.chain.encode(),
        "tls.key": snapshot.keys["issuer", state.issuer.id],
        "ca.crt": "".join(anchor.pem for anchor in state.anchors).encode(),
    }
    for (kind, identifier), key in snapshot.keys.items():
        if (kind, identifier) != ("issuer", state.issuer.id):
            data[f"{kind}-{identifier}{_KEY_SUFFIX}"] = key
    return {name: base64.b64encode(value).decode() for name, value in data.items()}


def read_secret(secret: Mapping[str, Any]) -> SnapshotStore:
    """The snapshot in a Secret as JSON; raises SnapshotDamaged."""
    data = secret_values(secret)
    if STATE not in data:
        raise SnapshotDamaged(f"it has no {STATE}: it was not written by the identity service")
    try:
        state = msgspec.json.decode(data[STATE], type=StoredState)
    except (msgspec.DecodeError, RecursionError) as error:
        raise SnapshotDamaged(f"{STATE} cannot be read: {error}") from None
    keys: dict[tuple[str, str], bytes] = {}
    for name, value in data.items():
        kind, dash, identifier = name.removesuffix(_KEY_SUFFIX).partition("-")
        if dash and name.endswith(_KEY_SUFFIX):
            keys[kind, identifier] = value
    if "tls.key" not in data:
        raise SnapshotDamaged("it has no tls.key")
    keys["issuer", state.issuer.id] = data["tls.key"]
    return SnapshotStore(state, keys)


def secret_values(secret: Mapping[str, Any]) -> dict[str, bytes]:
    """``data`` of a Secret, decoded; raises SnapshotDamaged."""
    data = secret.get("data") or {}
    if not isinstance(data, Mapping):
        raise SnapshotDamaged("data is not a mapping")
    values = {}
    for name, text in data.items():
        try:
            values[str(name)] = base64.b64decode(str(text), validate=True)
        except (binascii.Error, ValueError):
            raise SnapshotDamaged(f"{name} is not base64") from None
        if len(values[str(name)]) > _VALUE_MAX:
            raise SnapshotDamaged(f"{name} has more than {_VALUE_MAX} bytes")
    return values
