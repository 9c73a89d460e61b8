"""What the agent learns from /proc about a pod, and takes from its processes: network namespace, cookie, the sidecar's listener.

Needs CAP_SYS_PTRACE (to read other users' /proc/PID/ns, and for pidfd_getfd) and CAP_SYS_ADMIN (to enter a namespace); the agent
must see the pods' processes (``hostPID: true``). Decides nothing. Called by ebpf.pods and ebpf.cluster_pods. Linux only.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from ebpf import bpfsys

T = TypeVar("T")

PROC = "/proc"
_SO_NETNS_COOKIE = 71
_SO_PROTOCOL = 38
_LISTEN = "0A"
_DESCRIPTORS = 1024  # a sidecar binds its ports before anything else


def inside(netns: int, work: Callable[[], T]) -> T:
    """Run ``work`` in a network namespace; sockets and processes it makes stay there."""
    with bpfsys.in_netns(netns):
        return work()


def cookie_of(sock: socket.socket) -> int:
    """The network namespace of a socket, as BPF programs name it. Raises OSError before Linux 5.14."""
    found: int = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
    return found


def own_addresses() -> list[str]:
    """The global addresses of the calling thread's network namespace, IPv4 first; loopback and link-local ones are not among them."""
    found: list[str] = []
    with open(f"{PROC}/thread-self/net/fib_trie", encoding="ascii") as file:
        leaf = ""
        for line in file:
            words = line.split()
            if words[:1] == ["|--"]:
                leaf = words[1]
            elif words[:3] == ["/32", "host", "LOCAL"] and not leaf.startswith("127.") and leaf not in found:
                found.append(leaf)
    try:
        with open(f"{PROC}/thread-self/net/if_inet6", encoding="ascii") as file:
            for line in file:
                words = line.split()
                if words[3] == "00":  # RT_SCOPE_UNIVERSE
                    found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0])))
    except OSError:
        pass  # the kernel has no IPv6
    return found


def inode_of(netns: int) -> int:
    """What ``/proc/PID/ns/net`` shows between brackets."""
    return os.fstat(netns).st_ino


def pids() -> Iterator[int]:
    """Every process."""
    for entry in os.scandir(PROC):
        if entry.name.isdigit():
            yield int(entry.name)


def netns_inode(pid: int) -> int:
    """The namespace a process is in, 0 when it ended or must not be looked at."""
    try:
        return int(os.readlink(f"{PROC}/{pid}/ns/net").partition("[")[2].rstrip("]") or 0)
    except (OSError, ValueError):
        return 0


def open_netns(pid: int) -> int:
    """A descriptor of a process's network namespace; raises OSError."""
    return os.open(f"{PROC}/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def members(inode: int) -> list[int]:
    """The processes in a network namespace."""
    return [pid for pid in pids() if netns_inode(pid) == inode]


def members_of_pods(uids: Collection[str]) -> dict[str, list[int]]:
    """The processes of Kubernetes pods, by the ``pod<uid>`` in their cgroup (both of the kubelet's drivers), of any hierarchy.

    The oldest first: that is the sandbox's own, in the pod's network namespace. An app may make namespaces of its own, and pids come
    around. One look at every process, however many pods are asked for.
    """
    names = {name.encode(): uid for uid in uids for name in (f"pod{uid}", f"pod{uid.replace('-', '_')}")}
    found: dict[str, list[int]] = {uid: [] for uid in uids}
    for pid in pids():
        try:
            with open(f"{PROC}/{pid}/cgroup", "rb") as file:
                text = file.read(4096)
        except OSError:
            continue
        if (uid := next((uid for name, uid in names.items() if name in text), None)) is not None:
            found[uid].append(pid)
    return {uid: sorted(members, key=started) for uid, members in found.items()}


def started(pid: int) -> tuple[int, int]:
    """Sorts processes by their age: clock ticks from the machine's start to theirs (proc(5), stat), then the pid. Ended ones come last."""
    try:
        with open(f"{PROC}/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19]), pid  # the name before it may hold anything
    except (OSError, ValueError, IndexError):
        return 1 << 62, pid


def uid_of(pid: int) -> int:
    """Effective uid of a process, -1 when it ended."""
    try:
        with open(f"{PROC}/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("Uid:"):
                    return int(line.split()[2])
    except OSError:
        pass
    return -1


def listening(pid: int, port: int, uid: int) -> set[int]:
    """Inodes of the sockets of user ``uid`` that listen on ``port`` in the namespace of a process."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            with open(f"{PROC}/{pid}/net/{table}", encoding="ascii", errors="replace") as file:
                rows = file.readlines()[1:]
        except OSError:
            continue
        for row in rows:
            words = row.split()
            if len(words) > 9 and words[3] == _LISTEN and words[1].endswith(f":{port:04X}") and words[7] == str(uid):
                found.add(int(words[9]))
    return found


def take_listeners(pid: int, port: int, uid: int, cookie: int) -> list[socket.socket]:
    """Copies of what a process listens with on ``port``: our descriptors, its sockets. Close them soon, they keep the port taken.

    Only sockets of that user in that namespace (by its cookie, asked of the socket itself) are taken. Raises OSError when the kernel
    does not let us (PermissionError: no CAP_SYS_PTRACE).
    """
    wanted = listening(pid, port, uid)
    if not wanted:
        return []
    taken: list[socket.socket] = []
    pidfd = os.pidfd_open(pid)
    try:
        for number in range(_DESCRIPTORS):  # listing /proc/PID/fd would need one capability more (DAC_READ_SEARCH)
            try:
                fd = bpfsys.take_fd(pidfd, number)
            except OSError as error:
                if error.errno == errno.EBADF:
                    continue
                raise
            status = os.fstat(fd)
            if not stat.S_ISSOCK(status.st_mode) or status.st_ino not in wanted:
                os.close(fd)
                continue
            sock = socket.socket(fileno=fd)
            if _is_listener(sock, port, cookie):
                taken.append(sock)
            else:
                sock.close()
            wanted.discard(status.st_ino)
            if not wanted:
                break
    except BaseException:
        for sock in taken:
            sock.close()
        raise
    finally:
        os.close(pidfd)
    return taken


def _is_listener(sock: socket.socket, port: int, cookie: int) -> bool:
    """The number may mean another file by now: look at what we really got."""
    try:
        return bool(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            and sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) == socket.IPPROTO_TCP
            and sock.getsockname()[1] == port
            and cookie_of(sock) == cookie
        )
    except OSError:
        return False
