"""Meshed pods in the local runner: examples/hello with its real control plane and sidecars, and what an app cannot do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_lab import COMMAND, LocalMesh, command_line, wait_until

from ebpf.redirect import capture

pytestmark = [pytest.mark.netns, pytest.mark.needs("curl", "setpriv")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "hello"


class HelloMesh(LocalMesh):
    """examples/hello, with one more client that keeps its probes and skips a port."""

    def curl(self, pod: str, url: str, *words: str) -> subprocess.CompletedProcess[str]:
        """The answer's status code and body."""
        return self.run("exec", "-n", "hello", pod, "--", "curl", "-sS", "-m", "30", "-w", "%{http_code} ", "-o", "-", *words, url)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HelloMesh]:
    folder = tmp_path_factory.mktemp("hello")
    for file in EXAMPLE.iterdir():
        shutil.copy(file, folder)
    found = HelloMesh(f"hello-{os.getpid()}", folder)
    try:
        started = found.up()
        assert started.returncode == 0, started.stderr + (found.state / "runner.log").read_text()
        yield found
    finally:
        found.run("down")


def address(mesh: LocalMesh, owner: str, family: int = 0) -> str:
    found: str = next(pod for name, pod in mesh.pods().items() if name.startswith(owner))["addresses"][family]
    return found


def test_the_readmes_allow_and_deny(mesh: HelloMesh) -> None:
    allowed = mesh.curl("client", "http://web/")
    assert "hello spiffe://cluster.local/ns/hello/sa/client" in allowed.stdout and allowed.stdout.endswith("200 ")
    assert mesh.curl("stranger", "http://web/").stdout == "403 "


@pytest.mark.parametrize("family", [0, 1])
def test_a_dialled_pod_address_is_meshed_in_both_families(mesh: HelloMesh, family: int) -> None:
    ip = address(mesh, "web", family)
    url = f"http://[{ip}]:8080/" if ":" in ip else f"http://{ip}:8080/"
    assert "sa/client" in mesh.curl("client", url).stdout
    assert mesh.curl("stranger", url).stdout == "403 "


@pytest.mark.parametrize("port", [4140, 4143])
def test_the_sidecars_own_ports_lead_nowhere(mesh: HelloMesh, port: int) -> None:
    found = mesh.curl("stranger", f"http://{address(mesh, 'web')}:{port}/")
    assert "hello" not in found.stdout and not found.stdout.endswith("200 ")


def test_a_probe_opens_nothing(mesh: HelloMesh) -> None:
    assert mesh.curl("stranger", f"http://{address(mesh, 'web')}:8080/", "-H", "user-agent: kube-probe/1.36").stdout == "403 "
    found = mesh.curl("stranger", f"http://{address(mesh, 'web')}:4191/pillion-probe/web/readinessProbe").stdout
    assert found.endswith("200 ") and "hello" not in found, "the admin port tells the result only"


def test_an_app_cannot_become_its_sidecar(mesh: HelloMesh) -> None:
    tricks = [
        "su -s /bin/sh -c id proxy",
        "setpriv --reuid 2102 id",
        "python3 -c 'import os; os.setuid(2102)'",
        "nft flush ruleset",
        "ip link",
    ]
    for trick in tricks[:4]:
        assert mesh.run("exec", "-n", "hello", "client", "--", "sh", "-c", trick).returncode != 0, trick


def test_an_app_cannot_read_tokens_keys_or_other_pods_files(mesh: HelloMesh) -> None:
    for path in ("pods", "identity", "policy", "api", "logs", "control.sock"):
        words = f"ls {mesh.state}/{path} >/dev/null && cat {mesh.state}/{path}"
        assert mesh.run("exec", "-n", "hello", "client", "--", "sh", "-c", words).returncode != 0, path
    assert mesh.run("exec", "-n", "hello", "client", "--", "ls", "/var/run/secrets/pillion.dev/token").returncode != 0
    inside = mesh.run("exec", "-n", "hello", "client", "-c", "pillion-proxy", "--", "ls", "/var/run/secrets/pillion.dev/token")
    assert inside.stdout == "token\n", "the sidecar has its token"


def test_a_token_is_replaced_before_it_expires(mesh: HelloMesh) -> None:
    (file,) = mesh.state.glob("pods/hello/client-*/volumes/pillion-identity-token/token")
    before = file.read_text()
    os.utime(file, (0, 0))
    wait_until(lambda: file.read_text() != before, "a fresh token is written")
    inside = mesh.run("exec", "-n", "hello", "client", "-c", "pillion-proxy", "--", "cat", "/var/run/secrets/pillion.dev/token/token")
    assert inside.stdout == file.read_text(), "the sidecar sees the fresh one"


def test_processes_have_users_of_their_own(mesh: HelloMesh) -> None:
    programs = [pid for pid in mesh.members() if command_line(pid)[-1:] in (["identity"], ["policy"], ["proxy"])]
    users = {Path(f"/proc/{pid}").stat().st_uid for pid in programs}
    assert users == {2102, 2103, 2104}


def test_an_edited_policy_takes_effect_at_once(mesh: HelloMesh) -> None:
    file = mesh.folder / "policy.yaml"
    text = file.read_text()
    file.write_text(text.replace("kind: ServiceAccount, name: client", "kind: ServiceAccount, name: somebody-else"))
    wait_until(lambda: mesh.curl("client", "http://web/").stdout == "403 ", "client is denied")
    file.write_text(text)
    wait_until(lambda: mesh.curl("client", "http://web/").stdout.endswith("200 "), "client is allowed again")


