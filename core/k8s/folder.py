"""A folder of manifests as a source of API objects: every ``*.yaml``, ``*.yml`` and ``*.json`` in it, watched for edits.

Decides which version of an object is in force; what an object means is for whoever parses. Used by the policy controller
(``--source folder:DIR``) and the local runner.

Rules. Files whose names start with a dot are not read. An object that two files define is taken from the one whose name sorts first.
A version that is refused changes nothing: the last good one stays, and
while a file holds anything that is refused, nothing vanishes from it. Nothing is deleted before two looks in a row agree, because an
editor that truncates and rewrites a file, or replaces it by renaming, would otherwise delete a policy for a moment.
Writers that replace a file by an atomic rename are seen at the next look.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from core.k8s.fields import InvalidObject, Raw
from core.k8s.manifests import MAX_FILE_BYTES, InvalidManifest, read_manifests
from core.k8s.objects import Object, group_kind
from core.k8s.source import Apply, Delete, Event, Parse, Refusal
from core.refs import Ref

LOOK_EVERY_S = 0.2
_SUFFIXES = (".yaml", ".yml", ".json")
_SETTLED_NS = 50_000_000  # a write within the file system's timestamp granularity of our read would look unchanged
_CLUSTER_WIDE = ("Namespace", "Node")

Signature = tuple[int, int, int]
_UNREADABLE: Signature = (0, 0, 0)  # of no real file: it is read again, fails, and keeps what it had


@dataclass
class _File:
    """What one file holds at present. seen: signature it was read with, None = read again. fading: gone at the last look."""

    seen: Signature | None = None
    objects: dict[Ref, Object] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    fading: frozenset[Ref] = frozenset()


class FolderSource:
    """Satisfies core.k8s.source.Source. A folder that does not exist (yet) is an empty one, and is a refusal."""

    def __init__(self, folder: Path, parse: Parse, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._folder = folder
        self._parse = parse
        self._now_ns = now_ns
        self._files: dict[str, _File] = {}
        self._claims: dict[Ref, set[str]] = {}
        self._in_force: dict[Ref, Object] = {}
        self._missing: tuple[Refusal, ...] = ()

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What is refused at present, by file name; an object that two files define is among it."""
        found = [refusal for name in sorted(self._files) for refusal in self._files[name].refusals]
        for ref, names in sorted(self._claims.items()):
            if len(names) > 1:
                first, *others = sorted(names)
                found.extend(Refusal(other, ref, f"also defined in {first}", kept=True) for other in others)
        return (*self._missing, *found)

    @property
    def waiting(self) -> Sequence[str]:
        """Nothing that could be named: a folder is read at once."""
        return ()

    async def run(self, emit: Callable[[Sequence[Event]], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look every 200 ms for ever, in a thread because a file system may be slow; one batch of events per look that found any."""
        emit(await trio.to_thread.run_sync(self.look))
        task_status.started()
        while True:
            await trio.sleep(LOOK_EVERY_S)
            if events := await trio.to_thread.run_sync(self.look):
                emit(events)

    def look(self) -> list[Event]:
        """Read what changed since the last look; returns the events that follow from it."""
        present = self._present()
        touched: set[Ref] = set()
        for name in sorted(present.keys() | self._files.keys()):
            state = self._files.setdefault(name, _File())
            signature = present.get(name)
            if signature is None or signature != state.seen:
                touched |= self._take(name, state, signature)
            if signature is None and not state.objects:
                del self._files[name]
        return self._events(touched)

    def _present(self) -> Mapping[str, Signature]:
        found: dict[str, Signature] = {}
        self._missing = ()
        try:
            with os.scandir(self._folder) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(_SUFFIXES) and not entry.name.startswith(".")]
        except OSError as error:
            self._missing = (Refusal(str(self._folder), None, f"expected a readable folder: {error.strerror}", kept=True),)
            return {name: state.seen or _UNREADABLE for name, state in self._files.items()}
        for name in names:
            try:
                status = os.stat(self._folder / name)
            except OSError:
                continue  # deleted between the listing and now; the next look agrees or not
            found[name] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return found

    def _take(self, name: str, state: _File, signature: Signature | None) -> set[Ref]:
        before = state.objects
        read: dict[Ref, Object] = {}
        if signature is None:
            state.refusals = ()
        else:
            read, state.refusals = self._read(name, before)
        vanished = before.keys() - read.keys()
        unconfirmed = vanished - state.fading
        state.objects = read | {ref: before[ref] for ref in unconfirmed}
        state.fading = frozenset(unconfirmed)
        settled = signature is not None and self._now_ns() - signature[0] > _SETTLED_NS
        state.seen = signature if settled and not unconfirmed else None
        for ref in vanished - unconfirmed:
            self._claims[ref].discard(name)
        for ref in read:
            self._claims.setdefault(ref, set()).add(name)
        return {ref for ref in before.keys() | state.objects.keys() if before.get(ref) is not state.objects.get(ref)}

    def _read(self, name: str, before: Mapping[Ref, Object]) -> tuple[dict[Ref, Object], tuple[Refusal, ...]]:
        """The file's objects, with the last good version in the place of a refused one."""
        try:
            documents = read_manifests(_content(self._folder / name), is_json=name.endswith(".json"))
        except (OSError, InvalidManifest) as error:
            return dict(before), (Refusal(name, None, str(error), kept=bool(before)),)
        read: dict[Ref, Object] = {}
        refusals: list[Refusal] = []
        for raw in documents:
            try:
                parsed = self._parse(raw)
            except InvalidObject as error:
                ref = _ref_of(raw)
                refusals.append(Refusal(name, ref, str(error), kept=ref in before))
                if error.instead is not None and ref is not None and ref not in before:
                    read.setdefault(ref, error.instead)
                continue
            if parsed is None:
                continue
            if parsed.ref in read:
                refusals.append(Refusal(name, parsed.ref, "defined twice in this file", kept=True))
                continue
            read[parsed.ref] = before[parsed.ref] if before.get(parsed.ref) == parsed else parsed
        if refusals:  # a misspelt kind or name would otherwise delete the object it stands for
            read = dict(before) | read
        return read, tuple(refusals)

    def _events(self, touched: set[Ref]) -> list[Event]:
        events: list[Event] = []
        for ref in sorted(touched):
            claims = self._claims.get(ref)
            if not claims:
                self._claims.pop(ref, None)
                if self._in_force.pop(ref, None) is not None:
                    events.append(Delete(ref))
                continue
            object_ = self._files[min(claims)].objects[ref]
            if self._in_force.get(ref) is not object_:
                self._in_force[ref] = object_
                events.append(Apply(object_))
        return events


def _content(path: Path) -> bytes:
    """What a file holds, up to a byte more than is read. A pipe or device is refused: opening one may wait for ever. Raises OSError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("expected a file, found something else")
        return file.read(MAX_FILE_BYTES + 1)


def _ref_of(raw: Raw) -> Ref | None:
    """Which object a refused one is, as far as it says so: the rest of its metadata may be what is wrong."""
    try:
        group, kind = group_kind(raw)
    except InvalidObject:
        return None
    meta = raw.get("metadata")
    name, namespace = (meta.get("name"), meta.get("namespace") or "default") if isinstance(meta, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(namespace, str):
        return None
    return Ref(group, kind, "" if kind in _CLUSTER_WIDE else namespace[:253], name[:253])
