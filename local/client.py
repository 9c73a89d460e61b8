"""A command's side of the control socket, and starting the runner. Called by local.commands; blocking, because a command does one thing."""

from __future__ import annotations

import array
import compileall
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import core
from local import protocol
from local.state import BadName, control_socket, state_folder

_SILENT_S = 10.0  # how long waiting for pods needs no word
_START_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 900.0  # longer than any sensible grace period
_GONE_TIMEOUT_S = 30.0
_CLAIM_TIMEOUT_S = 10.0  # a runner that was killed is gone sooner; one that ends in order says so itself
_LONGEST_SOCKET = "policy/diagnostics.sock"  # local.control_plane
_SOCKET_PATH_MAX = 107  # sun_path of unix(7), without its final zero
_USUAL_UMASK = 0o022  # also under a stricter one (077): sidecars and apps are other users, who must read what is not secret


class NotRunning(RuntimeError):
    """There is no runner of this name. next_step: what the reader can do about it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no mesh named {name!r} is running here")
        others = running()
        self.next_step = f"--name with one of: {', '.join(others)}" if others else f"pillion local up -f DIR --name {name} --detach"


class CannotStart(RuntimeError):
    """The runner did not come up; the text says why."""


def connect(name: str) -> socket.socket:
    """A connection to the runner; raises NotRunning."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(control_socket(state_folder(name))))
    except OSError:
        connection.close()
        raise NotRunning(name) from None
    return connection


def running() -> list[str]:
    """The names of this user's meshes that answer."""
    try:
        names = sorted(entry.name for entry in state_folder("any").parent.iterdir())
        return [name for name in names if answers(name)]
    except (OSError, BadName):
        return []


