"""What an app dials is led through its sidecar, or is not, exactly as on Kubernetes: both families, every way to name a service."""

from __future__ import annotations

import pytest
from arena import HTTP, OPAQUE, PLAIN, Arena, Outside

pytestmark = [pytest.mark.netns, pytest.mark.slow]

CLIENT = "spiffe://cluster.local/ns/arena/sa/client"
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])


@FAMILIES
def test_a_service_address_is_meshed(arena: Arena, family: int) -> None:
    assert arena.ask("client", arena.vip("web", family), HTTP).saw("pillion-client-id") == [CLIENT]


@FAMILIES
def test_a_pod_address_is_meshed(arena: Arena, family: int) -> None:
    assert arena.ask("client", arena.ip("web", family), HTTP).saw("pillion-client-id") == [CLIENT]


@FAMILIES
def test_a_port_without_a_server_is_meshed_too(arena: Arena, family: int) -> None:
    assert arena.ask("client", arena.ip("web", family), PLAIN).saw("pillion-client-id") == [CLIENT]
    assert arena.ask("stranger", arena.ip("web", family), PLAIN).saw("pillion-client-id") == []


@pytest.mark.parametrize("flag", ["-4", "-6"])
@pytest.mark.parametrize("name", ["web", "web.arena.svc.cluster.local", "db", "db-0.db", "db-1.db.arena.svc.cluster.local"])
def test_names_of_services_and_of_stateful_pods(arena: Arena, name: str, flag: str) -> None:
    found = arena.run("exec", "-n", "arena", "client", "--", "curl", "-sS", flag, "-m", "30", f"http://{name}:8083/who")
    assert CLIENT in found.stdout, found
    if name.startswith("db-"):
        assert f'"pod": "{name[:4]}"' in found.stdout, "that very pod"


@FAMILIES
def test_a_pod_reaches_itself_by_its_own_address_without_policy(arena: Arena, family: int) -> None:
    """Loopback traffic never touches the sidecar (as in Linkerd): even a route that denies everybody else is open to the pod itself."""
    reply = arena.ask("web", arena.ip("web", family), HTTP, "/admin/x")
    assert reply.status == 200 and reply.saw("pillion-client-id") == []


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_localhost_stays_inside_the_pod(arena: Arena, ip: str) -> None:
    assert arena.ask("web", ip, HTTP, "/admin/x").status == 200


@FAMILIES
def test_a_pod_reaches_itself_through_its_own_service(arena: Arena, family: int) -> None:
    reply = arena.ask("web", arena.vip("web", family), HTTP, "/hairpin")
    assert reply.status == 200 and reply.told["pod"] == arena.pod("web")


@FAMILIES
def test_opaque_bytes_pass_both_sidecars(arena: Arena, family: int) -> None:
    with arena.dial("client", arena.vip("web", family), OPAQUE) as sock:
        sock.sendall(b"\x00\x01 not http \xff")
        assert sock.recv(100) == b"\x00\x01 not http \xff"


def test_an_address_beyond_the_mesh_is_reached_as_dialled(arena: Arena, outside: Outside) -> None:
    reply = arena.ask("client", outside.IP, 80, "/path?q=1", "x-mark: kept")
    assert reply.body == b"outside"
    assert outside.heard[-1] == b"GET /path?q=1 HTTP/1.1\r\nhost: web\r\nconnection: close\r\nx-mark: kept\r\n\r\n", "not a byte is changed"


def test_a_service_port_that_is_not_defined_is_refused(arena: Arena) -> None:
    assert arena.ask("client", arena.vip("web"), 4321).status == 0


def test_the_capture_leaves_no_family_and_no_trick_out(arena: Arena) -> None:
    """An IPv4 address in IPv6 clothes, and a source port of the sidecar's own, are captured like the rest."""
    with arena.dial("client", f"::ffff:{arena.ip('web')}", PLAIN) as sock:
        sock.sendall(b"GET /mapped HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert CLIENT.encode() in sock.recv(1 << 16)
