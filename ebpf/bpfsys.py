"""The bpf(2) system call and its neighbours, through ctypes: maps, programs, links, pins, namespaces. No libbpf, no bcc, no state.

Small enough for the resident agent and for tests; what it moves are bytes, which ``layout`` describes. Every failure is an OSError with
the kernel's errno; a refused program is :class:`VerifierRefused`, which carries the verifier's log. Needs CAP_BPF and CAP_NET_ADMIN.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_LIBC = ctypes.CDLL(None, use_errno=True)
_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_PIDFD_GETFD = 438
_ATTR_BYTES = 144
_SO_NETNS_COOKIE = 71
_CLONE_NEWNET = 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_BPF_FS_MAGIC = 0xCAFE4A11
_LOG_BYTES = 1 << 20

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT = 0, 1, 2, 3, 4
_PROG_LOAD, _OBJ_PIN, _OBJ_GET, _PROG_ATTACH = 5, 6, 7, 8
_PROG_QUERY = 16
_PROG_NEXT_ID, _MAP_NEXT_ID, _INFO, _LINK_CREATE, _LINK_UPDATE, _LINK_NEXT_ID, _LINK_DETACH = 11, 12, 15, 28, 29, 31, 34
_ID_COMMANDS = {"prog": _PROG_NEXT_ID, "map": _MAP_NEXT_ID, "link": _LINK_NEXT_ID}

ANY, NOEXIST = 0, 1
ARRAY = 2
"""enum bpf_map_type"""


class VerifierRefused(OSError):
    """The kernel will not run a program. name: the program's; log: what the verifier said, the reason in its last lines."""

    def __init__(self, code: int, name: str, log: str) -> None:
        super().__init__(code, os.strerror(code))
        self.name = name
        self.log = log


class MapInfo(NamedTuple):
    """What the kernel says about a map (struct bpf_map_info)."""

    kind: int
    ident: int
    key_bytes: int
    value_bytes: int
    max_entries: int
    name: str


def _bpf(command: int, attr: bytes) -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"no number of the bpf system call is known for {platform.machine()}")
    buffer = ctypes.create_string_buffer(attr.ljust(_ATTR_BYTES, b"\0"), _ATTR_BYTES)
    result: int = _LIBC.syscall(number, command, buffer, _ATTR_BYTES)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _at(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))


# --- maps ---------------------------------------------------------------------------------------------------------------------------


def map_create(kind: int, key_bytes: int, value_bytes: int, max_entries: int, name: str) -> int:
    """A new map's descriptor; only for kinds that need no type information."""
    return _bpf(
        _MAP_CREATE,
        struct.pack("=IIIIII4x", kind, key_bytes, value_bytes, max_entries, 0, 0)[:24] + struct.pack("=I16s", 0, name.encode()[:15]),
    )


