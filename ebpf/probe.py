"""Whether the loaded programs do on this kernel what they are for: tried, in a namespace made for it, before any pod has them.

``python -m ebpf.probe`` loads everything once more into a bpf file system that ends with the process, and runs connections through it. A
program that loads may still not do its work: a kernel whose redirect does not account memory, or counts other bytes as read, would lose
the bound or the order that acceleration stands on, and must not get it. Called by the agent (``command``, ``read_findings``) and by
people; never touches what is pinned for pods.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ebpf import attach, bpfsys, layout, loader
from ebpf.layout import Counter, PodFlag

_NAMES = ("getpeername4", "getpeername6", "getsockname4", "getsockname6")
CONNECT = ("connect4", "connect6", "sockets", *_NAMES, "getsockopt", "setsockopt", "sockops")
_TARGET = ("192.0.2.1", 9)  # TEST-NET-1: nobody
_PORT = 4140
_UNREAD_MAX = 8 << 20
_TCP_DEFER_ACCEPT = 9
_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_SECONDS = 20.0


class Findings(NamedTuple):
    """ "" for what works, else a sentence. connect: outbound capture; steer: inbound; sockmap: acceleration; to_app: the same of what the
    app reads."""

    connect: str
    steer: str
    sockmap: str
    to_app: str = ""


class _Wrong(Exception):
    """What a trial saw instead of what it should have."""


def command(folder: Path | None = None) -> list[str]:
    """The child's command line. folder: where sources lie that replace ours, for tests."""
    return [sys.executable, "-m", "ebpf.probe", *([str(folder)] if folder else [])]


def read_findings(output: bytes) -> Findings:
    """The child's last line; raises loader.LoaderFailed for anything else."""
    try:
        fields = json.loads(output.strip().splitlines()[-1])
        return Findings(*(str(fields[name]) for name in Findings._fields))
    except (IndexError, KeyError, TypeError, ValueError):
        raise loader.LoaderFailed(output.decode(errors="replace").strip()[-2000:] or "the probe ended without a word") from None


def find(folder: Path | None = None, seconds: float = 60.0) -> Findings:
    """Run the child and wait; what it cannot say counts as nothing works."""
    try:
        done = subprocess.run(command(folder), capture_output=True, timeout=seconds, cwd=Path(__file__).resolve().parents[1], check=False)
        return read_findings(done.stdout)
    except (OSError, subprocess.TimeoutExpired, loader.LoaderFailed) as error:
        said = f"the probe of the programs failed: {error}"
        return Findings(said, said, said, said)


# --- in the child -------------------------------------------------------------------------------------------------------------------


def trial(sources: Path | None = None) -> Findings:
    """Everything, in this process, which is in other namespaces afterwards: it should end soon."""
    import tempfile  # here, because the agent imports this module and its memory is a headline number

    bpfsys.unshare(_CLONE_NEWNS | _CLONE_NEWNET)
    bpfsys.make_mounts_private()
    with tempfile.TemporaryDirectory(prefix="pillion-probe-") as folder:
        bpfsys.mount_bpffs(Path(folder))
        root = Path(folder) / "pillion"
        try:
            report = loader.install(root, folder=sources)
            found = Findings(report.why_not(CONNECT), report.why_not(["inbound"]), report.why_not(["sockops", "redirect"]))
            if report.problem:
                return found
            with attach.Node(attach.Pins(root)) as node:
                found = _try_all(node, found)
        finally:
            made = _programs(root)
            attach.remove(root)
            bpfsys.unmount(Path(folder))
        _wait_until_gone(made)
        return found


def _programs(root: Path) -> set[int]:
    """The kernel's ids of the pinned programs."""
    found = set()
    for path in attach.Pins(root).programs.glob("*"):
        fd = bpfsys.pinned(path)
        found.add(bpfsys.object_id(fd))
        os.close(fd)
    return found


def _wait_until_gone(programs: set[int]) -> None:
    """The kernel frees programs a grace period after their last user; whoever counts them after us shall not count ours."""
    end = time.monotonic() + 2
    while programs & bpfsys.ids("prog") and time.monotonic() < end:
        time.sleep(0.01)


