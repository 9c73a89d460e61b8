"""The program itself: settings, the operator's socket, an orderly end."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.__main__ import main
from identity.admin import answer
from identity.admin_client import AdminRefused, IdentityAdmin
from identity.admin_wire import Ask
from identity.app import pods_of
from identity.authority import Authority
from identity.local_tokens import LocalSigner
from identity.tokens import Subject
from tests.identity.identity_lab import SERVICE, TRUST_DOMAIN
from tests.ports import unused_port

SIGNER = LocalSigner.generate()


def environment(directory: Path, **settings: str) -> dict[str, str]:
    (directory / "token.pub").write_bytes(SIGNER.public_pem)
    return {
        "PATH": os.environ["PATH"],
        "PILLION_CA_DIR": str(directory / "ca"),
        "PILLION_TOKEN_REVIEW": f"local:{directory / 'token.pub'}",
        "PILLION_IDENTITY_LISTEN": f"127.0.0.1:{unused_port()}",
        "PILLION_ADMIN_LISTEN": f"127.0.0.1:{unused_port()}",
        "PILLION_IDENTITY_ADMIN_SOCKET": str(directory / "admin.sock"),
        "PILLION_BUNDLE_FILE": str(directory / "bundle.pem"),
    } | settings


def identity(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "identity", *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)


class Checked(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def check_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[dict[str, str]], Checked]:
    """``--check-config`` with exactly these variables. In this process: it starts nothing, and half a second of imports is saved."""

    def check(env: dict[str, str]) -> Checked:
        monkeypatch.setattr(os, "environ", env)
        code = main(["--check-config"])
        return Checked(code, *capsys.readouterr())

    return check


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], Path]]:
    directory = tmp_path_factory.mktemp("identity")
    env = environment(directory)
    with subprocess.Popen([sys.executable, "-m", "identity"], env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert '"event":"serving"' in process.stderr.readline()
        yield env, directory
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "draining" in process.stderr.read()
    assert not (directory / "admin.sock").exists()


def get(env: dict[str, str], path: str) -> str:
    with urllib.request.urlopen(f"http://{env['PILLION_ADMIN_LISTEN']}{path}", timeout=60) as response:
        return str(response.read().decode())


def test_the_program_is_ready_and_reports_metrics(running: tuple[dict[str, str], Path]) -> None:
    assert get(running[0], "/ready") == "ready\n"
    assert "pillion_identity_issuer_expiry_timestamp_seconds" in get(running[0], "/metrics")


def test_an_operator_rotates_through_and_the_bundle_is_published(running: tuple[dict[str, str], Path]) -> None:
    _, directory = running
    assert stat.S_IMODE((directory / "admin.sock").stat().st_mode) == 0o600
    admin = IdentityAdmin(directory / "admin.sock")
    before = admin.status()
    steps: list[str] = []
    after = admin.rotate_through(told=steps.append)
    assert [line.split(":")[0] for line in steps] == ["add", "switch", "drop"]
    assert after.generation == before.generation + 2
    assert after.anchors != before.anchors
    assert after.due == "add"
    with pytest.raises(AdminRefused, match="next step of the rotation is 'add'"):
        admin.rotate("drop")
    deadline = time.monotonic() + 30
    while (directory / "bundle.pem").read_bytes() != (directory / "ca" / "bundle.pem").read_bytes():
        assert time.monotonic() < deadline


def test_a_second_service_on_the_same_directory_does_not_start(running: tuple[dict[str, str], Path]) -> None:
    done = identity(running[0])
    assert done.returncode == 1
    assert "another identity service works in" in done.stderr


def test_every_wrong_setting_is_reported_at_once(tmp_path: Path, check_config: Callable[[dict[str, str]], Checked]) -> None:
    env = environment(tmp_path, PILLION_LEAF_LIFETIME_S="3", PILLION_TOKEN_REVIEW="maybe", PILLION_TRUST_DOMAIN="A B")
    done = check_config(env)
    assert done.code == 1
    assert [line.partition("=")[0] for line in done.err.splitlines()] == [
        "PILLION_TRUST_DOMAIN",
        "PILLION_TOKEN_REVIEW",
        "PILLION_LEAF_LIFETIME_S",
    ]


def test_good_settings_are_ok(tmp_path: Path) -> None:
    done = identity(environment(tmp_path), "--check-config")
    assert (done.returncode, done.stdout) == (0, "ok\n")


def test_no_authority_and_two_authorities_are_both_wrong(tmp_path: Path, check_config: Callable[[dict[str, str]], Checked]) -> None:
    assert "PILLION_CA_DIR" in check_config(environment(tmp_path, PILLION_CA_DIR="")).err
    both = environment(tmp_path, PILLION_ISSUER_DIR="/x", PILLION_ISSUER_FILES="a,b")
    assert "exclude each other" in check_config(both).err


def test_a_start_that_cannot_succeed_says_why_in_one_line(tmp_path: Path) -> None:
    done = identity(environment(tmp_path, PILLION_ISSUER_DIR=str(tmp_path / "none")))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"identity: {tmp_path / 'none' / 'tls.crt'} cannot be read: No such file or directory"]


def asked(authority: Authority, **fields: object) -> tuple[str, list[str]]:
    found = answer(authority, msgspec.json.encode(Ask(**fields)))  # type: ignore[arg-type]
    return found.error, found.blocking


def test_the_operator_is_told_who_blocks_and_may_insist() -> None:
    now = [1e9]
    authority = Authority.self_made(TRUST_DOMAIN, None, clock=lambda: now[0])
    authority.report(Subject(SERVICE, "cart-0", "uid"), 1, authority.issuer.ref.id)
    assert asked(authority, verb="rotate") == ("", [])
    error, blocking = asked(authority, verb="rotate")
    assert "pillion/cart-0" in error
    assert len(blocking) == 1
    assert asked(authority, verb="rotate", ignore_absent=True)[0] == error
    now[0] += 91
    status = answer(authority, b'{"verb": "status"}').status
    assert status is not None
    assert [workload.absent for workload in status.workloads] == [True]
    assert asked(authority, verb="rotate", ignore_absent=True) == ("", [])
    assert asked(authority, verb="rotate")[0] != ""
    assert asked(authority, verb="rotate", force=True) == ("", [])
    assert len(authority.trust.value.anchors) == 1


@given(st.binary(max_size=60))
def test_any_line_on_the_operators_socket_is_answered(line: bytes) -> None:
    authority = AUTHORITY
    assert answer(authority, line).error


AUTHORITY = Authority.self_made(TRUST_DOMAIN, None)


@pytest.mark.parametrize("line", [b'{"verb": "burn"}', b'{"verb": "rotate", "step": "jump"}', b'{"verb": "status", "more": 1}'])
def test_unknown_verbs_steps_and_fields_are_refused(line: bytes) -> None:
    assert answer(AUTHORITY, line).error
    assert AUTHORITY.trust.value.generation == 1


def test_pods_that_exist_are_read_from_a_file_and_unknown_without_it(tmp_path: Path) -> None:
    path = tmp_path / "pods"
    assert pods_of(path) == frozenset()
    path.write_text("uid-1\nuid-2\n")
    assert pods_of(path) == {"uid-1", "uid-2"}
    path.write_bytes(b"\xff\xfe")
    assert pods_of(path) == frozenset()


def test_on_kubernetes_everything_is_kept_in_the_cluster(tmp_path: Path, check_config: Callable[[dict[str, str]], Checked]) -> None:
    done = check_config(environment(tmp_path, PILLION_IDENTITY_SOURCE="kubernetes"))
    assert done.code == 1
    assert "needs PILLION_POD_NAME and PILLION_IDENTITY_TOKEN_FILE" in done.err
    assert "leave out PILLION_CA_DIR" in done.err
    pod = {"PILLION_POD_NAME": "identity-0", "PILLION_IDENTITY_TOKEN_FILE": "/token", "PILLION_IDENTITY_SOURCE": "kubernetes"}
    assert check_config(pod).out == "ok\n"


def test_outside_of_a_cluster_it_says_so(tmp_path: Path) -> None:
    pod = {"PILLION_POD_NAME": "identity-0", "PILLION_IDENTITY_TOKEN_FILE": "/token", "PILLION_IDENTITY_SOURCE": "kubernetes"}
    done = identity({"PATH": os.environ["PATH"], "HOME": str(tmp_path), **pod})
    assert done.returncode == 1
    assert "no Kubernetes cluster is configured" in done.stderr


def test_a_request_is_brought_to_the_socket_of_the_container(running: tuple[dict[str, str], Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "identity.ask", '{"verb": "status"}'],
        env=running[0],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert msgspec.json.decode(done.stdout)["status"]["trust_domain"] == TRUST_DOMAIN
    without = {name: value for name, value in running[0].items() if name != "PILLION_IDENTITY_ADMIN_SOCKET"}
    usage = subprocess.run([sys.executable, "-m", "identity.ask"], env=without, capture_output=True, text=True, timeout=60, check=False)
    assert usage.returncode == 2