def test_traffic_goes_on_while_the_control_plane_is_away_and_it_comes_back(mesh: HelloMesh) -> None:
    for name in ("identity", "policy"):
        (victim,) = mesh.parts(name)
        os.kill(victim, signal.SIGKILL)
        assert "sa/client" in mesh.curl("client", "http://web/").stdout
        wait_until(lambda: mesh.parts(name) not in ([], [victim]), f"another {name} has begun")  # noqa: B023
        wait_until(lambda: mesh.status()["ready"], f"{name} is back")
    assert "sa/client" in mesh.curl("client", "http://web/").stdout


def test_status_says_who_is_meshed_and_why_not(mesh: HelloMesh) -> None:
    shown = json.loads(mesh.run("status", "-o", "json").stdout)
    assert shown.keys() == mesh.status().keys()
    pods = {pod["name"].split("-")[0]: pod for pod in shown["pods"]}
    assert pods["web"]["meshed"] and pods["client"]["meshed"] and not pods["stranger"]["meshed"]
    assert pods["stranger"]["why_unmeshed"] == "annotation pillion.dev/inject of the pod is disabled"


def test_a_sidecar_ends_after_its_app(mesh: HelloMesh) -> None:
    file = mesh.folder / "job.yaml"
    file.write_text(
        """
apiVersion: batch/v1
kind: Job
metadata: {name: ask, namespace: hello}
spec:
  template:
    spec:
      serviceAccountName: client
      restartPolicy: Never
      initContainers: [{name: before, command: [curl, -sSf, -m, "30", "http://web/"]}]
      containers: [{name: ask, command: [curl, -sSf, -m, "30", "http://web/"]}]
"""
    )

    def phase() -> str:
        return next((str(pod["phase"]) for name, pod in mesh.pods().items() if name.startswith("ask-")), "")

    wait_until(lambda: phase() in ("Succeeded", "Failed"), "the job has ended, its sidecar too")
    assert phase() == "Succeeded", mesh.run("logs", "-n", "hello", "ask").stdout
    assert "sa/client" in mesh.run("logs", "-n", "hello", "ask", "-c", "before").stdout, "init containers are meshed already"
    file.unlink()


_WITHOUT_CAPTURE = """
import sys, trio
from pathlib import Path
from local import namespaces, network, sandbox
from local.network import Addresses
namespaces.unshare(namespaces.CLONE_NEWNET)  # a node of our own: the link must not appear on this machine's network
sandbox.run_program_now(["ip", "-batch", "-"], network.node_setup(ipv6=False))
folder = Path(sys.argv[1])
plan = sandbox.SandboxPlan(
    "pod0", "web-0", Addresses("10.142.255.1", ""), folder / "hosts", folder / "hosts", sys.argv[2], (), str(folder)
)
try:
    trio.run(sandbox.make_sandbox, plan)
except sandbox.SetupFailed as error:
    print("refused:", error)
else:
    print("started")
"""


@pytest.mark.parametrize(
    ("ruleset", "expected"),
    [
        ("no such rule", "refused: nft -f - failed"),
        ("table inet x {}", "refused: capture is not in place: pillion-capture: IPv4: a connection to 192.0.2.1 did not arrive"),
        (capture(), "started"),
    ],
    ids=["not loaded", "not capturing", "capturing"],
)
def test_a_pod_without_its_capture_does_not_start(tmp_path: Path, ruleset: str, expected: str) -> None:
    """Fail closed: rules that nft refuses, or that lead nothing to the sidecar, leave no namespace to run in."""
    (tmp_path / "hosts").touch()
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    words += [sys.executable, "-c", _WITHOUT_CAPTURE, str(tmp_path), ruleset]
    found = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout.startswith(expected), found.stdout + found.stderr


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter. Not pytest's: every pytest that starts on this machine closes the one all of them share."""
    with tempfile.TemporaryDirectory(prefix="pillion-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.needs("newuidmap")
def test_rootless(open_folder: Path) -> None:
    """The same example without root: a user that exists only in a mount namespace of this test, with a range of subordinate ids."""
    for name in ("home", "run"):
        (open_folder / name).mkdir(mode=0o700)
        os.chown(open_folder / name, 4242, 4242)
    (open_folder / "passwd").write_text(Path("/etc/passwd").read_text() + "rootless:x:4242:4242::/:/bin/sh\n")
    (open_folder / "subid").write_text("rootless:300000:65536\n")
    local = " ".join(f"'{word}'" if " " not in word else f'"{word}"' for word in COMMAND)
    script = f"""
set -e
mount --make-rprivate /
touch /etc/subuid /etc/subgid
mount --bind {open_folder}/passwd /etc/passwd
mount --bind {open_folder}/subid /etc/subuid
mount --bind {open_folder}/subid /etc/subgid
export HOME={open_folder}/home XDG_RUNTIME_DIR={open_folder}/run
cat > {open_folder}/user.sh <<'USER'
down() {{ {local} down; }}
trap down EXIT
{local} check || exit 1
{local} up -f {EXAMPLE} --detach --timeout 90 || {{ cat {open_folder}/run/pillion/default/runner.log; exit 1; }}
{local} exec -n hello client -- curl -sS -m 30 http://web/
{local} exec -n hello stranger -- curl -sS -m 30 -o /dev/null -w '%{{http_code}}' http://web/
USER
exec setpriv --reuid 4242 --regid 4242 --clear-groups -- sh {open_folder}/user.sh
"""
    found = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "hello spiffe://cluster.local/ns/hello/sa/client" in found.stdout and "403down" in found.stdout.replace("\n", "")
