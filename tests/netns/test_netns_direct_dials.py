"""A hostile pod dials what is not meant for it: the sidecar's own ports, what an app keeps to itself, other hosts through the sidecar."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator

import pytest
from arena import HTTP, PLAIN, Arena
from local_lab import PATIENCE_S, wait_until
from neighbour import Neighbour

from ebpf.plan import CONNECT

pytestmark = [pytest.mark.netns, pytest.mark.slow]

ADMIN = 4191
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
CALLERS = pytest.mark.parametrize("caller", ["stranger", "client"])


@pytest.fixture
def neighbour(arena: Arena) -> Iterator[Neighbour]:
    found = Neighbour(arena, "db-0")
    yield found
    found.close()


@FAMILIES
@CALLERS
@pytest.mark.parametrize("port", [4140, 4143])
def test_the_sidecars_own_ports_lead_nowhere(arena: Arena, caller: str, port: int, family: int) -> None:
    before = len(arena.seen())
    assert arena.ask(caller, arena.ip("web", family), port).status in (0, 502), "a reset, which a meshed caller sees as 502"
    assert not [head for head in arena.seen()[before:] if "/health" not in head]


@pytest.mark.parametrize("ip", ["127.0.0.1", "127.0.0.2", "127.255.255.254", "::ffff:127.0.0.3", "0.0.0.0", "::1", "203.0.113.9"])
@pytest.mark.parametrize("port", [4140, 4143])
def test_an_app_that_dials_its_own_sidecar_is_cut(arena: Arena, port: int, ip: str) -> None:
    """One such connection, led on, would come back until the sidecar has no descriptor left."""
    in_pod = ["nsenter", "-t", str(arena.pid("web")), "-n", "ip", "address"]
    subprocess.run([*in_pod, "add", "203.0.113.9/32", "dev", "lo"], check=True)  # as a second network's: none that Kubernetes lists
    before = _opened(arena)
    try:
        with contextlib.suppress(ConnectionError), arena.dial("web", ip, port) as sock:  # a reset, perhaps before connect(2) has returned
            sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert sock.recv(100) == b""
    finally:
        subprocess.run([*in_pod, "del", "203.0.113.9/32", "dev", "lo"], check=True)
    assert _opened(arena) <= before + 1, "once where capture does not know the address, by which it comes back and is recognised"


def _opened(arena: Arena) -> int:
    """How many connections of the app the sidecar of ``web`` took up."""
    samples = arena.ask("web", "127.0.0.1", ADMIN, "/metrics").body.decode()
    return sum(int(value) for value in re.findall(r'^pillion_tcp_open_total\{.*direction="outbound".*\} ([0-9]+)', samples, re.MULTILINE))


@CALLERS
def test_what_an_app_binds_to_loopback_stays_private(arena: Arena, caller: str) -> None:
    with arena.dial("web", "127.0.0.1", 9999) as sock:
        assert sock.recv(20) == b"PRIVATE\r\n", "it is there"
    assert b"PRIVATE" not in arena.raw(caller, arena.ip("web"), 9999, b"x\r\n\r\n")[0].body


def test_a_neighbour_cannot_write_loopback_into_its_packets(arena: Arena, neighbour: Neighbour) -> None:
    """Redirection happens before routing, so that martian destinations reach the sidecar: it must not dial them."""
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    assert b"200 OK" in neighbour.ask(arena.ip("db-0"), PLAIN, request, PATIENCE_S), "the same packets with the pod's address are served"
    assert neighbour.ask("127.0.0.1", PLAIN, request) == b""
    assert neighbour.ask("127.0.0.1", 9999, b"x\r\n\r\n") == b""


def test_a_sidecar_is_no_way_to_other_hosts(arena: Arena, neighbour: Neighbour) -> None:
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    assert neighbour.ask(arena.ip("db-1"), PLAIN, request) == b""
    assert neighbour.ask("10.142.0.1", 9990, request) == b"", "nor to the node"
    if arena.level != CONNECT:  # there the kernel's own routing refuses it before anybody is asked
        assert 'error="foreign-destination"' in arena.ask("stranger", arena.ip("db-0"), ADMIN, "/metrics").body.decode()


def test_a_port_scan_costs_the_scanned_pod_nothing_it_needs(arena: Arena) -> None:
    """Every dialled port is a question to the policy controller: 6,000 of them must not use up what the sidecar may ask."""

    def scan(first: int) -> None:
        for port in range(first, first + 6000):
            with socket.socket() as sock:
                sock.settimeout(1)
                sock.connect_ex((ip, port))

    ip = arena.ip("db-1")
    arena.inside(arena.pid("stranger"), lambda: scan(20000))
    wait_until(lambda: arena.ask("stranger", ip, PLAIN).status == 200, "scanned ports do not stand in the way")
    for family in (0, 1):
        assert arena.ask("db-1", arena.vip("web", family), PLAIN).status == 200, "it still learns of addresses that it did not know"
    before = arena.pss_kib("db-1")
    arena.inside(arena.pid("stranger"), lambda: scan(30000))
    wait_until(lambda: arena.ask("stranger", ip, PLAIN).status == 200, "the second scan is over as well")
    grown = arena.pss_kib("db-1") - before
    assert grown < 8_000, f"6,000 ports more made the sidecar grow by {grown} KiB"


@FAMILIES
def test_the_admin_port_lets_other_pods_look_but_not_touch(arena: Arena, family: int) -> None:
    ip = arena.ip("web", family)
    for method, path, body in (("POST", "/shutdown", b"x"), ("PUT", "/log-level", b"debug"), ("DELETE", "/metrics", b"")):
        assert arena.ask("stranger", ip, ADMIN, path, method=method, body=body).status in (403, 405), path
    assert arena.ask("web", ip, ADMIN, "/shutdown", method="POST", body=b"x").status == 403, "on loopback only, not on the pod's address"
    assert arena.ask("stranger", ip, ADMIN, "/log-level").body == b"info\n"
    for path in ("/live", "/ready", "/metrics", "/config", "/certs", "/policy", "/endpoints"):
        assert arena.ask("stranger", ip, ADMIN, path).status == 200, path


def test_a_meshed_prometheus_scrapes_as_an_unmeshed_one_does(arena: Arena) -> None:
    ip = arena.ip("web")
    for caller in ("client", "stranger"):
        assert b"pillion_" in arena.ask(caller, ip, ADMIN, "/metrics").body, caller
        assert arena.ask(caller, ip, ADMIN, "/shutdown", method="POST", body=b"x").status == 403


def test_nothing_secret_is_on_the_admin_port(arena: Arena) -> None:
    ip = arena.ip("web")
    shown = b"".join(arena.ask("stranger", ip, ADMIN, path).body for path in ("/config", "/certs", "/policy", "/endpoints", "/metrics"))
    assert b"livenessProbe" in shown and b"authorization" in shown
    for secret in (b"s3cret-of-the-probe", b"PRIVATE KEY", b"eyJ"):
        assert secret not in shown, secret


def test_probes_are_answered_while_their_paths_stay_closed(arena: Arena) -> None:
    """The liveness probe asks /admin/health, which nobody but the admin may."""
    ip = arena.ip("web")
    assert arena.ask("stranger", ip, ADMIN, "/pillion-probe/app/livenessProbe").body == b"ok\n"
    assert arena.ask("stranger", ip, HTTP, "/admin/health", "user-agent: kube-probe/1.36").status == 403
    assert arena.ask("client", ip, HTTP, "/admin/health").status == 403
    assert arena.ask("stranger", ip, ADMIN, "/pillion-probe/../config").status == 404
    assert arena.ask("stranger", ip, ADMIN, "/pillion-probe/app/nothing").status == 404


def test_who_holds_all_admin_connections_keeps_no_probe_out(arena: Arena) -> None:
    ip = arena.ip("web")
    held = [arena.dial("stranger", ip, ADMIN) for _ in range(200)]
    try:
        for _ in range(3):
            node = arena.inside(arena.runner_pid(), lambda: socket.create_connection((ip, ADMIN), PATIENCE_S))
            with node:
                node.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
                assert node.recv(100).startswith(b"HTTP/1.1 200"), "the kubelet's probe"
    finally:
        for sock in held:
            sock.close()