def _try_all(node: attach.Node, found: Findings) -> Findings:
    _loopback_up()
    cookie = bpfsys.netns_cookie()
    pod = layout.Pod(0xFFFFFFFE, PodFlag.CAPTURE | PodFlag.ACCELERATE, _PORT, 4143)
    node.write_pod(cookie, pod)
    if not found.connect:
        found = found._replace(connect=_attempt("capture of connect()", lambda: _hang_on_root(node)))
    if not found.connect:
        found = found._replace(connect=_attempt("capture of connect()", _captures))
    if not found.steer:
        with open("/proc/self/ns/net", "rb") as netns:
            found = found._replace(steer=_attempt("capture of what arrives", lambda: node.link_netns(cookie, netns.fileno())))
    if found.connect and not found.sockmap:
        found = found._replace(sockmap=found.connect)
    checks = (
        ("order", _keeps_order),
        ("memory", _bounds_memory),
        ("bytes", lambda: _redirects(node, cookie)),
        ("readers", lambda: _never_strands_a_reader(node, cookie)),
    )
    for name, check in checks:
        if not found.sockmap:
            found = found._replace(sockmap=_attempt(f"acceleration ({name})", check))
    if not found.sockmap:
        found = found._replace(to_app=_attempt("acceleration of what the app reads", _fionread_is_true))
    if found.to_app:
        node.write_pod(cookie, pod._replace(flags=pod.flags | PodFlag.ONE_WAY))
        found = found._replace(sockmap=_attempt("acceleration of what the app sends", _fionread_is_true))
    return found


def _hang_on_root(node: attach.Node) -> None:
    """For a moment, on the cgroup that everybody is in; for every namespace but ours the programs do nothing."""
    cgroup = bpfsys.cgroup2()
    if cgroup is None:
        raise _Wrong("the unified cgroup hierarchy is not mounted (cgroup2); mount it: mount -t cgroup2 none /sys/fs/cgroup")
    fd = os.open(cgroup, os.O_RDONLY)
    try:
        node.link_cgroup(fd, "probe")
    finally:
        os.close(fd)


def _attempt(what: str, check: Callable[[], None]) -> str:
    try:
        check()
    except (OSError, _Wrong) as error:
        return f"{what} does not work on kernel {os.uname().release}: {error}"
    return ""


def _loopback_up() -> None:
    with socket.socket() as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("=16sH14x", b"lo", 1 | 64))  # SIOCSIFFLAGS: IFF_UP | IFF_RUNNING


def _listen(*options: tuple[int, int, int]) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for option in options:
        listener.setsockopt(*option)
    listener.bind(("127.0.0.1", _PORT))
    listener.listen(8)
    listener.settimeout(_SECONDS)
    return listener


def _captures() -> None:
    with socket.socket() as sock:
        sock.settimeout(_SECONDS)
        if (code := sock.connect_ex(_TARGET)) != errno.ECONNREFUSED:
            raise _Wrong(f"a connection without a sidecar got {errno.errorcode.get(code, code)}, expected ECONNREFUSED")
    with _listen() as listener, socket.create_connection(_TARGET, _SECONDS) as sock, listener.accept()[0] as end:
        try:
            port, ip = struct.unpack("!2xH4s8x", end.getsockopt(socket.IPPROTO_IP, 80, 16))
        except OSError as error:
            raise _Wrong(f"the accepting end is not told the original destination ({error})") from None
        if (socket.inet_ntoa(ip), port) != _TARGET:
            raise _Wrong(f"the original destination was {socket.inet_ntoa(ip)}:{port}")
        if sock.getpeername() != _TARGET:
            raise _Wrong(f"the app's peer was {sock.getpeername()}")


def _read(sock: socket.socket, number: int) -> bytes:
    data = b""
    while len(data) < number:
        select.select([sock], [], [], _SECONDS)
        with contextlib.suppress(BlockingIOError):
            piece = sock.recv(number - len(data), socket.MSG_DONTWAIT)
            if not piece:
                break
            data += piece
    return data


def _keeps_order() -> None:
    with _listen((socket.IPPROTO_TCP, _TCP_DEFER_ACCEPT, 10)) as listener, socket.create_connection(_TARGET, _SECONDS) as sock:
        words = array.array("I", range(50))
        for word in words:
            sock.send(struct.pack("=I", word))
        with listener.accept()[0] as end:
            if array.array("I", _read(end, 200)) != words:
                raise _Wrong("messages overtook each other")


