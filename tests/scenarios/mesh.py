"""Two sidecars in one process over loopback: everything real but the redirect and the controller.

What nftables would do is done by hand: a connection is given to a sidecar together with the address it "dialled". What the controller
would say is put into cells. Keys, TLS, engines, relay and sockets are the real ones.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog
import trio

from core.addrs import Addr, ClientAddr, ListenAddr, OriginalDst
from core.names import WorkloadId, parse_workload_id
from core.refs import Ref, default_ref
from core.runtime import logs
from core.runtime.sockets import RawStream
from core.runtime.watch import Cell
from policy.wire import Anyone, Authorization, Destination, Endpoint, InboundPolicy, Meshed, Network, Protocol
from proxy.app import Sidecar
from proxy.config import load_config
from proxy.telemetry.metrics import Direction
from proxy.transport.accept import Accepted
from tests.certs import Authority

EVERYWHERE = (Network("0.0.0.0/0"), Network("::/0"))
ANYONE = Authorization(default_ref("all-unauthenticated"), EVERYWHERE, Anyone())
WEB = parse_workload_id("spiffe://cluster.local/ns/shop/sa/web")
CART = parse_workload_id("spiffe://cluster.local/ns/shop/sa/cart")
VIP = OriginalDst(Addr("10.96.0.10", 80))
APP_PORT = 8080  # what peers dial; the app itself listens on a port of the kernel's choice


def only(*identities: WorkloadId | str) -> Authorization:
    """Lets in exactly these identities."""
    return Authorization(Ref("policy.pillion.dev", "AuthorizationPolicy", "shop", "only"), EVERYWHERE, Meshed(tuple(map(str, identities))))


def inbound_policy(*authorizations: Authorization, protocol: Protocol = "detect", **more: object) -> InboundPolicy:
    return InboundPolicy(Ref("policy.pillion.dev", "Server", "shop", "web"), protocol, authorizations, **more)


FOR_CART = inbound_policy(only(CART))


class Controller:
    """A policy source whose answers a test sets."""

    def __init__(self) -> None:
        self.ports: dict[int, Cell[InboundPolicy | None]] = {}
        self.destinations: dict[str, Cell[Destination | None]] = {}
        self.forgotten: list[str] = []

    def watch_port(self, port: int) -> Cell[InboundPolicy | None]:
        return self.ports.setdefault(port, Cell(None))

    def forget_port(self, port: int) -> None:
        self.ports.pop(port, None)

    def watch_destination(self, addr: str) -> Cell[Destination | None]:
        return self.destinations.setdefault(addr, Cell(None))

    def forget_destination(self, addr: str) -> None:
        self.forgotten.append(addr)


class Peer:
    """A pod of the server's workload: a port whose connections are redirected to the server's sidecar. accepted: how many there were."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.addr = Addr(*self.listener.getsockname())
        self.accepted = 0
        self.scope = trio.CancelScope()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(str(self.addr), WEB.uri)

    def leave(self) -> None:
        """Refuse connections from now on; the open ones live."""
        self.scope.cancel()
        self.listener.close()


class Mesh:
    """A client pod with a sidecar, a server pod with a sidecar, an app behind the latter.

    client, server: the sidecars. app: where the app listens.
    """

    def __init__(self, client: Sidecar, server: Sidecar, app: Addr, nursery: trio.Nursery, logged: list[str]) -> None:
        self.client = client
        self.server = server
        self.app = app
        self._nursery = nursery
        self._logged = logged
        self.peer = self.add_peer().addr

    def add_peer(self, app: Addr | None = None) -> Peer:
        """One more pod; it is no endpoint until `destination` says so. app: of its own, None for the one that all share."""
        peer = Peer()
        if app is not None:
            self.server_controller.watch_port(app.port).set(FOR_CART)

        def give(sock: socket.socket) -> None:
            peer.accepted += 1
            self.give_to_server(sock, app)

        self._nursery.start_soon(self._redirect, peer.listener, give, peer.scope)
        return peer

    def give_to_server(self, sock: socket.socket, app: Addr | None = None) -> None:
        self.server.intake.serve_inbound(Accepted(RawStream(sock), _client_of(sock), OriginalDst(app or self.app)))

    def policy(self, policy: InboundPolicy | None) -> None:
        """What the controller says about the app's port."""
        self.server_controller.watch_port(self.app.port).set(policy)

    def destination(self, *endpoints: Endpoint, protocol: Protocol = "detect", kind: str = "service") -> None:
        """What the controller says about the VIP; by default the one meshed endpoint."""
        found = endpoints or (Endpoint(str(self.peer), WEB.uri),)
        destination = Destination(kind, Ref("", "Service", "shop", "web"), protocol, found)
        self.client_controller.watch_destination(str(VIP)).set(destination)

    def nowhere(self) -> None:
        """The controller knows the Service, and that it has no ready endpoint."""
        destination = Destination("service", Ref("", "Service", "shop", "web"), "detect")
        self.client_controller.watch_destination(str(VIP)).set(destination)

    client_controller: Controller
    server_controller: Controller

    async def dial(self, dst: OriginalDst = VIP) -> trio.SocketStream:
        """The client app connects to ``dst``; the redirect gives the connection to its sidecar."""
        near, far = tcp_pair()
        self.client.intake.take_outbound(Accepted(RawStream(far), _client_of(far), dst))
        return app_stream(near)

    async def dial_with_reversed_target(self) -> trio.SocketStream:
        """The client app connects, and the kernel names the app itself as what it dialled."""
        near, far = tcp_pair()
        client = _client_of(far)
        self.client.intake.take_outbound(Accepted(RawStream(far), client, OriginalDst(client)))
        return app_stream(near)

    async def dial_unmeshed(self) -> trio.SocketStream:
        """A pod without a sidecar dials the app; the redirect at the server gives the connection to its sidecar."""
        return app_stream(self.dial_server())

    def dial_server(self) -> socket.socket:
        """The same, for callers that speak for themselves."""
        near, far = tcp_pair()
        self.give_to_server(far)
        return near

    @asynccontextmanager
    async def entry(self, dst: OriginalDst = VIP) -> AsyncIterator[Addr]:
        """A port on loopback whose connections are redirected to the client's sidecar: for real clients such as curl."""
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)

        def give(sock: socket.socket) -> None:
            self.client.intake.take_outbound(Accepted(RawStream(sock), _client_of(sock), dst))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._redirect, listener, give)
            yield Addr(*listener.getsockname())
            nursery.cancel_scope.cancel()

    async def _redirect(
        self, listener: socket.socket, give: Callable[[socket.socket], None], scope: trio.CancelScope | None = None
    ) -> None:
        with listener, scope or trio.CancelScope():
            while True:
                await trio.lowlevel.wait_readable(listener)
                if listener.fileno() < 0:
                    return  # closed by `leave` when the next connection was there already
                sock, _ = listener.accept()
                _sockets.append(sock)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                give(sock)

    def log(self, event: str = "") -> list[dict[str, object]]:
        """What both sidecars logged so far; with event only the lines that contain it."""
        return [line for line in map(json.loads, self._logged) if event in line["event"]]

    def forgive(self) -> None:
        """The test meant the errors that were logged so far."""
        self._logged.clear()

    def metric(self, side: Sidecar, name: str, **labels: str) -> float:
        """The sum of all samples of this name whose labels include these."""
        from prometheus_client.parser import text_string_to_metric_families

        text = side.metrics.render().decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


