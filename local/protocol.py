"""What commands and the runner say over the control socket: one JSON object per line, and file descriptors with an exec. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_LINE_BYTES = 8 << 20  # a manifest file may be that large


class Exec(msgspec.Struct, frozen=True, tag="exec"):
    """Run a command in a pod; three file descriptors come with it. The answer is `Exited` or `Failed`; hanging up ends the command."""

    namespace: str
    pod: str
    container: str | None
    argv: tuple[str, ...]
    env: dict[str, str] = {}


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Answered by `MeshStatus`."""


class Logs(msgspec.Struct, frozen=True, tag="logs"):
    """Answered by `LogFiles`."""

    namespace: str
    pod: str
    container: str | None


class ApplyText(msgspec.Struct, frozen=True, tag="apply"):
    """Create or replace the objects of a manifest. Answered by `Done` or `Failed`."""

    text: str
    where: str
    is_json: bool


class DeleteText(msgspec.Struct, frozen=True, tag="delete"):
    """Delete the objects that a manifest names. Answered by `Done` or `Failed`."""

    text: str
    where: str
    is_json: bool


class Down(msgspec.Struct, frozen=True, tag="down"):
    """End everything. Answered by `Done` just before the runner ends."""


class Attend(msgspec.Struct, frozen=True, tag="attend"):
    """The mesh ends when this connection does: `up` in the foreground."""


Request = Exec | Status | Logs | ApplyText | DeleteText | Down | Attend


class ContainerStatus(msgspec.Struct, frozen=True):
    """One container of a pod. trouble: probe name -> why it fails at present."""

    name: str
    kind: str
    phase: str
    ready: bool
    restarts: int
    reason: str
    trouble: dict[str, str] = {}
    pid: int | None = None


class PodStatus(msgspec.Struct, frozen=True):
    """One pod. meshed: it has a sidecar. level, capture: how its traffic is led there (ebpf.plan), 0 and "" while it is not."""

    namespace: str
    name: str
    owner: str
    phase: str
    ready: bool
    meshed: bool
    message: str
    why_unmeshed: str
    addresses: tuple[str, ...]
    containers: tuple[ContainerStatus, ...]
    level: int = 0
    capture: str = ""


class ServiceStatus(msgspec.Struct, frozen=True):
    """One Service. endpoints: ready addresses."""

    namespace: str
    name: str
    addresses: tuple[str, ...]
    ports: tuple[int, ...]
    endpoints: tuple[str, ...]


class MeshStatus(msgspec.Struct, frozen=True, tag="status"):
    """Everything. ready: every pod is (or has ended well), nothing is refused. reasons: why not, a sentence each.

    refused: those of the reasons that only an edit can change.
    """

    name: str
    ready: bool
    settled: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    pods: tuple[PodStatus, ...]
    services: tuple[ServiceStatus, ...]
    control_plane: dict[str, str]
    pid: int
    state: str
    refused: tuple[str, ...] = ()

    @property
    def waits_for_edits(self) -> bool:
        """Whatever can be ready is, and something is refused."""
        return self.settled and bool(self.refused) and set(self.reasons) <= set(self.refused)


class LogFiles(msgspec.Struct, frozen=True, tag="logs"):
    """(pod/container, path) for each log that was asked for."""

    files: tuple[tuple[str, str], ...]


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """The command ended."""

    code: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """What was done, a line each."""

    lines: tuple[str, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """What was not done and why, a line each."""

    reasons: tuple[str, ...]


Answer = MeshStatus | LogFiles | Exited | Done | Failed

_encoder = msgspec.json.Encoder()
_request = msgspec.json.Decoder(Request)
_answer = msgspec.json.Decoder(Answer)


class BadMessage(ValueError):
    """A line that is not a message of this protocol: the command and the runner are of different versions."""


def encode(message: Request | Answer) -> bytes:
    """One line, newline included."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Raises BadMessage."""
    try:
        request: Request = _request.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadMessage(str(error)) from None
    return request


def decode_answer(line: bytes) -> Answer:
    """Raises BadMessage."""
    try:
        answer: Answer = _answer.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadMessage(str(error)) from None
    return answer


def as_json(message: Any) -> str:
    """For people and scripts: ``-o json``."""
    return msgspec.json.format(msgspec.json.encode(message)).decode()
