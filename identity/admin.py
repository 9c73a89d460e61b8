"""The operator's socket: ``status`` and ``rotate`` over a Unix socket that only the service's own user may open.

One JSON request a line, one JSON answer a line. Moves them to the authority; it decides nothing. The other end is `admin_client`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from core.runtime import logs
from core.runtime.private_socket import listen_privately
from identity.admin_wire import AnchorStatus, Answer, Ask, Status, WorkloadStatus
from identity.authority import Authority
from identity.bundle import ABSENT_AFTER_S, Refusal, Step, due_step

_LINE_MAX_BYTES = 4096
_IDLE_S = 10.0
_ANSWER_S = 60.0
_WORKLOADS_SHOWN = 10_000

log = logs.logger("identity")


def status_of(authority: Authority) -> Status:
    """Everything an operator may want to know before a step."""
    trust, now = authority.trust.value, authority.clock()
    workloads = [
        WorkloadStatus(
            holding.pod,
            holding.workload,
            holding.instance,
            holding.generation,
            holding.leaves[0].issuer_id,
            max(leaf.not_after for leaf in holding.leaves),
            now - holding.heard_at,
            now - holding.heard_at > ABSENT_AFTER_S,
        )
        for holding in list(authority.ledger.live(now))[:_WORKLOADS_SHOWN]
    ]
    return Status(
        authority.trust_domain,
        trust.generation,
        [AnchorStatus(anchor.id, anchor.generation, anchor.not_after) for anchor in trust.anchors],
        trust.issuer.id,
        trust.issuer.not_after,
        due_step(trust).value,
        authority.blocking(),
        workloads,
    )


def read_ask(line: bytes) -> Ask:
    """What an operator wants; raises ValueError with the sentence to answer."""
    try:
        ask = msgspec.json.decode(line, type=Ask)
        if ask.step:
            Step(ask.step)
    except (msgspec.DecodeError, ValueError) as error:
        raise ValueError(f"not a request: {error}") from None
    if ask.verb not in ("status", "rotate"):
        raise ValueError(f"the verb {ask.verb[:40]!r} is unknown: expected status or rotate")
    return ask


def answer_of(authority: Authority, step: Step | None = None, refusal: Refusal | None = None) -> Answer:
    """The status, after a step that was asked for was done or refused."""
    if refusal is not None:
        return Answer(refusal.sentence, list(refusal.workloads), status=status_of(authority))
    return Answer(done=step.value if step else "", status=status_of(authority))


def answer(authority: Authority, line: bytes) -> Answer:
    """What one request gets."""
    try:
        ask = read_ask(line)
    except ValueError as error:
        return Answer(str(error))
    if ask.verb == "status":
        return answer_of(authority)
    step = Step(ask.step) if ask.step else due_step(authority.trust.value)
    refusal = authority.rotate(step, ignore_absent=ask.ignore_absent, force=ask.force)
    if refusal is not None:
        log.warning("rotation step refused", step=step.value, reason=refusal.sentence)
    else:
        log.warning("rotation step done", step=step.value, forced=ask.force, generation=authority.trust.value.generation)
    return answer_of(authority, step, refusal)


def listen_admin(path: Path) -> trio.SocketListener:
    """The listening socket, 0600 from the moment it exists; replaces one that a dead service left. Raises OSError."""
    return trio.SocketListener(trio.socket.from_stdlib_socket(listen_privately(path, 16)))


async def serve_admin(respond: Callable[[bytes], Awaitable[Answer]], listener: trio.SocketListener) -> None:
    """Serve for ever. respond: from the line that was asked to the answer, within a minute."""

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            line = b""
            with trio.move_on_after(_IDLE_S):
                line = await _line(stream)
            if line:
                with trio.move_on_after(_ANSWER_S):
                    await stream.send_all(msgspec.json.encode(await respond(line)) + b"\n")

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await handle(stream)
        except (trio.BrokenResourceError, OSError) as error:
            log.warning("admin request failed", reason=str(error))

    await trio.serve_listeners(guarded, [listener])


async def _line(stream: trio.SocketStream) -> bytes:
    line = bytearray()
    while b"\n" not in line and len(line) < _LINE_MAX_BYTES:
        data = await stream.receive_some(_LINE_MAX_BYTES)
        if not data:
            break
        line += data
    return bytes(line.partition(b"\n")[0])
