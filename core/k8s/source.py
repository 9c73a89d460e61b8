"""What a source of API objects says, whichever it is: a folder of manifests, or the API server's list and watch. Pure values.

A source parses what it reads with the function its owner gave it, so that an event always carries a typed object, and keeps the last
good state of an object whose newest version is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.k8s.fields import Raw
from core.k8s.objects import Object
from core.refs import Ref

Parse = Callable[[Raw], Object | None]
"""From an untrusted dict to a typed object, None for a kind that is of no interest; raises InvalidObject."""


@dataclass(frozen=True)
class Apply:
    """The object exists, and this is all of it."""

    object: Object


@dataclass(frozen=True)
class Delete:
    """The object does not exist any more."""

    ref: Ref


@dataclass(frozen=True)
class Reset:
    """These are all the objects of this group and kind (a fresh list); every other one is gone."""

    group: str
    kind: str
    objects: tuple[Object, ...]


Event = Apply | Delete | Reset


@dataclass(frozen=True)
class Refusal:
    """A version of an object that was not understood. where: file or watch it came from. ref: None when not even that could be read.

    kept: an older, good version stays in force.
    """

    where: str
    ref: Ref | None
    reason: str
    kept: bool

    def __str__(self) -> str:
        name = f" ({self.ref})" if self.ref else ""
        return f"{self.where}{name}: {self.reason}; " + ("the last good version stays in force" if self.kept else "it is ignored")


class Started(Protocol):
    """trio.TaskStatus, as far as a source needs it."""

    def started(self) -> None:
        """The first complete state was emitted."""


class Source(Protocol):
    """Where API objects come from."""

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What is refused at present."""

    @property
    def waiting(self) -> Sequence[str]:
        """What the first complete state is waiting for, a sentence each."""

    async def run(self, emit: Callable[[Sequence[Event]], None], *, task_status: Started) -> None:
        """Run for ever; ``emit`` gets the events in order, ``task_status.started`` follows the first complete state."""
