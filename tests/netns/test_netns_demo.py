"""`pillion demo` as `make demo` runs it: all lines hold, a line can fail, and whatever ends it, nothing is left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_lab import processes, wait_until

from cli.demo.command import examples
from cli.demo.evidence import alive, members, runner_pid

pytestmark = [pytest.mark.netns, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "cli.main")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A mesh of this test's own, ended if the test did not."""
    found = f"td{os.getpid()}-{abs(hash(request.node.name)) % 1000}"
    yield found
    subprocess.run([*COMMAND, "local", "down", "--name", found], cwd=ROOT, capture_output=True, check=False)


def demo(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, "demo", *words], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def begin(name: str, folder: Path) -> subprocess.Popen[bytes]:
    """A demo that has come to its table."""
    out = folder / "out"
    with open(out, "wb") as file:
        running = subprocess.Popen([*COMMAND, "demo", "--name", name], cwd=ROOT, stdout=file, stderr=file)
    wait_until(lambda: "Who may call whom" in out.read_text(), "the demo is under way", 60)
    return running


def nothing_left(name: str, pids: set[int]) -> bool:
    return not alive(pids) and not any(name in words and "pytest" not in words for _, words in processes())


def test_every_line_holds_and_nothing_is_left(name: str) -> None:
    done = demo("--name", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"\bFAIL\b", done.stdout)
    (good, total) = re.findall(r"(\d+) of (\d+) lines as they should be", done.stdout)[0]
    assert good == total and int(total) >= 45
    for line in (
        r"stranger +web GET / +\(HTTP/1.1\) +200 +allowed by default all-unauthenticated",
        r"web +stock Quote +\(gRPC\) +PERMISSION_DENIED +denied: no policy of grpcroute shop/prices",
        r"cart -> stock:6400: \d+ connections?, [\d,]+ bytes, TLS 1.3 from ServerHello to end",
        r"ok +drop: 1 anchor",
        r"ok +console, a new connection each +\d+ +0",
    ):
        assert re.search(line, done.stdout), line
    assert not (Path("/run/pillion") / name).exists()


def test_lines_fail_when_the_shop_is_not_as_promised_and_keep_leaves_it_running(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    shutil.copytree(examples(), folder)
    cart, policy = folder / "cart.yaml", folder / "policy.yaml"
    plaintext = 'annotations: {config.pillion.dev/skip-outbound-ports: "50051"}'
    cart.write_text(cart.read_text().replace("      labels: {app: cart}\n", f"      labels: {{app: cart}}\n      {plaintext}\n"))
    policy.write_text(policy.read_text().replace("kind: ServiceAccount, name: cashier", "kind: ServiceAccount, name: web"))
    done = demo("--keep", "--name", name, "-f", str(folder))
    assert done.returncode == 1, done.stdout + done.stderr
    for line in (
        r"FAIL +web +cart POST /refunds +\(HTTP/1.1\) +200 ",
        r"FAIL +cart +stock Quote +\(gRPC\) +PERMISSION_DENIED ",
        r"FAIL +cart -> stock:50051: .* no TLS record at byte 0: b'PRI",
        r"FAIL +quote, a new connection each +\d+ +[1-9]",
    ):
        assert re.search(line, done.stdout), line
    told = re.search(rf"pillion (local exec --name {name} -n shop web -- .*)", done.stdout)
    assert told is not None
    tried = subprocess.run([*COMMAND, *told[1].split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert tried.returncode == 0 and '"answer"' in tried.stdout, tried.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl-c", "sigterm", "sigkill"])
def test_whatever_ends_the_demo_ends_the_mesh(name: str, tmp_path: Path, number: signal.Signals) -> None:
    running = begin(name, tmp_path)
    pids = members(runner_pid(name))
    running.send_signal(number)
    code = running.wait(60)
    assert code == (-9 if number == signal.SIGKILL else 130), (tmp_path / "out").read_text()
    wait_until(lambda: nothing_left(name, pids), "everything is gone")


def test_a_mesh_of_that_name_is_not_taken_over(name: str, tmp_path: Path) -> None:
    running = begin(name, tmp_path)
    try:
        second = demo("--name", name)
        assert second.returncode == 1
        assert f"a mesh named '{name}' is running already" in second.stderr
        assert runner_pid(name)
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(60)


@pytest.mark.needs("newuidmap")
def test_the_demo_needs_no_root(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every line also holds for a user who exists only in a mount namespace of this test, with a range of subordinate ids."""
    home = Path(tempfile.mkdtemp(prefix="td-", dir="/tmp"))  # short: Unix sockets lie in it
    request.addfinalizer(lambda: shutil.rmtree(home))
    os.chown(home, 4242, 4242)
    (tmp_path / "passwd").write_text(Path("/etc/passwd").read_text() + "rootless:x:4242:4242::/:/bin/sh\n")
    (tmp_path / "subid").write_text("rootless:300000:65536\n")
    script = f"""
set -e
touch /etc/subuid /etc/subgid
mount --bind {tmp_path}/passwd /etc/passwd
mount --bind {tmp_path}/subid /etc/subuid
mount --bind {tmp_path}/subid /etc/subgid
export HOME={home} XDG_RUNTIME_DIR={home} PYTHONDONTWRITEBYTECODE=1
export PATH=/usr/local/bin:/usr/bin:/bin  # a user's on Debian: without nft
exec setpriv --reuid 4242 --regid 4242 --clear-groups -- {" ".join(COMMAND)} demo --name {name}
"""
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(\d+) of \1 lines as they should be", done.stdout)