_sockets: list[socket.socket] = []  # of tests; a client that a test just drops would be reported as a leak of ours


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    _sockets.extend((near, far))
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def app_stream(sock: socket.socket) -> trio.SocketStream:
    sock.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def _client_of(sock: socket.socket) -> ClientAddr:
    return ClientAddr(Addr("10.1.0.5", sock.getpeername()[1]))  # as seen from another pod: loopback would be let in by default


def _config(identity: WorkloadId, environ: dict[str, str]):
    return load_config(
        {
            "PILLION_POD_NAMESPACE": identity.namespace,
            "PILLION_SERVICE_ACCOUNT": identity.service_account,
            "PILLION_POD_NAME": f"{identity.service_account}-0",
            "PILLION_POD_IPS": "10.1.0.9",
            "PILLION_IDENTITY_ADDR": "127.0.0.1:1",
            "PILLION_IDENTITY_TOKEN_FILE": "/nonexistent",
            "PILLION_TRUST_ANCHORS_FILE": "/nonexistent",
            "PILLION_POLICY_ADDR": "127.0.0.1:1",
            **environ,
        }
    )


@asynccontextmanager
async def _closing_sockets() -> AsyncIterator[None]:
    try:
        yield
    finally:
        while _sockets:
            _sockets.pop().close()


@asynccontextmanager
async def _resetting_logs() -> AsyncIterator[None]:
    """Whoever tests what is printed comes after us, perhaps."""
    try:
        yield
    finally:
        structlog.reset_defaults()
        logs.set_level("info")


@asynccontextmanager
async def mesh(
    serve_app: Callable[[trio.SocketStream], Awaitable[None]] | Addr,
    *,
    authority: Authority | None = None,
    policy: InboundPolicy | None = FOR_CART,
    **environ: str,
) -> AsyncIterator[Mesh]:
    """A running mesh around an app: a handler of connections, or the address of a real server.

    policy: of the app's port; None: the controller never says anything about it. environ: settings of both sidecars.
    """
    authority = authority or Authority()
    logged: list[str] = []
    logs.configure("debug", "json", logged.append)
    async with _closing_sockets(), _resetting_logs(), trio.open_nursery() as nursery:
        if isinstance(serve_app, Addr):
            app = serve_app
        else:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, serve_app, listeners)
            app = Addr(*listeners[0].socket.getsockname())
        sides = []
        for identity in (CART, WEB):
            controller = Controller()
            sidecar = Sidecar(_config(identity, environ), nursery, controller, trio.current_time)
            sidecar.credentials.set(authority.credentials(identity))
            nursery.start_soon(sidecar.relay.run)
            sides.append((sidecar, controller))
        made = Mesh(sides[0][0], sides[1][0], app, nursery, logged)
        made.client_controller, made.server_controller = sides[0][1], sides[1][1]
        made.policy(policy)
        made.destination()
        yield made
        nursery.cancel_scope.cancel()
    crashes = [line for line in made.log() if line["level"] == "error"]  # an engine that crashes ends its connection only, but loudly
    assert not crashes, "\n".join(str(line.get("exception", line["event"])) for line in crashes)


__all__ = ["ANYONE", "CART", "VIP", "WEB", "Direction", "ListenAddr", "Mesh", "inbound_policy", "mesh", "only", "replace"]
