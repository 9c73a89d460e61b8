"""The authority that several replicas share: its state in one Secret, which every replica follows and the leader changes.

Moves snapshots; what a change is, is the caller's function on a copy of the authority (`Shared.change`). A change is tried on the copy,
stored by a PUT that names the version it is based on, and only then in force here: of two that write at once the API server lets one,
and no certificate is ever signed by an issuer that is not stored. The Secret is read every two seconds instead of watched: two small
requests a second for the whole cluster, no list or watch rights on Secrets, and an API server that was away needs no special case.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import trio

from core.k8s.api import Api, Object, object_path
from core.k8s.errors import ApiError, Conflict, NotFound
from core.runtime import logs
from core.runtime.watch import Cell
from identity.authority import Authority
from identity.ledger import Ledger
from identity.snapshot import STATE, SnapshotDamaged, SnapshotStore, read_secret, secret_data, secret_values
from identity.store import StoreUnsafe

T = TypeVar("T")

LOOK_EVERY_S = 2.0
CATCH_UP_S = 0.2
_CALL_S = 10.0

log = logs.logger("identity")


class Superseded(Exception):
    """Somebody else changed the state in the meantime: look again, then decide again."""


class Shared:
    """See the module. authority: None until the Secret holds one. problem: why it does not, or why its newest version is not used."""

    def __init__(
        self, api: Api, namespace: str, name: str, trust_domain: str, *, lifetime_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self.where = f"{namespace}/{name}"
        self.authority: Cell[Authority | None] = Cell(None)
        self.problem = f"Secret {self.where} was not read yet"
        self.unreachable = ""
        self.vacant = False
        """The Secret is there and empty: see `begin`."""
        self._api = api
        self._path = object_path("", "v1", "secrets", namespace, name)
        self._trust_domain = trust_domain
        self._lifetime_s = lifetime_s
        self.clock = clock
        self._secret: Object = {}
        self._store = SnapshotStore()
        self._lock = trio.Lock()
        self._caught_up_at = float("-inf")

    async def follow(self) -> None:
        """Keep `authority` equal to the Secret; for ever."""
        while True:
            try:
                await self.look()
            except (ApiError, trio.TooSlowError) as error:
                self._unreachable(str(error) or f"no answer within {_CALL_S:g} s")
            await trio.sleep(LOOK_EVERY_S)

    async def catch_up(self) -> None:
        """Look now, at most once in CATCH_UP_S, because somebody may know more than we do; a failure is for `follow` to tell."""
        if trio.current_time() - self._caught_up_at < CATCH_UP_S:
            return
        self._caught_up_at = trio.current_time()
        with contextlib.suppress(ApiError, trio.TooSlowError):
            await self.look()

    async def look(self) -> None:
        """Read the Secret now. Raises ApiError or TooSlowError."""
        async with self._lock:
            await self._look()

    async def begin(self, first: Callable[[SnapshotStore], Authority]) -> None:
        """When the Secret is empty: store what ``first`` makes in an empty store, or the authority that we have. Raises as `change`.

        A Secret that somebody emptied while we ran must not become a new authority, which nobody would trust.
        """
        async with self._lock:
            await self._look()
            if self.vacant:
                store = self._store
                if store.state is None:
                    store = SnapshotStore()
                    first(store)
                await self._write(store)

    async def change(self, work: Callable[[Authority], T], ledger: Ledger | None = None, obstacles: tuple[str, ...] = ()) -> T:
        """Run ``work`` on a copy of the authority that knows this ledger, and put what it did in force.

        Raises Superseded, ApiError or TooSlowError: then nothing is in force here that the Secret does not hold; after the latter two it
        may have been stored, which the next look shows.
        """
        async with self._lock:
            await self._look()
            trial, store = self._copy(ledger, obstacles)
            result = work(trial)
            if store != self._store:
                await self._write(store)
            return result

    def view(self, ledger: Ledger, obstacles: tuple[str, ...]) -> Authority:
        """The authority with another ledger, to look at. Raises Superseded when there is none yet."""
        return self._copy(ledger, obstacles)[0]

    def _copy(self, ledger: Ledger | None, obstacles: tuple[str, ...]) -> tuple[Authority, SnapshotStore]:
        store = self._store.copy()
        if store.state is None:
            raise Superseded(self.problem)
        trial = Authority.restored(store.state, store, self._trust_domain, lifetime_s=self._lifetime_s, clock=self.clock)
        trial.ledger, trial.obstacles = ledger or Ledger(), obstacles
        return trial, store

    async def _look(self) -> None:
        try:
            with trio.fail_after(_CALL_S):
                secret = await self._api.get(self._path)
        except NotFound:
            self._refuse(f"Secret {self.where} does not exist: `pillion install` makes it, empty")
            self.vacant = False
            return
        self.unreachable = ""
        self._take(secret)

    async def _write(self, store: SnapshotStore) -> None:
        body = {**self._secret, "data": {**self._foreign(), **secret_data(store)}}
        try:
            with trio.fail_after(_CALL_S):
                stored = await self._api.put(self._path, body)
        except Conflict:
            raise Superseded(
                f"Secret {self.where} was changed by somebody else in the meantime; look at the status and try again"
            ) from None
        self._take(stored)

    def _foreign(self) -> dict[str, str]:
        """Entries that somebody else put into the Secret: not ours to remove."""
        data = self._secret.get("data") or {}
        return {name: value for name, value in data.items() if name != STATE and not name.endswith((".key", ".crt"))}

    def _take(self, secret: Object) -> None:
        """Put a version of the Secret in force, or say why not and stay with the last good one."""
        if self._secret and _version(secret) == _version(self._secret):
            return
        self._secret = secret
        try:
            values = secret_values(secret)
            self.vacant = STATE not in values and not any(values.values())
            if self.vacant:
                self._refuse(f"Secret {self.where} is empty: the replica that leads fills it")
                return
            self._adopt(read_secret(secret))
        except (SnapshotDamaged, StoreUnsafe, KeyError, ValueError) as error:
            self._refuse(f"Secret {self.where} is not used: {error}")
            return
        self.problem = ""

    def _adopt(self, store: SnapshotStore) -> None:
        authority, state = self.authority.value, store.state
        assert state is not None, "read_secret gives a state"
        if authority is None:
            made = Authority.restored(state, store, self._trust_domain, lifetime_s=self._lifetime_s, clock=self.clock)
            self._store = store
            self.authority.set(made)
            return
        before = authority.trust.value
        authority.adopt(state, store)
        self._store = store
        after = authority.trust.value
        if after.generation < before.generation:
            log.error("the trust state went back, was an old Secret restored?", before=before.generation, now=after.generation)
        if after != before:
            log.warning("trust changed", generation=after.generation, issuer=after.issuer.id, anchors=len(after.anchors))

    def _refuse(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("trust state", problem=problem)
        self.problem = problem

    def _unreachable(self, reason: str) -> None:
        if not self.unreachable:
            log.warning("the API server does not answer, the last state stays in force", reason=reason)
        self.unreachable = reason


def _version(secret: Object) -> object:
    metadata = secret.get("metadata")
    return (metadata.get("uid"), metadata.get("resourceVersion")) if isinstance(metadata, dict) else None
