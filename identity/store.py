"""What the identity service keeps on disk: keys, the trust state, the journal of the ledger. Its directory is private (0700, keys 0600).

Moves bytes; it must not decide what they mean (`authority`). Every file is replaced whole by a rename, so that a crash leaves the old
or the new one; keys are written before the state that names them.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Protocol

import msgspec

from identity.ledger import Holding

_STATE = "state.json"
_JOURNAL = "ledger.jsonl"
_BUNDLE = "bundle.pem"
_LOCK = "lock"
_JOURNAL_SLACK = 4096  # lines beyond the live entries before the journal is written anew


class StoreUnsafe(Exception):
    """A file is not as private, or not as readable, as it must be; the text names it and the next step."""


class StoredAnchor(msgspec.Struct, frozen=True):
    """As `bundle.Anchor`."""

    id: str
    pem: str
    generation: int


class StoredIssuer(msgspec.Struct, frozen=True):
    """chain: PEM, the issuer first, without the anchor; certificate: the issuer alone. Its key is in a file of its own."""

    id: str
    anchor_id: str
    certificate: str
    chain: str


class StoredState(msgspec.Struct, frozen=True):
    """The trust state with the certificates it names."""

    trust_domain: str
    generation: int
    anchors: tuple[StoredAnchor, ...]
    issuer: StoredIssuer
    next: StoredIssuer | None
    kept: tuple[str, ...] = ()
    version: int = 1


class StateStore(Protocol):
    """Where an authority keeps what it must not forget: `Store`, a directory, or `snapshot.SnapshotStore`, in memory."""

    def load(self) -> StoredState | None:
        """The state of the last run; raises StoreUnsafe."""
        ...

    def save(self, state: StoredState) -> None:
        """Commit; keys that it does not name may go."""
        ...

    def save_key(self, kind: str, identifier: str, key_pem: bytes) -> None:
        """kind: ``root`` or ``issuer``."""
        ...

    def load_key(self, kind: str, identifier: str) -> bytes | None:
        """None when there is none."""
        ...

    def load_journal(self) -> list[Holding]:
        """Entries of the ledger, oldest first."""
        ...

    def append_journal(self, holding: Holding) -> None:
        """One more entry."""
        ...

    def journal_is_long(self, live: int) -> bool:
        """Whether `compact_journal` is worth its write."""
        ...

    def compact_journal(self, holdings: list[Holding]) -> None:
        """Replace the journal."""
        ...


def read_private(path: Path) -> bytes:
    """The content of a key file that only its owner may read; raises StoreUnsafe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreUnsafe(f"{path} cannot be read: {error.strerror}") from None
    with os.fdopen(fd, "rb") as file:
        mode = os.fstat(fd).st_mode & 0o777
        if mode & 0o077:
            raise StoreUnsafe(f"{path} has mode {mode:04o}, a key must be private: chmod 600 {path}")
        return file.read(64 * 1024)


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """Write ``data`` beside ``path`` and rename it over; the file never exists with other content or a wider mode."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(data)
        file.flush()
        os.fsync(fd)
    beside.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Store:
    """One directory."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory (0700) when it is not there; raises StoreUnsafe when others may enter it or it is not ours."""
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = directory.stat()
        if stat.st_mode & 0o022 or stat.st_uid != os.geteuid():
            raise StoreUnsafe(f"{directory} must belong to uid {os.geteuid()} and be written by nobody else: chmod 700 {directory}")
        self._journal_lines = 0
        self._lock = -1

    def lock(self) -> None:
        """Keep other processes away until this one ends: two that sign from one directory would forget each other's leaves.

        Raises StoreUnsafe.
        """
        self._lock = os.open(self._directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreUnsafe(f"another identity service works in {self._directory}: stop it, or use another directory") from None

    def load(self) -> StoredState | None:
        """The state of the last run, None on first start; raises StoreUnsafe when it is damaged."""
        path = self._directory / _STATE
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(read_private(path), type=StoredState)
        except msgspec.DecodeError as error:
            raise StoreUnsafe(f"{path} is damaged ({error}): restore it, or remove {self._directory} to start a new mesh") from None

    def save(self, state: StoredState) -> None:
        """Commit the state, then remove keys it no longer names; the bundle lies beside it for everybody to read."""
        replace_file(self._directory / _STATE, msgspec.json.encode(state), 0o600)
        replace_file(self._directory / _BUNDLE, "".join(anchor.pem for anchor in state.anchors).encode(), 0o644)
        named = {self._key_path("root", anchor.id) for anchor in state.anchors}
        named |= {self._key_path("issuer", issuer.id) for issuer in (state.issuer, state.next) if issuer is not None}
        for path in self._directory.glob("*.key"):
            if path not in named:
                path.unlink()

    def save_key(self, kind: str, identifier: str, key_pem: bytes) -> None:
        """kind: ``root`` or ``issuer``."""
        replace_file(self._key_path(kind, identifier), key_pem, 0o600)

    def load_key(self, kind: str, identifier: str) -> bytes | None:
        """None when there is none; raises StoreUnsafe when others may read it."""
        path = self._key_path(kind, identifier)
        return read_private(path) if path.exists() else None

    def _key_path(self, kind: str, identifier: str) -> Path:
        return self._directory / f"{kind}-{identifier}.key"

    def load_journal(self) -> list[Holding]:
        """Entries, oldest first. A last line cut short by a crash is left out."""
        path = self._directory / _JOURNAL
        if not path.exists():
            return []
        entries = []
        for line in path.read_bytes().splitlines():
            try:
                entries.append(msgspec.json.decode(line, type=Holding))
            except msgspec.DecodeError:
                continue
        self._journal_lines = len(entries)
        return entries

    def append_journal(self, holding: Holding) -> None:
        """One more entry: survives a crash of this process, though not of the machine."""
        fd = os.open(self._directory / _JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, msgspec.json.encode(holding) + b"\n")
        finally:
            os.close(fd)
        self._journal_lines += 1

    def journal_is_long(self, live: int) -> bool:
        """Whether `compact_journal` is worth its write."""
        return self._journal_lines > 2 * live + _JOURNAL_SLACK

    def compact_journal(self, holdings: list[Holding]) -> None:
        """Replace the journal by the entries in force."""
        replace_file(self._directory / _JOURNAL, b"".join(msgspec.json.encode(entry) + b"\n" for entry in holdings), 0o600)
        self._journal_lines = len(holdings)
