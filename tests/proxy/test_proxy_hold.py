"""The hook is told when the sidecar is ready; a sidecar that has not proven capture does not outlive its hook."""

from __future__ import annotations

import os
import resource
import socket
import threading

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import injector.hold
from core.env import boolean
from injector.fixed import SIDECAR_UID
from proxy import hold, hook
from proxy.capture_proof import CaptureProof
from proxy.hold import NotReleased, end_unproven, release


@pytest.fixture(autouse=True)
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    """Abstract names belong to the whole network namespace: each test process has its own."""
    assert injector.hold.HOLD_SOCKET == hook.SOCKET
    mine = f"{hook.SOCKET}-{os.getpid()}"
    monkeypatch.setattr(hook, "SOCKET", mine)
    hook.listener.cache_clear()
    return mine


class Starting:
    """A sidecar on its way: not ready, capture not proven."""

    def __init__(self) -> None:
        self.reasons = ["no certificate yet"]
        self.proof = CaptureProof(4140)
        self.proof.problem = "a connection did not arrive"

    def prove(self) -> None:
        self.proof.problem = ""
        self.proof.proven.set(True)

    async def released(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listener = hook.listener()
        task_status.started()
        await release(listener, lambda: self.reasons, self.proof)


async def call(name: str) -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.connect(name)
    return sock


async def test_the_hook_is_told_as_soon_as_the_sidecar_is_ready(name: str) -> None:
    starting, said = Starting(), list[bytes]()
    async with trio.open_nursery() as nursery:
        await nursery.start(starting.released)
        sock = await call(name)

        async def listen() -> None:
            said.append(await sock.recv(64))

        async with trio.open_nursery() as hooks:
            hooks.start_soon(listen)
            await wait_all_tasks_blocked()
            starting.prove()
            await wait_all_tasks_blocked()
            assert not said, "proven is not ready"
            starting.reasons.clear()
        sock.close()
        assert said == [hold.READY]
        assert await trio.to_thread.run_sync(injector.hold.wait_proven, 10.0, name) == "", "the real hook, some time later"
        nursery.cancel_scope.cancel()


async def test_a_sidecar_whose_hook_is_gone_before_capture_is_proven_ends(name: str) -> None:
    """The kubelet was restarted: it forgets the hook, and would start the app beside a sidecar that runs."""
    starting = Starting()
    with pytest.RaisesGroup(pytest.RaisesExc(NotReleased, match="ended before capture was proven: a connection did not arrive")):
        async with trio.open_nursery() as nursery:
            await nursery.start(starting.released)
            (await call(name)).close()


async def test_a_hook_that_came_and_went_while_the_sidecar_was_loaded_is_noticed(name: str) -> None:
    starting, listener = Starting(), hook.listener()
    with socket.socket(socket.AF_UNIX) as early:
        early.connect(name)
    with pytest.raises(NotReleased, match="ended before capture was proven"):
        await release(listener, lambda: starting.reasons, starting.proof)


def test_hooks_are_expected_exactly_when_the_setting_says_so() -> None:
    for value in ("true", " True", "false", ""):
        assert hook.is_wanted({"PILLION_PROVE_CAPTURE": value}) == (bool(value) and boolean(value)), value
    assert not hook.is_wanted({})


async def test_once_capture_is_proven_a_lost_hook_does_not_matter_and_another_one_is_answered(name: str) -> None:
    starting = Starting()
    starting.prove()
    async with trio.open_nursery() as nursery:
        await nursery.start(starting.released)
        (await call(name)).close()
        starting.reasons.clear()
        again = await call(name)
        assert await again.recv(64) == hold.READY
        again.close()
        nursery.cancel_scope.cancel()


async def test_a_sidecar_that_nobody_holds_ends_unless_capture_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "_HOOK_COMES_S", 0.01)
    with pytest.raises(NotReleased, match="no postStart hook came"):
        await Starting().released()
    starting = Starting()
    starting.prove()
    hook.listener.cache_clear()
    with trio.move_on_after(0.1) as scope:
        await starting.released()
    assert scope.cancelled_caught


async def test_another_user_of_the_pod_is_not_heard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app, when the sidecar alone is started again: neither its coming nor its going means anything."""
    starting = Starting()
    monkeypatch.setattr(hold.os, "geteuid", lambda: SIDECAR_UID)
    async with trio.open_nursery() as nursery:
        await nursery.start(starting.released)
        app = await call(name)
        assert await app.recv(64) == b""
        app.close()
        nursery.cancel_scope.cancel()


async def test_capture_that_is_never_proven_ends_the_sidecar_with_the_reason(autojump_clock: trio.testing.MockClock) -> None:
    starting = Starting()
    with pytest.raises(NotReleased, match=r"not led to its sidecar .*: a connection did not arrive\. Does pillion-agent run"):
        await end_unproven(starting.proof)
    starting.prove()
    await end_unproven(starting.proof)


def test_a_hook_whose_sidecar_ends_or_never_comes_says_so(name: str) -> None:
    assert "does not answer" in injector.hold.wait_proven(0.0, name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        listener.settimeout(5)
        sidecar = threading.Thread(target=lambda: listener.accept()[0].close())
        sidecar.start()
        assert injector.hold.wait_proven(5.0, name) == "it ended"
        sidecar.join()


async def test_a_lack_of_file_descriptors_costs_the_hook_time_and_not_the_sidecar(name: str) -> None:
    starting = Starting()
    starting.prove()
    starting.reasons.clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with trio.open_nursery() as nursery:
        await nursery.start(starting.released)
        await wait_all_tasks_blocked()
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, hard))
            try:
                await sock.connect(name)
                await wait_all_tasks_blocked()
                with pytest.raises(BlockingIOError):
                    sock._sock.recv(64, socket.MSG_DONTWAIT)  # type: ignore[attr-defined]
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert await sock.recv(64) == hold.READY
        nursery.cancel_scope.cancel()
