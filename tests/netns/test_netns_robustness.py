"""What the mesh does while parts of it are killed, stopped, rotated, drained or drowned: the rest goes on, what is down is shut."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from arena import HTTP, OPAQUE, PLAIN, Arena, Load, Outside, Wire
from local_lab import wait_until

pytestmark = [pytest.mark.netns, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _whole_again(arena: Arena) -> Iterator[None]:
    yield
    wait_until(lambda: arena.status()["ready"], "everything is ready again")


def get(arena: Arena, caller: str, ip: str, port: int = PLAIN, target: str = "/load") -> Callable[[], int]:
    """A request on a connection of its own."""
    return lambda: arena.ask(caller, ip, port, target).status


def gone(pid: int) -> bool:
    """Ended, whether or not somebody has noticed."""
    return not os.path.exists(f"/proc/{pid}/exe")


def kill(pid: int) -> None:
    """And wait until it is gone."""
    fd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: gone(pid), "the process is gone")
    finally:
        os.close(fd)


def test_a_rotation_of_the_trust_anchor_fails_no_request(arena: Arena) -> None:
    command = [sys.executable, "-m", "cli.main", "identity", "rotate", "--through", "--wait", "60", "--name", arena.name]
    pooled = arena.dial("client", arena.ip("web"), HTTP)

    def keep_alive() -> int:
        pooled.sendall(b"GET /load HTTP/1.1\r\nhost: web\r\n\r\n")
        return int(pooled.recv(1 << 16).split(b" ")[1])

    with (
        pooled,
        Load(get(arena, "client", arena.vip("web"), HTTP)) as fresh,
        Load(keep_alive, tasks=1) as kept,
        Load(get(arena, "db-0", arena.ip("db-1"))) as other,
    ):
        loads = (fresh, kept, other)
        for load in loads:
            load.goes_on()
        rotated = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], check=False)
        for load in loads:
            load.goes_on()
    assert rotated.returncode == 0, rotated.stderr
    assert [load.failed for load in loads] == [[], [], []]


@pytest.mark.parametrize("part", ["identity", "policy"])
def test_a_killed_control_plane_fails_no_request(arena: Arena, part: str) -> None:
    """Neither while it is away nor when it comes back."""
    before = arena.part(part)
    with Load(get(arena, "client", arena.vip("web"), HTTP)) as load, Load(get(arena, "db-0", arena.ip("db-1"))) as other:
        load.goes_on()
        other.goes_on()
        kill(before)
        load.goes_on()
        returned(arena, part, before)
        load.goes_on(50)
        other.goes_on(50)
    assert load.failed == [] and other.failed == []


def returned(arena: Arena, part: str, before: int) -> None:
    """Another process of the control plane has come to serve in the place of one that was killed."""
    wait_until(lambda: arena.parts(part) not in ([], [before]), "another one has begun")
    wait_until(lambda: arena.status()["ready"], "it is back")


def test_nothing_is_taken_for_external_while_the_controller_comes_back(arena: Arena) -> None:
    """A controller that has not read everything yet must not answer "not of the mesh": that would mean plaintext between meshed pods."""
    marker, addresses = secrets.token_hex(16), [arena.ip(name, family) for name in ("db-0", "db-1") for family in (0, 1)]
    with Wire(arena) as wire:
        before, answers = arena.part("policy"), set()

        def ask_all() -> None:
            answers.update(arena.ask(caller, ip, PLAIN, f"/{marker}").status for caller in ("admin", "web") for ip in addresses)

        kill(before)
        while arena.parts("policy") in ([], [before]) or not arena.status()["ready"]:
            ask_all()
        ask_all()
    assert 200 in answers and answers <= {200, 503, 0}
    assert marker.encode() not in wire.bytes


def test_a_pod_whose_sidecar_is_killed_is_shut_until_it_is_back(arena: Arena, outside: Outside) -> None:
    addresses, marker = [arena.ip("web", family) for family in (0, 1)], secrets.token_hex(16)
    web, app = addresses[0], arena.pid("web")
    assert arena.ask("stranger", web, PLAIN).status == 200 and arena.ask("web", outside.IP, 80).status == 200
    with Wire(arena) as wire, Load(get(arena, "client", arena.ip("db-0"))) as others, Load(get(arena, "client", web, HTTP)) as through:
        others.goes_on()
        through.goes_on()
        sidecar, heard = arena.sidecar("web"), len(outside.heard)
        with arena.unattended():
            killing = time.monotonic()
            kill(sidecar)
            assert [arena.ask("stranger", ip, PLAIN, f"/{marker}").status for ip in addresses] == [0, 0]
            assert arena.ask("web", outside.IP, 80, f"/{marker}").status == 0, "nor does anything get out"
            assert len(outside.heard) == heard
            wait_until(lambda: through.failed, "its callers have noticed")
        wait_until(lambda: arena.ask("client", web, HTTP).status == 200, "it serves again")
        recovered = time.monotonic()
        others.goes_on()
        through.goes_on()
    assert others.failed == [], "traffic between other pods goes on"
    assert {said for *_, said in through.failed} <= {"status 502", "status 503", "status 504", "status 0"}
    assert all(ended > killing and began < recovered for began, ended, _ in through.failed), "from the kill to the recovery, and not after"
    assert b"pillion-client-id" not in wire.bytes
    assert arena.pid("web") == app, "the app was not restarted"


def test_a_callers_killed_sidecar_lets_nothing_past(arena: Arena, outside: Outside) -> None:
    web, marker = arena.ip("web"), secrets.token_hex(16)
    with Wire(arena) as wire:
        targets = ((web, PLAIN), (arena.ip("web", 1), PLAIN), (outside.IP, 80))
        sidecar, _ = arena.sidecar("client"), arena.pid("client")
        with arena.unattended():
            kill(sidecar)
            assert [arena.ask("client", ip, port, f"/{marker}").status for ip, port in targets] == [0, 0, 0]
        wait_until(lambda: arena.ask("client", web, HTTP, f"/{marker}").status == 200, "it serves again")
    assert marker.encode() not in wire.bytes


@pytest.mark.parametrize("how", ["http1", "opaque"])
def test_a_slow_reader_costs_a_bounded_amount_of_memory(arena: Arena, how: str) -> None:
    """200 MB are on offer and nobody takes them."""
    web, before = arena.ip("web"), (arena.pss_kib("web"), arena.pss_kib("client"))
    with arena.dial("client", web, HTTP if how == "http1" else OPAQUE) as sock:
        if how == "http1":
            sock.sendall(b"GET /big?n=200000000 HTTP/1.1\r\nhost: web\r\n\r\n")
            time.sleep(2)
        else:
            sent, chunk = 0, b"x" * (1 << 16)
            sock.settimeout(1)
            try:
                while sent < 200_000_000:
                    sent += sock.send(chunk)
            except TimeoutError:
                pass
            assert sent < 120_000_000, "the writer is slowed: three connections, each with a window of up to 32 MiB (tcp_rmem)"
        grown = [arena.pss_kib(name) - was for name, was in zip(("web", "client"), before, strict=True)]
        assert max(grown) < 12_000, f"the sidecars grew by {grown} KiB"
        assert arena.ask("client", web, HTTP).status == 200, "others are served meanwhile"
        if how == "http1":
            taken = 0
            while taken < 200_000_000:
                taken += len(sock.recv(1 << 20))
    grown = [arena.pss_kib(name) - was for name, was in zip(("web", "client"), before, strict=True)]
    assert max(grown) < 12_000, f"the sidecars grew by {grown} KiB"


def test_many_slow_readers_at_once_stay_bounded(arena: Arena) -> None:
    """From an unmeshed pod, so that every byte waits in the one sidecar under attack."""
    web, before = arena.ip("web"), arena.pss_kib("web")
    held = [arena.dial("stranger", web, HTTP) for _ in range(30)]
    try:
        for sock in held:
            sock.sendall(b"GET /public/big?n=200000000 HTTP/1.1\r\nhost: web\r\n\r\n")
        time.sleep(2)
        assert arena.pss_kib("web") - before < 30_000
        assert arena.ask("client", web, HTTP).status == 200
    finally:
        for sock in held:
            sock.close()


def test_a_pod_that_starts_without_the_controller_waits_and_lets_nobody_in(arena: Arena, tmp_path: Path) -> None:
    (tmp_path / "late.yaml").write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: late, namespace: arena, labels: {app: late}}\n"
        "spec:\n  serviceAccountName: web\n  terminationGracePeriodSeconds: 1\n"
        "  volumes: [{name: app, configMap: {name: app}}]\n  containers:\n  - name: app\n    command: [python, /srv/arena/arena_app.py]\n"
        "    volumeMounts: [{name: app, mountPath: /srv/arena}]\n    ports: [{containerPort: 8083}]\n"
    )
    policy = arena.part("policy")
    os.kill(policy, signal.SIGSTOP)
    try:
        assert arena.run("apply", "-f", str(tmp_path / "late.yaml")).returncode == 0
        wait_until(lambda: arena.pods().get("late", {}).get("addresses"), "it has an address")
        time.sleep(3)
        late = arena.pods()["late"]
        assert not late["ready"], "its sidecar knows no policy"
        assert arena.ask("stranger", late["addresses"][0], PLAIN).status in (0, 503)
    finally:
        os.kill(policy, signal.SIGCONT)
    try:
        wait_until(lambda: arena.pods()["late"]["ready"], "it comes up with the controller")
        wait_until(lambda: arena.ask("stranger", late["addresses"][0], PLAIN).status == 200, "and serves")
    finally:
        arena.run("delete", "-f", str(tmp_path / "late.yaml"))
        wait_until(lambda: "late" not in arena.pods(), "it is gone")


def test_a_rolling_update_under_load_fails_no_request(arena: Arena) -> None:
    """The old pod's sidecar drains: it is out of the Service first, and every request that it took is answered."""
    before = arena.pod("web")
    with Load(get(arena, "client", arena.vip("web"), HTTP, "/slow"), tasks=3) as load:
        load.goes_on(5)
        file = arena.folder / "workloads.yaml"
        file.write_text(file.read_text().replace("labels: {app: web}, annotations: {}", "labels: {app: web}, annotations: {turn: '2'}"))
        wait_until(lambda: before not in arena.pods(), "the old pod is gone", 60)
        load.goes_on(5)
    assert load.failed == []


