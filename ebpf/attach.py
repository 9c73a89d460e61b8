"""The pinned programs of this node, and one pod after the other put under them: links, settings, the sidecar's listener, counters.

Everything a restart needs lies in the bpf file system, below ``<root>/<layout version>/``::

    maps/<name>               shared by all programs; keyed by the cookie of the pod's network namespace
    programs/<name>           for links that come later
    cgroups/<name>/<program>  a link; the program is attached as long as the pin is there
    pods/<cookie>/inbound     the same for a pod's namespace

Once a node: ``loader.install``, ``Node.link_cgroup``. For each pod, in this order, so that nothing passes in between: ports
(``write_ports``), settings (``write_pod``; connect() is captured from here on), ``link_netns``, and its listener (``set_listener``) as soon
as there is one; until then what arrives is refused. Called by the agent and by tests, after ``ebpf.loader`` has been there;
imports neither bcc nor libbpf. Not safe for two writers at once: the agent is alone, by its lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from ebpf import bpfsys, layout
from ebpf.layout import Counter, Pod, PortKind

DEFAULT_ROOT = Path("/sys/fs/bpf/pillion")


SETTLE_S = 0.5
"""From the end of capture to the end of the programs: a handshake over loopback, and the question for the target of a busy sidecar."""


class NotInstalled(OSError):
    """There are no (complete) pins of this layout version; the loader has to run first."""


class Full(OSError):
    """A map has no room for another pod; the pod must be captured in another way, or not start."""


class Pins:
    """Where things lie. root: the folder in a bpf file system that holds all layout versions."""

    def __init__(self, root: Path = DEFAULT_ROOT, version: str = layout.VERSION) -> None:
        self.root = root
        self.folder = root / version
        self.maps = self.folder / "maps"
        self.programs = self.folder / "programs"
        self.cgroups = self.folder / "cgroups"
        self.pods = self.folder / "pods"


class Node:
    """The maps and programs of one layout version, held open. A context manager; closing it detaches nothing."""

    def __init__(self, pins: Pins) -> None:
        self.pins = pins
        self._maps: dict[str, int] = {}
        try:
            for name in (*layout.MAPS, layout.INBOUND_CODE):
                self._maps[name] = bpfsys.pinned(pins.maps / name)
        except FileNotFoundError:
            self.close()
            raise NotInstalled(f"{pins.folder} holds no complete set of maps; run `python -m ebpf.loader --pins {pins.root}`") from None

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the descriptors."""
        for fd in self._maps.values():
            os.close(fd)
        self._maps.clear()

    # --- settings ---

    def write_pod(self, cookie: int, pod: Pod) -> None:
        """Register a namespace, or change its settings, which holds from its next connection on; raises Full, ValueError."""
        self._put("counters", layout.pack_cookie(cookie), layout.zero_counters(), keep=True)
        self._put("pods", layout.pack_cookie(cookie), layout.pack_pod(pod))

    def write_ports(self, cookie: int, kind: PortKind, ranges: Iterable[tuple[int, int]]) -> None:
        """Replace a set of ports, inclusive ranges; an empty one is removed. Raises Full, ValueError."""
        key = layout.pack_port_set_key(cookie, kind)
        value = layout.pack_port_set(ranges)
        if any(value):
            self._put("port_sets", key, value)
        else:
            bpfsys.map_delete(self._maps["port_sets"], key)

    def set_listener(self, cookie: int, fd: int, *, only_v6: bool = False) -> None:
        """Lead inbound connections to this listening socket. The caller closes its descriptor, or the listener outlives the sidecar.

        The kernel drops the entry when the last descriptor closes: connections are refused from then on.
        """
        self._put("listeners", layout.pack_listener_key(cookie, only_v6=only_v6), struct.pack("=Q", fd))

    def has_listener(self, cookie: int) -> bool:
        """Whether somebody takes inbound connections."""
        keys = (layout.pack_listener_key(cookie, only_v6=only_v6) for only_v6 in (False, True))
        return any(bpfsys.map_lookup(self._maps["listeners"], key, 8) is not None for key in keys)

    def pods(self) -> dict[int, Pod]:
        """Every registered namespace by its cookie: after a restart, what is captured already."""
        found = {}
        for key in list(bpfsys.map_keys(self._maps["pods"], 8)):
            value = bpfsys.map_lookup(self._maps["pods"], key, layout.POD_BYTES)
            if value is not None:
                found[layout.unpack_cookie(key)] = layout.unpack_pod(value)
        return found

    def counters(self, cookie: int) -> dict[Counter, int]:
        """What happened in a pod since it was registered; all zero for an unknown one."""
        values = bpfsys.map_lookup_per_cpu(self._maps["counters"], layout.pack_cookie(cookie), layout.COUNTERS_BYTES)
        return layout.unpack_counters(values or [layout.zero_counters()])

    def _put(self, name: str, key: bytes, value: bytes, *, keep: bool = False) -> None:
        update = bpfsys.map_update_per_cpu if name == "counters" else bpfsys.map_update
        try:
            update(self._maps[name], key, value, bpfsys.NOEXIST if keep else bpfsys.ANY)
        except OSError as error:
            if error.errno == errno.EEXIST:
                return
            if error.errno in (errno.E2BIG, errno.ENOMEM):
                raise Full(f"map {name} is full ({bpfsys.map_info(self._maps[name]).max_entries} entries)") from None
            raise

    # --- links ---

    def link_cgroup(self, cgroup_fd: int, name: str = "node") -> None:
        """Attach every cgroup program to a cgroup and all below it; ``name`` is the pins' folder, one for each cgroup.

        One attachment at the root serves all pods: a socket in a namespace that is not registered leaves after one lookup. Links that are
        there already get the newest programs. Raises OSError; then nothing new stays attached.
        """
        folder = self.pins.cgroups / name
        folder.mkdir(parents=True, exist_ok=True)
        made: list[Path] = []
        try:
            for program in layout.CGROUP_PROGRAMS:
                prog_fd = bpfsys.pinned(self.pins.programs / program.name)
                if _put_in(prog_fd, cgroup_fd, program, folder / program.name):
                    made.append(folder / program.name)
        except OSError:
            for path in made:
                path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
            raise

    def link_netns(self, cookie: int, netns_fd: int) -> None:
        """Attach the inbound program to a pod's namespace; what arrives is refused until there is a listener.

        A link that is there already gets the newest program. Raises OSError, VerifierRefused.
        """
        folder = self.pins.pods / str(cookie)
        prog_fd = self._inbound(cookie)
        folder.mkdir(exist_ok=True)
        try:
            _put_in(prog_fd, netns_fd, _INBOUND, folder / _INBOUND.name)
        except OSError:
            if not any(folder.iterdir()):
                folder.rmdir()
            raise

    def _inbound(self, cookie: int) -> int:
        value = bpfsys.map_lookup(self._maps[layout.INBOUND_CODE], bytes(4), layout.INBOUND_CODE_BYTES) or bytes(8)
        length = struct.unpack_from("=Q", value)[0]
        if not length:
            raise NotInstalled("this kernel refused the program of inbound connections when it was loaded")
        code = layout.relocate_maps(value[8 : 8 + length], {number: self._maps[name] for number, name in enumerate(layout.MAPS)})
        return bpfsys.prog_load("inbound", 30, layout.relocate_cookie(code, cookie), 36)

    def linked(self) -> set[int]:
        """The cookies of all namespaces that the inbound program is attached to, ended ones included."""
        return {int(path.name) for path in self.pins.pods.iterdir()}

    def ended(self, cookie: int) -> bool:
        """Whether the linked namespace is gone, and with it everything in it; False for one that was never linked."""
        try:
            fd = bpfsys.pinned(self.pins.pods / str(cookie) / _INBOUND.name)
        except FileNotFoundError:
            return False
        try:
            return bpfsys.link_netns_inode(fd) == 0
        finally:
            os.close(fd)

    def upgrade(self) -> None:
        """Put the newest programs into every link that exists, one exchange each, without a moment in between."""
        for folder in self.pins.cgroups.iterdir():
            for program in layout.CGROUP_PROGRAMS:
                if (folder / program.name).exists():
                    _put_in(bpfsys.pinned(self.pins.programs / program.name), -1, program, folder / program.name)
        for cookie in self.linked():
            if not self.ended(cookie):
                _put_in(self._inbound(cookie), -1, _INBOUND, self.pins.pods / str(cookie) / _INBOUND.name)

    def unlink_netns(self, cookie: int) -> None:
        """Detach from a pod's namespace: what arrives reaches the app's own listeners again. Open connections go on."""
        _detach(self.pins.pods / str(cookie))

    def forget(self, cookie: int) -> None:
        """Detach, and remove every trace of a pod."""
        self.unlink_netns(cookie)
        for only_v6 in (False, True):
            bpfsys.map_delete(self._maps["listeners"], layout.pack_listener_key(cookie, only_v6=only_v6))
        for kind in PortKind:
            bpfsys.map_delete(self._maps["port_sets"], layout.pack_port_set_key(cookie, kind))
        for name in ("pods", "counters"):
            bpfsys.map_delete(self._maps[name], layout.pack_cookie(cookie))


