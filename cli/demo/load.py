"""Commands inside the pods while something else happens: load, or a connection that is held. Called by cli.demo.acts."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from typing import Any

import msgspec

from cli.demo.calls import NAMESPACE, Shop
from cli.output import CommandFailed
from local import protocol

_END_S = 30.0


class Background:
    """A command that runs in a pod until it ends by itself or `end_input` ends it (the demo's tools end with their input)."""

    def __init__(self, shop: Shop, app: str, *argv: str) -> None:
        self._what = f"in {app}: {' '.join(argv)}"
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the command
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- the same
        reading, self._writing = os.pipe()
        self._answer: protocol.Answer | Exception | None = None
        request = protocol.Exec(NAMESPACE, app, None, argv)
        self._thread = threading.Thread(target=self._run, args=(shop, request, reading), daemon=True)
        self._thread.start()

    def _run(self, shop: Shop, request: protocol.Exec, reading: int) -> None:
        try:
            self._answer = shop.mesh.ask(request, (reading, self._out.fileno(), self._errors.fileno()))
        except Exception as error:  # shown by `result`, in the thread that asks
            self._answer = error
        finally:
            os.close(reading)

    def lines(self) -> list[str]:
        """What it printed so far, whole lines."""
        size = os.fstat(self._out.fileno()).st_size
        return os.pread(self._out.fileno(), size, 0).decode().split("\n")[:-1]

    def end_input(self) -> None:
        """Close its standard input."""
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1

    def result(self) -> str:
        """Its last line, once it has ended; raises CommandFailed when it failed or does not end."""
        self._thread.join(_END_S)
        if not isinstance(self._answer, protocol.Exited) or self._answer.code:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise CommandFailed(f"{self._what}: {self._answer or 'does not end'}: {said}")
        lines = self.lines()
        self._out.close()
        self._errors.close()
        return lines[-1] if lines else ""


@dataclass(frozen=True)
class Result:
    """One kind of caller. failures: what they said, the first twenty."""

    name: str
    requests: int
    failed: int
    failures: tuple[str, ...]


class Load:
    """load.py running in one pod with these kinds of callers."""

    def __init__(self, shop: Shop, app: str, *kinds: str) -> None:
        self._running = Background(shop, app, "python3", "/tools/load.py", *kinds)

    @property
    def started(self) -> bool:
        """It has begun to call."""
        return bool(self._running.lines())

    def stop(self) -> list[Result]:
        """End it and read what it counted; raises CommandFailed when it did not run to its end."""
        self._running.end_input()
        counted: dict[str, dict[str, Any]] = msgspec.json.decode(self._running.result())
        return [Result(name, one["requests"], one["failed"], tuple(one["failures"])) for name, one in counted.items()]