def test_connections_that_were_open_when_a_pod_ends_are_answered_to_the_end(arena: Arena) -> None:
    """A request in flight at SIGTERM is finished; its connection is told to close."""
    web = arena.ip("web")
    with arena.dial("client", web, HTTP) as sock:
        target = f"/slow/{secrets.token_hex(8)}"
        sock.sendall(f"GET {target} HTTP/1.1\r\nhost: web\r\n\r\n".encode())
        wait_until(lambda: any(target in head for head in arena.seen("web")), "the app has the request")
        sidecar = arena.sidecar("web")
        os.kill(sidecar, signal.SIGTERM)
        answer = sock.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 200")
    wait_until(lambda: gone(sidecar), "the sidecar has drained")  # until then it may be the one that answers
    wait_until(lambda: arena.ask("stranger", web, HTTP, "/public").status == 200, "another one serves")


def test_a_flood_of_connections_that_say_nothing_keeps_nobody_out(arena: Arena) -> None:
    web, before = arena.ip("web"), arena.pss_kib("web")
    held = [arena.dial("stranger", web, HTTP) for _ in range(500)]
    try:
        assert arena.ask("client", web, HTTP).status == 200
        assert arena.ask("stranger", web, HTTP, "/public").status == 200
        assert arena.pss_kib("web") - before < 25_000
    finally:
        for sock in held:
            sock.close()