def map_lookup(fd: int, key: bytes, value_bytes: int) -> bytes | None:
    """The value of a key, None when it is not there."""
    k, v = _buffer(key), ctypes.create_string_buffer(value_bytes)
    try:
        _bpf(_MAP_LOOKUP, struct.pack("=I4xQQQ", fd, _at(k), _at(v), 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return v.raw


def map_lookup_per_cpu(fd: int, key: bytes, value_bytes: int) -> list[bytes] | None:
    """The values of a key in a per-processor map, one for each possible processor."""
    each = -(-value_bytes // 8) * 8
    raw = map_lookup(fd, key, each * possible_cpus())
    return None if raw is None else [raw[at : at + value_bytes] for at in range(0, len(raw), each)]


def map_update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Set a key; E2BIG means the map is full."""
    k, v = _buffer(key), _buffer(value)
    _bpf(_MAP_UPDATE, struct.pack("=I4xQQQ", fd, _at(k), _at(v), flags))


def map_update_per_cpu(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Set a key to the same value on every processor."""
    each = -(-len(value) // 8) * 8
    map_update(fd, key, value.ljust(each, b"\0") * possible_cpus(), flags)


def map_delete(fd: int, key: bytes) -> bool:
    """Remove a key; False when it was not there."""
    k = _buffer(key)
    try:
        _bpf(_MAP_DELETE, struct.pack("=I4xQQQ", fd, _at(k), 0, 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def map_keys(fd: int, key_bytes: int) -> Iterator[bytes]:
    """Every key. A map that changes meanwhile may yield one twice or not at all."""
    following = ctypes.create_string_buffer(key_bytes)
    current: ctypes.Array[ctypes.c_char] | None = None
    while True:
        try:
            _bpf(_MAP_NEXT, struct.pack("=I4xQQQ", fd, _at(current) if current else 0, _at(following), 0))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        yield following.raw
        current = _buffer(following.raw)


def possible_cpus() -> int:
    """How many values a per-processor map returns for a key."""
    last = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip().split(",")[-1].split("-")[-1]
    return int(last) + 1


# --- programs, links, pins ----------------------------------------------------------------------------------------------------------


def prog_load(name: str, prog_type: int, code: bytes, attach_type: int = 0) -> int:
    """Load bytecode; its descriptor. Raises VerifierRefused, whose log is fetched by a second try."""
    instructions, license_ = _buffer(code), _buffer(b"GPL\0")

    def load(level: int, log: ctypes.Array[ctypes.c_char] | None) -> int:
        head = struct.pack("=IIQQ", prog_type, len(code) // 8, _at(instructions), _at(license_))
        logs = struct.pack("=IIQ", level, len(log) if log else 0, _at(log) if log else 0)
        return _bpf(_PROG_LOAD, head + logs + struct.pack("=II16sII", 0, 0, name.encode()[:15], 0, attach_type))

    try:
        return load(0, None)
    except OSError as error:
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:
            return load(1, log)
        except OSError:
            raise VerifierRefused(error.errno or errno.EINVAL, name, log.value.decode(errors="replace").strip()) from None


def prog_attach(target_fd: int, prog_fd: int, attach_type: int) -> None:
    """The old way of attaching, for maps of sockets: it lives as long as the map, and a second call replaces the program."""
    _bpf(_PROG_ATTACH, struct.pack("=IIII", target_fd, prog_fd, attach_type, 0))


def link_create(prog_fd: int, target_fd: int, attach_type: int) -> int:
    """Attach to a cgroup or a network namespace; ends with the last descriptor or pin of the returned link."""
    return _bpf(_LINK_CREATE, struct.pack("=IIII", prog_fd, target_fd, attach_type, 0))


def link_update(link_fd: int, prog_fd: int) -> None:
    """Put another program into a link, without a moment in between."""
    _bpf(_LINK_UPDATE, struct.pack("=IIII", link_fd, prog_fd, 0, 0))


def link_detach(link_fd: int) -> None:
    """Detach although somebody else holds the link too."""
    _bpf(_LINK_DETACH, struct.pack("=I", link_fd))


def link_netns_inode(link_fd: int) -> int:
    """The namespace that a link is attached to, as its inode number; 0 once the namespace has ended."""
    info = ctypes.create_string_buffer(64)
    _bpf(_INFO, struct.pack("=IIQ", link_fd, len(info), _at(info)))
    inode: int = struct.unpack_from("=I", info.raw, 16)[0]
    return inode


def pin(fd: int, path: Path) -> None:
    """Keep an object alive under a name in a bpf file system; the folder must exist."""
    name = _buffer(os.fsencode(path) + b"\0")
    _bpf(_OBJ_PIN, struct.pack("=QI", _at(name), fd))


def pinned(path: Path) -> int:
    """A descriptor of a pinned object; FileNotFoundError when there is none."""
    name = _buffer(os.fsencode(path) + b"\0")
    return _bpf(_OBJ_GET, struct.pack("=QI", _at(name), 0))


def map_info(fd: int) -> MapInfo:
    """Sizes and name of a map."""
    info = ctypes.create_string_buffer(88)
    _bpf(_INFO, struct.pack("=IIQ", fd, len(info), _at(info)))
    kind, ident, key, value, entries, _flags, name = struct.unpack_from("=IIIIII16s", info.raw)
    return MapInfo(kind, ident, key, value, entries, name.rstrip(b"\0").decode())


def attached(target_fd: int, attach_type: int) -> int:
    """How many programs of an attach type a cgroup has (its own, without those of its parents), or a network namespace."""
    attr = _buffer(struct.pack("=II", target_fd, attach_type).ljust(_ATTR_BYTES, b"\0"))
    if _LIBC.syscall(_SYSCALL[platform.machine()], _PROG_QUERY, attr, _ATTR_BYTES) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    count: int = struct.unpack_from("=I", attr.raw, 24)[0]
    return count


def object_id(fd: int) -> int:
    """The id of a map, program or link, by any descriptor of it."""
    info = ctypes.create_string_buffer(16)
    _bpf(_INFO, struct.pack("=IIQ", fd, len(info), _at(info)))
    ident: int = struct.unpack_from("=I", info.raw, 4)[0]
    return ident


def ids(kind: str) -> set[int]:
    """The ids of all objects of a kind in this kernel: prog, map or link. Needs CAP_SYS_ADMIN."""
    found: set[int] = set()
    last = 0
    while True:
        attr = _buffer(struct.pack("=III", last, 0, 0).ljust(_ATTR_BYTES, b"\0"))
        if _LIBC.syscall(_SYSCALL[platform.machine()], _ID_COMMANDS[kind], attr, _ATTR_BYTES) < 0:
            code = ctypes.get_errno()
            if code == errno.ENOENT:
                return found
            raise OSError(code, os.strerror(code))
        last = struct.unpack_from("=II", attr.raw)[1]
        found.add(last)


# --- file systems, namespaces, processes ----------------------------------------------------------------------------------------------


def is_bpffs(path: Path) -> bool:
    """Whether a folder lies in a bpf file system."""
    statfs = ctypes.create_string_buffer(256)
    if _LIBC.statfs(os.fsencode(path), statfs) != 0:
        return False
    magic: int = struct.unpack_from("=Q", statfs.raw)[0]
    return magic == _BPF_FS_MAGIC


def mount_bpffs(path: Path) -> None:
    """Mount a bpf file system at an existing folder, for root only."""
    if _LIBC.mount(b"bpf", os.fsencode(path), b"bpf", ctypes.c_ulong(0), b"mode=0700") != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mounting a bpf file system at {path}: {os.strerror(code)}")


def unmount(path: Path) -> None:
    """Undo a mount; lazily, because descriptors into it may be open."""
    if _LIBC.umount2(os.fsencode(path), 2) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unmounting {path}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Leave namespaces for new ones (unshare(2))."""
    if _LIBC.unshare(flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"making namespaces: {os.strerror(code)}")


def make_mounts_private() -> None:
    """What is mounted from now on in this mount namespace stays in it, and ends with it."""
    if _LIBC.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"making mounts private: {os.strerror(code)}")


def cgroup2() -> Path | None:
    """Where the unified cgroup hierarchy is mounted (also beside version 1, "hybrid"), None when it is not."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _source, where, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(where.encode().decode("unicode_escape"))
    return None


@contextmanager
def in_netns(netns_fd: int) -> Iterator[None]:
    """Run the calling thread in another network namespace for a moment. Nothing may be awaited inside."""
    with open("/proc/thread-self/ns/net", "rb") as home:
        enter_netns(netns_fd)
        try:
            yield
        finally:
            enter_netns(home.fileno())


def enter_netns(fd: int) -> None:
    """Take the calling thread into another network namespace for good."""
    if _LIBC.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"entering a network namespace: {os.strerror(code)}")


def netns_cookie(netns_fd: int | None = None) -> int:
    """The cookie of a network namespace (SO_NETNS_COOKIE, Linux 5.14), of the caller's own without an argument."""
    if netns_fd is None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            cookie: int = struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
            return cookie
    with in_netns(netns_fd):
        return netns_cookie()


def take_fd(pidfd: int, fd: int) -> int:
    """A copy of another process's descriptor (pidfd_getfd, Linux 5.6); needs ptrace rights over it (CAP_SYS_PTRACE)."""
    result: int = _LIBC.syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
