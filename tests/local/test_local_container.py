"""The life of one container: restarts, and an end that comes at any moment of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from local.container import Container
from local.podspec import ContainerPlan
from local.process import Stdio


class FakeProcess:
    """Ends by SIGKILL, and by SIGTERM unless it is deaf."""

    pid = 4711

    def __init__(self, *, deaf: bool = False) -> None:
        self._deaf = deaf
        self._over = trio.Event()
        self.signals: list[int] = []
        self.code = 0

    def signal(self, number: int) -> None:
        self.signals.append(number)
        if not self._deaf:
            self.exit(128 + number)

    def kill(self) -> None:
        self.signals.append(signal.SIGKILL)
        self.exit(137)

    def exit(self, code: int) -> None:
        self.code = code
        self._over.set()

    async def wait(self) -> int:
        await self._over.wait()
        return self.code

    async def end(self) -> None:
        self.kill()


class FakePod:
    """Starts a process after ``takes_s``; cannot be interrupted in it, as the real one."""

    host = "127.0.0.1"

    def __init__(self, *, takes_s: float = 0.0, deaf: bool = False) -> None:
        self.takes_s = takes_s
        self.deaf = deaf
        self.started: list[FakeProcess] = []

    async def start(self, plan: ContainerPlan, argv: tuple[str, ...], stdio: Stdio, inside: int | None) -> Any:
        with trio.CancelScope(shield=True):
            await trio.sleep(self.takes_s)
        self.started.append(FakeProcess(deaf=self.deaf))
        return self.started[-1]

    def changed(self) -> None:
        pass


def container(pod: FakePod, tmp_path: Path, policy: str = "Always") -> Container:

    plan = ContainerPlan("app", "app", ("true",), {}, "/", 65532, 65532, (), {}, {})
    return Container(plan, policy, tmp_path / "app.log", pod)


@pytest.mark.parametrize(("takes_s", "grace_s", "ends_after_s"), [(0.0, 30, 0.0), (5.0, 30, 4.0), (5.0, 2, 4.0), (5.0, 0, 4.0)])
async def test_a_container_that_is_being_started_ends_as_soon_as_it_is(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, takes_s: float, grace_s: float, ends_after_s: float
) -> None:
    pod = FakePod(takes_s=takes_s)
    made = container(pod, tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await trio.sleep(1)
        began = trio.current_time()
        with trio.fail_after(60):
            await made.stop(grace_s)
        assert trio.current_time() - began == pytest.approx(ends_after_s, abs=0.01)
    assert len(pod.started) == 1
    assert pod.started[0].signals[0] == (signal.SIGKILL if grace_s < ends_after_s else signal.SIGTERM)


async def test_a_container_told_to_stop_before_it_ran_starts_nothing(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    pod = FakePod()
    made = container(pod, tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.stop, 30.0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(made.run)
    assert pod.started == []


async def test_a_deaf_process_is_killed_when_its_grace_is_over(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    pod = FakePod(deaf=True)
    made = container(pod, tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await trio.sleep(1)
        began = trio.current_time()
        await made.stop(7)
        assert trio.current_time() - began == pytest.approx(7, abs=0.01)
    assert pod.started[0].signals == [signal.SIGTERM, signal.SIGKILL]


async def test_a_container_in_backoff_ends_at_once(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    pod = FakePod()
    made = container(pod, tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        for number in range(1, 6):
            await trio.sleep(0.01 + 2 ** (number - 1) * 0.5 * (number > 1))
            assert len(pod.started) == number
            pod.started[-1].exit(1)
        await trio.sleep(1)
        began = trio.current_time()
        await made.stop(30)
        assert trio.current_time() == began
    assert len(pod.started) == 5


def test_a_runner_that_does_not_come_to_its_end_is_ended() -> None:
    words = "import time; from local.supervisor import _end_within; _end_within(0.05); time.sleep(50)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "not everything ended in order" in done.stderr