def answers(name: str) -> bool:
    """Whether there is a runner of this name; raises BadName."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(control_socket(state_folder(name)))) == 0


def ask(name: str, request: protocol.Request, fds: tuple[int, ...] = ()) -> protocol.Answer:
    """One request, one answer; raises NotRunning."""
    with connect(name) as connection:
        return converse(connection, request, fds)


def converse(connection: socket.socket, request: protocol.Request, fds: tuple[int, ...] = ()) -> protocol.Answer:
    """Send a request (with file descriptors) and wait for the answer."""
    data = protocol.encode(request)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = connection.sendmsg([data], ancillary)
    if sent < len(data):  # an empty send would fail with EPIPE when the runner was quick to answer
        connection.sendall(data[sent:])
    received = b""
    while not received.endswith(b"\n"):
        chunk = connection.recv(1 << 16)
        if not chunk:
            return protocol.Done(()) if isinstance(request, protocol.Down) else protocol.Failed(("the runner ended before it answered",))
        received += chunk
    return protocol.decode_answer(received)


def end(name: str) -> None:
    """End the mesh; returns when its process, and with it everything of it, is gone. Raises NotRunning.

    The runner bounds the time it takes (local.supervisor); one that does not even answer is killed, which ends the same things.
    """
    with connect(name) as connection:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", credentials)[0]
        runner = os.pidfd_open(pid)
        try:
            connection.settimeout(_END_TIMEOUT_S)
            with contextlib.suppress(TimeoutError):
                converse(connection, protocol.Down())
            if not select.select([runner], [], [], _GONE_TIMEOUT_S)[0]:
                signal.pidfd_send_signal(runner, signal.SIGKILL)
                select.select([runner], [], [])
        finally:
            os.close(runner)


def start(name: str, folder: str, capture: str = "auto") -> None:
    """Start the runner and wait until it answers; raises CannotStart. capture: ``auto``, ``ebpf`` or ``nft``.

    Interrupted, it leaves nothing running.
    """
    state = state_folder(name)
    if not Path(folder).is_dir():
        raise CannotStart(f"-f {folder}: expected a folder with manifests")
    lock = claim(name, state)
    reading, writing = os.pipe()
    order = {"name": name, "folder": str(Path(folder).resolve()), "state": str(state), "ready_fd": writing, "rootless": os.geteuid() != 0}
    order["capture"] = capture
    compile_all()
    with open(state / "runner.log", "wb") as log:
        runner = subprocess.Popen(
            [sys.executable, "-P", "-m", "local.supervisor", json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writing, lock],
            start_new_session=True,
            cwd="/",
            umask=_USUAL_UMASK,
        )
    os.close(writing)
    os.close(lock)
    try:
        with open(reading, "rb") as pipe:
            said = pipe.read().decode(errors="replace")
        runner.wait(_START_TIMEOUT_S)
    except KeyboardInterrupt:
        os.killpg(runner.pid, signal.SIGKILL)  # it has a session of its own; what it made has no other holder
        runner.wait()
        shutil.rmtree(state, ignore_errors=True)
        raise
    if said != "up":
        raise CannotStart(said or f"the runner ended at once; its log is {state}/runner.log")


def claim(name: str, state: Path) -> int:
    """A lock on the mesh's folder, made if need be, as a descriptor; raises CannotStart when the name is taken.

    The runner inherits it and holds it as long as it lives: two commands at once cannot start two runners that empty each other's folder.
    """
    deadline = time.monotonic() + _CLAIM_TIMEOUT_S
    while not answers(name):
        prepare_state(state)
        if (lock := _lock(state)) is not None:
            return lock
        if time.monotonic() > deadline:
            raise CannotStart(f"a mesh named {name!r} is being started or ended; see `pillion local status --name {name}`")
        time.sleep(0.05)
    raise CannotStart(f"a mesh named {name!r} is running already; end it with `pillion local down --name {name}`")


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None while another holds it, or when a runner that ended has just removed the folder."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), os.stat(folder)):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(held)
    return None


@contextlib.contextmanager
def _usual_umask() -> Iterator[None]:
    before = os.umask(_USUAL_UMASK)
    try:
        yield
    finally:
        os.umask(before)


@_usual_umask()
def compile_all() -> None:
    """Bytecode for the programs of the mesh, once: their own users may not write it, and would compile at every start."""
    root = Path(core.__file__).resolve().parents[1]
    for package in ("core", "proxy", "policy", "identity", "ebpf"):
        if os.access(root / package, os.W_OK):
            compileall.compile_dir(str(root / package), quiet=2)


@_usual_umask()
def prepare_state(state: Path) -> None:
    """A folder of our own; the runner empties it. Raises CannotStart."""
    if len(os.fsencode(state / _LONGEST_SOCKET)) > _SOCKET_PATH_MAX:
        raise CannotStart(f"{state} is too long for the Unix sockets in it: choose a shorter --name, or a shorter XDG_RUNTIME_DIR")
    state.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if state.parent.stat().st_uid != os.geteuid():
        raise CannotStart(f"{state.parent} belongs to somebody else: remove it, or set XDG_RUNTIME_DIR to a folder of your own")
    state.mkdir(mode=0o711, exist_ok=True)  # the control plane's own users must get to their folders; nobody can list it


def wait_ready(name: str, timeout_s: float, tell: Callable[[str], None] = lambda _: None) -> protocol.MeshStatus:
    """The first status that waiting cannot make better, or the last one before the time was over; raises NotRunning.

    tell: called once for each pod or other thing that is waited for longer than most pods take, with what it lacks at that moment.
    """
    begun = time.monotonic()
    told: set[str] = set()
    while True:
        status = ask(name, protocol.Status())
        assert isinstance(status, protocol.MeshStatus)
        waited_s = time.monotonic() - begun
        if (status.settled and status.ready) or status.waits_for_edits or waited_s > timeout_s:
            return status
        if waited_s > _SILENT_S:
            for reason in (reason for reason in status.reasons if reason not in status.refused):
                what = reason.partition(": ")[0]
                if what not in told:
                    told.add(what)
                    tell(reason)
        time.sleep(0.1)
