"""Simulated sidecars: each a mutually authenticated connection from its pod's own address that subscribes like a real one.

They keep nothing but the time at which each subject last changed for them, so that thousands fit into one process.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

import trio
from OpenSSL import SSL

from bench.scale import objects
from bench.scale.objects import Size
from core.alpn import POLICY
from core.credentials import Credentials
from core.names import WorkloadId
from core.runtime.tls import TlsStream, client_context
from policy import wire

CONTROLLER = WorkloadId("cluster.local", "pillion", "pillion-policy")


@dataclass
class Fleet:
    """All sidecars. told: (sidecar, subject) -> when its newest state arrived, seconds of trio's clock. messages, bytes: received."""

    port: int
    size: Size
    told: dict[tuple[int, str], float] = field(default_factory=dict)
    messages: int = 0
    received: int = 0
    lost: int = 0
    interested: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._changed = trio.lowlevel.ParkingLot()

    async def run(self, credentials: dict[str, Credentials], nursery: trio.Nursery) -> None:
        """Start every sidecar, a hundred at a time, and return when each was told everything it asked for."""
        contexts = {name: client_context(found, found.bundle_pem, (POLICY,)) for name, found in credentials.items()}
        limit = trio.CapacityLimiter(100)
        step = self.size.pods // self.size.sidecars
        for number in range(self.size.sidecars):
            nursery.start_soon(self._sidecar, number, number * step, contexts, limit)
        await self.wait(self._everything())

    def _everything(self) -> set[tuple[int, str]]:
        return {(number, subject) for number in range(self.size.sidecars) for subject in self.subjects(number)}

    def subjects(self, number: int) -> list[str]:
        """What a sidecar subscribes to: its port, four Services of its own, and the one that everybody uses."""
        services = [(number * 7 + offset * 13) % self.size.services for offset in range(4)]
        return [f"port:{objects.PORT}", objects.POPULAR, *dict.fromkeys(f"{objects.vip_of(service)}:80" for service in services)]

    async def wait(self, expected: set[tuple[int, str]], since: float = -1.0) -> None:
        """Until every one of these was told something after ``since``."""
        missing = expected
        while True:
            missing = {key for key in missing if self.told.get(key, -2.0) < since}
            if not missing:
                return
            await self._changed.park()

    async def _sidecar(self, number: int, pod: int, contexts: dict[str, SSL.Context], limit: trio.CapacityLimiter) -> None:
        service, member = divmod(pod, self.size.pods_each)
        namespace = objects.namespace_of(service // self.size.services_each)
        for subject in self.subjects(number):
            name = subject if not subject.startswith("port:") else f"port:{service}"
            self.interested.setdefault(name, set()).add(number)
        async with limit:
            stream = await self._connect(objects.ip_of(pod), contexts[namespace])
            hello = wire.encode(wire.Hello(namespace, f"svc-{service}-0-{member}", "bench"))
            for subject in self.subjects(number):
                port = subject.startswith("port:")
                hello += wire.encode(wire.WatchPort(objects.PORT) if port else wire.WatchDestination(subject))
            await stream.send_all(hello)
        await self._read(number, stream)

    async def _connect(self, ip: str, context: SSL.Context) -> TlsStream:
        sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind((ip, 0))
        await sock.connect(("127.0.0.1", self.port))
        stream = TlsStream.client(trio.SocketStream(sock), context, CONTROLLER.server_name, CONTROLLER)
        await stream.do_handshake()
        return stream

    async def _read(self, number: int, stream: TlsStream) -> None:
        buffer = b""
        try:
            while data := await stream.receive_some(262_144):
                self.received += len(data)
                *lines, buffer = (buffer + bytes(data)).split(b"\n")
                now = trio.current_time()
                for line in lines:
                    self._take(number, line, now)
                self._changed.unpark_all()
        except trio.BrokenResourceError:
            pass
        self.lost += 1

    def _take(self, number: int, line: bytes, now: float) -> None:
        """Only the subject is read: a real sidecar's own work is not what is measured here."""
        self.messages += 1
        if line.startswith(b'{"type":"destination","addr":"'):
            subject = line[30 : line.index(b'"', 30)].decode()
        elif line.startswith(b'{"type":"port-policy"'):
            subject = f"port:{objects.PORT}"
        else:
            raise AssertionError(f"the controller said {line[:200]!r}")
        self.told[number, subject] = now
