"""Lets the pod's other containers start: tells the sidecar's postStart hook (injector.hold) that it is ready. Called by proxy.app.

The kubelet starts the next container once the hook has succeeded. A startup probe would say the same a second later: the kubelet looks at
containers once a second, and needs two more looks for a probe's result. But a kubelet that restarts forgets its hooks, and takes a
running sidecar for one that has started. So while capture is not proven, the sidecar does not outlive its hook: whoever starts the
container again has to run the hook again.

The hook comes through a Unix socket (proxy.hook), so that the kernel says who calls and when the caller is gone. Only our own user is
heard, which no app may run as (injector.decide).
"""

from __future__ import annotations

import math
import os
import socket
import struct
from collections.abc import Callable

import trio

from core.runtime import logs
from proxy.capture_proof import CaptureProof

READY = b"ready\n"

_log = logs.logger("hold")

_HOOK_COMES_S = 0.5  # the hook starts when we do and loads less, so it waits already, unless the kubelet ended before it ran the hook
_PROVEN_WITHIN_S = 30.0  # the agent may be restarting
_LOOK_S = 0.01
_AGAIN_S = 0.1


class NotReleased(Exception):
    """Why a sidecar that must prove capture ends: its pod's containers must not start."""


async def release(hooks: socket.socket, not_ready: Callable[[], list[str]], proof: CaptureProof) -> None:
    """Tell every hook that comes; raises NotReleased when none comes, or leaves, while capture is not proven. hooks: listening."""
    with trio.socket.from_stdlib_socket(hooks) as listener:
        while True:
            with trio.move_on_after(math.inf if proof.proven.value else _HOOK_COMES_S) as waiting:
                caller = await _accept(listener)
            if not waiting.cancelled_caught:
                with caller:
                    gone = _is_ours(caller) and not await _tell(caller, lambda: proof.proven.value and not not_ready())
                if gone and not proof.proven.value:
                    raise NotReleased(f"the postStart hook was ended before capture was proven: {proof.problem}")
            elif not proof.proven.value:
                raise NotReleased(f"no postStart hook came within {_HOOK_COMES_S:g} s, and capture is not proven: {proof.problem}")


async def end_unproven(proof: CaptureProof) -> None:
    """Until capture is proven; raises NotReleased when that takes too long."""
    with trio.move_on_after(_PROVEN_WITHIN_S):
        await proof.proven.wait_for(bool)
        return
    raise NotReleased(
        f"this pod's traffic is not led to its sidecar after {_PROVEN_WITHIN_S:g} s, so its containers do not start: {proof.problem}."
        " Does pillion-agent run on this node, and what does it say about this pod? (pillion check)"
    )


async def _accept(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    """The next caller. What keeps one from being accepted, such as a lack of file descriptors, passes."""
    while True:
        try:
            return (await listener.accept())[0]
        except OSError as error:
            _log.warning("a hook cannot be heard yet", reason=str(error))
            await trio.sleep(_AGAIN_S)


def _is_ours(caller: trio.socket.SocketType) -> bool:
    uid: int = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return uid == os.geteuid()


async def _tell(caller: trio.socket.SocketType, ready: Callable[[], bool]) -> bool:
    """Tell the caller once ``ready`` holds; False when it went away first."""
    told = False
    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            try:
                await caller.recv(1)  # it says nothing: this is its end
            except OSError:
                pass
            nursery.cancel_scope.cancel()

        nursery.start_soon(listen)
        while not ready():  # noqa: ASYNC110  # has many reasons, and ends within a second
            await trio.sleep(_LOOK_S)
        try:
            told = await caller.send(READY) == len(READY)
            _log.info("ready")
        except OSError:
            pass
        nursery.cancel_scope.cancel()
    return told