def _bounds_memory() -> None:
    with _listen() as listener, socket.create_connection(_TARGET, _SECONDS) as sock, listener.accept()[0] as end:
        sock.setblocking(False)
        data, taken = bytes(range(256)) * 256, 0
        with contextlib.suppress(BlockingIOError):
            while taken <= _UNREAD_MAX:
                taken += sock.send(data[taken % 256 :])
        if taken > _UNREAD_MAX:
            raise _Wrong(f"the kernel took {taken} bytes for a reader that reads nothing")
        left = taken
        while left:
            got = _read(end, min(left, 1 << 20))
            if not got or got[0] != (taken - left) % 256:
                raise _Wrong("bytes were lost after a fall back to TCP")
            left -= len(got)


def _never_strands_a_reader(node: attach.Node, cookie: int) -> None:
    """An app that took a first part by TCP and sleeps for the rest, MSG_WAITALL."""
    with _listen() as listener, socket.create_connection(_TARGET, _SECONDS) as app, listener.accept()[0] as end:
        ahead, before = 0, node.counters(cookie)[Counter.BY_TCP_MEMORY]
        while _held(app) <= layout.QUEUE_LIMIT and ahead < _UNREAD_MAX:
            ahead += end.send(bytes(1 << 16))
        end.send(b"a" * 100)
        if node.counters(cookie)[Counter.BY_TCP_MEMORY] == before or len(_read(app, ahead)) != ahead:
            raise _Wrong("nothing fell back to TCP behind a full queue")
        app.settimeout(None)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(app.recv(200, socket.MSG_WAITALL)), daemon=True)
        reader.start()
        time.sleep(0.05)
        end.send(b"b" * 100)
        reader.join(2)
        if not got:
            raise _Wrong("a reader in MSG_WAITALL was left sleeping")


def _held(sock: socket.socket) -> int:
    """Bytes of kernel memory that wait to be read (SO_MEMINFO: SK_MEMINFO_RMEM_ALLOC)."""
    found: int = struct.unpack_from("=I", sock.getsockopt(socket.SOL_SOCKET, 55, 36))[0]
    return found


def _fionread_is_true() -> None:
    """Who waits for edges asks it whether to read on, or to wait for an edge that will not come (nginx, for bodies of requests).

    On a socket in the map it tells of TCP's bytes alone, or since some version of those alone that skipped TCP.
    """
    with _listen() as listener, socket.create_connection(_TARGET, _SECONDS) as app, listener.accept()[0] as end:
        end.sendall(bytes(100))
        for left in (100, 60):
            select.select([app], [], [], _SECONDS)
            told = int.from_bytes(fcntl.ioctl(app, termios.FIONREAD, bytes(4)), sys.byteorder)
            if told != left:
                raise _Wrong(f"FIONREAD tells of {told} bytes where {left} wait")
            app.recv(40)


def _redirects(node: attach.Node, cookie: int) -> None:
    before = node.counters(cookie)[Counter.MESSAGES]
    with _listen() as listener, socket.create_connection(_TARGET, _SECONDS) as sock, listener.accept()[0] as end:
        for turn in range(20):
            for one, other in ((sock, end), (end, sock)):
                message = struct.pack("=I", turn) * 300
                one.sendall(message)
                if _read(other, len(message)) != message:
                    raise _Wrong("other bytes arrived")
    if node.counters(cookie)[Counter.MESSAGES] - before != 40:
        raise _Wrong(f"{node.counters(cookie)[Counter.MESSAGES] - before} of 40 messages took the short way")


def main() -> int:
    """Exit code 0 when everything works; the findings are the last line of standard output, JSON."""
    try:
        found = trial(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    except (OSError, _Wrong, loader.LoaderFailed, subprocess.TimeoutExpired) as error:
        said = f"the programs cannot be tried on kernel {os.uname().release}: {error}"
        found = Findings(said, said, said, said)
    print(json.dumps(found._asdict()), flush=True)
    return 1 if any(found) else 0


if __name__ == "__main__":
    sys.exit(main())
