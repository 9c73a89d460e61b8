"""A hostile pod dials what is not meant for it: the sidecar's own ports, what an app keeps to itself, other hosts through the sidecar."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from arena import PLAIN, Arena
from local_lab import wait_until
from neighbour import Neighbour

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


@CALLERS
def test_what_an_app_binds_to_loopback_stays_private(arena: Arena, caller: str) -> None:
    with arena.dial("web", "127.0.0.1", 9999) as sock:
        assert sock.recv(20) == b"PRIVATE\r\n", "it is there"
    assert b"PRIVATE" not in arena.raw(caller, arena.ip("web"), 9999, b"x\r\n\r\n", 1)[0].body


def test_a_neighbour_cannot_write_loopback_into_its_packets(arena: Arena, neighbour: Neighbour) -> None:
    """Redirection happens before routing, so that martian destinations reach the sidecar: it must not dial them."""
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    assert b"200 OK" in neighbour.ask(arena.ip("db-0"), PLAIN, request), "the same packets with the pod's address are served"
    assert neighbour.ask("127.0.0.1", PLAIN, request) == b""
    assert neighbour.ask("127.0.0.1", 9999, b"x\r\n\r\n") == b""


def test_a_sidecar_is_no_way_to_other_hosts(arena: Arena, neighbour: Neighbour) -> None:
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    assert neighbour.ask(arena.ip("db-1"), PLAIN, request) == b""
    assert neighbour.ask("10.142.0.1", 9990, request) == b"", "nor to the node"
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