_INBOUND = next(program for program in layout.PROGRAMS if program.target == "netns")


def _put_in(prog_fd: int, target_fd: int, program: layout.Program, path: Path) -> bool:
    """Give a program, whose descriptor is closed here, to the pinned link, or make and pin a new one; returns whether it is new."""
    try:
        link_fd = bpfsys.pinned(path) if path.exists() else bpfsys.link_create(prog_fd, target_fd, program.attach_type)
        try:
            if path.exists():
                bpfsys.link_update(link_fd, prog_fd)
                return False
            bpfsys.pin(link_fd, path)
            return True
        finally:
            os.close(link_fd)
    finally:
        os.close(prog_fd)


def prepare(root: Path) -> bool:
    """Make sure that ``root`` can hold pins: mount a bpf file system at its parent when there is none. Returns whether it was mounted."""
    if bpfsys.is_bpffs(root.parent):
        root.mkdir(mode=0o700, exist_ok=True)
        return False
    root.parent.mkdir(parents=True, exist_ok=True)
    bpfsys.mount_bpffs(root.parent)
    root.mkdir(mode=0o700)
    return True


def remove(root: Path) -> None:
    """Detach everything of every layout version and leave nothing pinned; takes SETTLE_S where programs hang on a cgroup.

    Capture ends first, everywhere. Connections that were led to a sidecar a moment ago get their time to be paired and to be asked for
    their target; without that the sidecar would refuse them.
    """
    if not root.exists():
        return
    for version in root.iterdir():
        _detach(version / "pods")
        if _stop_capturing(version):
            time.sleep(SETTLE_S)
        _detach(version / "cgroups")
    _remove(root)


def _stop_capturing(version: Path) -> bool:
    """Forget every pod; returns whether somebody's connect() may be half done."""
    with contextlib.suppress(OSError):  # whatever another version calls pods; its links go in any case
        fd = bpfsys.pinned(version / "maps" / "pods")
        try:
            for key in list(bpfsys.map_keys(fd, bpfsys.map_info(fd).key_bytes)):
                bpfsys.map_delete(fd, key)
        finally:
            os.close(fd)
    return (version / "cgroups").is_dir() and any((version / "cgroups").iterdir())


def _detach(path: Path) -> None:
    """Detach every link below, now, and remove its pin.

    Removing the pin alone detaches when a kernel worker finds the time. Until then the inbound program of a pod that is forgotten already
    refuses what nftables redirects.
    """
    for pin in [path, *path.rglob("*")] if path.exists() else []:
        if pin.is_file():
            fd = bpfsys.pinned(pin)
            try:
                with contextlib.suppress(OSError):  # its namespace or cgroup has ended
                    bpfsys.link_detach(fd)
            finally:
                os.close(fd)
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            _remove(entry)
        path.rmdir()
    elif path.exists():
        path.unlink()
