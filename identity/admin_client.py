"""The operator's end of the admin socket, synchronous, for `pillion identity rotate|status` and scripts."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from identity.admin_wire import Answer, Ask, Status

_TIMEOUT_S = 90.0
_RETRY_FIRST_S, _RETRY_MOST_S = 0.2, 2.0  # on a cluster each look asks every replica and lists all pods
_ANSWER_MAX_BYTES = 16 * 1024 * 1024


def exchange_line(path: str, line: bytes) -> bytes:
    """Bring one request to a socket of this machine; the answer's line. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.connect(path)
        sock.sendall(line + b"\n")
        received = bytearray()
        while not received.endswith(b"\n") and len(received) < _ANSWER_MAX_BYTES and (data := sock.recv(65536)):
            received += data
    return bytes(received)


class AdminRefused(Exception):
    """The service did not do it; the text is its sentence. blocking: the workload instances in the way. again: may work in a moment."""

    def __init__(self, sentence: str, blocking: list[str], *, again: bool = False) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.blocking = blocking
        self.again = again


class IdentityAdmin:
    """Talks to one identity service. path: its PILLION_IDENTITY_ADMIN_SOCKET; or ``exchange``, which brings a request to it otherwise."""

    def __init__(self, path: Path | None, *, who: str = "", exchange: Callable[[bytes], bytes] | None = None) -> None:
        assert (path is None) != (exchange is None), "one way to the service"
        self._who = who or str(path)
        self._exchange = exchange or partial(exchange_line, str(path))

    def status(self) -> Status:
        """Raises AdminRefused, or OSError when nobody listens."""
        return self._status(self._ask(Ask("status")))

    def rotate(self, step: str = "", *, ignore_absent: bool = False, force: bool = False) -> tuple[str, Status]:
        """Do one step (``add``, ``switch``, ``drop``, ``abort``; empty for the one that is due).

        ignore_absent: instances that hold a leaf and are no longer heard do not block. force: nobody blocks. Returns the step done and
        the status after it. Raises AdminRefused naming the workloads that the step would break, or OSError.
        """
        answer = self._ask(Ask("rotate", step, ignore_absent, force))
        return answer.done, self._status(answer)

    def rotate_through(self, *, ignore_absent: bool = False, wait_s: float = 120.0, told: Callable[[str], None] = lambda _: None) -> Status:
        """All steps from the one that is due to the drop, waiting for the workloads between them.

        told: gets a line for each step done. Raises AdminRefused when a step is still refused after ``wait_s`` seconds.
        """
        status = self.status()
        while True:
            step = status.due
            status = self._step_done(step, ignore_absent, time.monotonic() + wait_s)
            told(f"{step}: bundle generation {status.generation}, issuer {status.issuer}, {len(status.anchors)} anchor(s)")
            if step == "drop":
                return status

    def _step_done(self, step: str, ignore_absent: bool, deadline: float) -> Status:
        """The status after ``step``. The step is named, so that one whose answer was lost is not followed by one that nobody asked for."""
        pause = _RETRY_FIRST_S
        while True:
            try:
                return self.rotate(step, ignore_absent=ignore_absent)[1]
            except AdminRefused as refused:
                if not (refused.blocking or refused.again) or time.monotonic() > deadline:
                    raise
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(pause)
            pause = min(_RETRY_MOST_S, pause * 1.5)
            with contextlib.suppress(AdminRefused, OSError):
                status = self.status()
                if status.due != step:
                    return status

    def _ask(self, ask: Ask) -> Answer:
        received = self._exchange(msgspec.json.encode(ask))
        try:
            answer = msgspec.json.decode(received, type=Answer)
        except msgspec.DecodeError as error:
            raise AdminRefused(f"{self._who} did not answer as an identity service: {error}", []) from None
        if answer.error:
            raise AdminRefused(answer.error, answer.blocking, again=answer.again)
        return answer

    def _status(self, answer: Answer) -> Status:
        if answer.status is None:
            raise AdminRefused(f"{self._who} gave no status", [])
        return answer.status
