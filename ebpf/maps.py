"""The pinned programs as the agent uses them: `ebpf.pods.Programs` over ebpf.attach. Translates, decides nothing.

The programs of connections hang on one cgroup for the whole node: they find out by the namespace's cookie whose connection it is, so that
no process escapes by sitting in another cgroup than its pod. Only what arrives is attached namespace by namespace.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebpf import attach, bpfsys, layout
from ebpf.layout import PodFlag, PortKind
from ebpf.plan import Entry
from ebpf.redirect import ADMIN_PORT
from ebpf.wire import PodFacts

_IPS_A_FAMILY = layout.OWN_MAX


class PinnedPrograms:
    """Everything raises OSError."""

    def __init__(self, root: Path) -> None:
        self.pins = attach.Pins(root)
        self._node = attach.Node(self.pins)

    def attach_node(self, cgroup: Path) -> None:
        """Hang the programs of connections on a cgroup, or exchange them where they hang already."""
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with _as_os_error():
                self._node.link_cgroup(fd)
        finally:
            os.close(fd)

    def upgrade(self) -> None:
        """The newest programs into all links."""
        with _as_os_error():
            self._node.upgrade()

    def remove_all(self) -> None:
        """Everything of every version: links, programs, maps, folders."""
        self._node.close()
        attach.remove(self.pins.root)

    def remove_older(self) -> None:
        """What versions with other maps than ours have pinned."""
        for version in self.pins.root.iterdir():
            if version != self.pins.folder:
                _remove(version)

    def close(self) -> None:
        """Detaches nothing."""
        self._node.close()

    # --- ebpf.pods.Programs --------------------------------------------------------------------------------------------------

    def seen(self, cookie: int) -> tuple[bool, Entry | None]:
        """See Programs."""
        pod = self._node.pods().get(cookie)
        entry = None
        if pod is not None:
            flags = pod.flags
            entry = Entry(
                capture=PodFlag.CAPTURE in flags,
                accelerate=PodFlag.ACCELERATE in flags,
                nat=PodFlag.TRANSLATED in flags,
                caller=PodFlag.CALLER in flags,
                one_way=PodFlag.ONE_WAY in flags,
            )
        return self._inbound(cookie).exists(), entry

    def steer(self, cookie: int, netns: int) -> None:
        """See Programs."""
        with _as_os_error():
            self._node.link_netns(cookie, netns)

    def unsteer(self, cookie: int) -> None:
        """See Programs."""
        self._node.unlink_netns(cookie)

    def enter(self, cookie: int, entry: Entry, facts: PodFacts) -> None:
        """See Programs."""
        with _as_os_error():
            self._node.write_ports(cookie, PortKind.SKIP_OUTBOUND, facts.skip_outbound)
            self._node.write_ports(cookie, PortKind.SKIP_INBOUND, [(ADMIN_PORT, ADMIN_PORT), *facts.skip_inbound])
            self._node.write_ports(cookie, PortKind.NOT_ACCELERATED, facts.unaccelerated)
            self._node.write_pod(cookie, pod_of(entry, facts))

    def leave(self, cookie: int) -> None:
        """See Programs. Takes the steering away first: without an entry it would refuse what nftables redirects."""
        self._node.forget(cookie)

    def listens(self, cookie: int) -> bool:
        """See Programs."""
        return self._node.has_listener(cookie)

    def set_listener(self, cookie: int, listener: socket.socket) -> None:
        """See Programs."""
        six = listener.family == socket.AF_INET6
        only_v6 = six and bool(listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
        with _as_os_error():
            self._node.set_listener(cookie, listener.fileno(), only_v6=only_v6)

    def gone(self, cookie: int) -> bool:
        """See Programs."""
        return self._node.ended(cookie)

    def counters(self, cookie: int) -> dict[str, int]:
        """See Programs."""
        return {counter.name.lower(): value for counter, value in self._node.counters(cookie).items()}

    def _inbound(self, cookie: int) -> Path:
        return self.pins.pods / str(cookie) / "inbound"


def pod_of(entry: Entry, facts: PodFacts) -> layout.Pod:
    """The value for the programs. RESUME only where somebody vouches for the app: another one could sleep for ever in MSG_WAITALL."""
    flags = PodFlag(0)
    for flag, on in (
        (PodFlag.CAPTURE, entry.capture),
        (PodFlag.ACCELERATE, entry.accelerate),
        (PodFlag.RESUME, entry.accelerate and facts.resume),
        (PodFlag.TRANSLATED, entry.nat),
        (PodFlag.CALLER, entry.caller),
        (PodFlag.ONE_WAY, entry.one_way),
    ):
        if on:
            flags |= flag
    own = [ip for ip in facts.addresses if ":" not in ip][:_IPS_A_FAMILY] + [ip for ip in facts.addresses if ":" in ip][:_IPS_A_FAMILY]
    return layout.Pod(facts.sidecar_uid, flags, facts.outbound_port, facts.inbound_port, tuple(own))


@contextmanager
def _as_os_error() -> Iterator[None]:
    """A full map and unusable settings are trouble with this pod, as what the kernel refuses is."""
    try:
        yield
    except (attach.Full, attach.NotInstalled) as error:
        raise OSError(errno.E2BIG, str(error)) from None
    except bpfsys.VerifierRefused as error:
        said = error.log.strip().rpartition("\n")[2]
        raise OSError(error.errno, f"program {error.name}: {error.strerror}: {said}") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        for entry in list(path.iterdir()):
            _remove(entry)
        path.rmdir()
    else:
        path.unlink()
