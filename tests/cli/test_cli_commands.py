"""The command line: against a fake runner and fake sockets, what is printed, what fails and with which exit code."""

from __future__ import annotations

import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click
import pytest
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families

from cli import main as cli_main
from cli.main import cli
from cli.output import CommandFailed
from cli.reach import match_pods
from core.k8s.cluster import NoCluster, kubeconfig_access
from identity.admin_wire import AnchorStatus, Answer, Ask, Status, WorkloadStatus
from local import client, protocol
from tests.ports import unused_port

CERTS = {
    "identity": "spiffe://cluster.local/ns/shop/sa/cart",
    "not_before": 0,
    "not_after": 86400,
    "chain": [{"serial": "abc", "issuer": "CN=issuer"}],
    "trust_anchors": [{}, {}],
}
SERVER = {"group": "policy.pillion.dev", "kind": "Server", "namespace": "shop", "name": "cart"}
POLICY = {"server": SERVER, "protocol": "http1", "authorizations": [{"ref": {**SERVER, "kind": "AuthorizationPolicy"}}], "routes": []}


def pod(name: str, owner: str, *, meshed: bool = True, namespace: str = "shop") -> protocol.PodStatus:
    return protocol.PodStatus(
        namespace=namespace,
        name=name,
        owner=owner,
        phase="Running",
        ready=True,
        meshed=meshed,
        message="",
        why_unmeshed="" if meshed else "pillion.dev/inject is disabled",
        addresses=("10.0.0.1",),
        containers=(),
    )


PODS = (
    pod("cart-1", "Deployment/cart"),
    pod("cart-2", "Deployment/cart"),
    pod("old-1", "Deployment/old", meshed=False),
    pod("cart", "Pod/x"),
)


class FakeMesh:
    """Stands for the runner: status, and an exec whose command is our admin request."""

    def __init__(self) -> None:
        self.admin: dict[str, tuple[int, object]] = {
            "/certs": (200, CERTS),
            "/policy": (200, {"8080": POLICY, "9090": None}),
            "/metrics": (200, b'# TYPE pillion_request_total counter\npillion_request_total{direction="inbound"} 3\n'),
            "/config": (200, {"trust_domain": "cluster.local", "inbound_ports": [80]}),
            "/endpoints": (
                200,
                {"10.1.0.1:80": {"kind": "service", "ref": {**SERVER, "kind": "Service"}, "endpoints": []}, "10.1.0.2:80": None},
            ),
        }
        self.exit_code = 0

    def ask(self, name: str, request: protocol.Request, fds: tuple[int, ...] = ()) -> protocol.Answer:
        if name != "default":
            raise client.NotRunning(name)
        if isinstance(request, protocol.Status):
            return protocol.MeshStatus(
                name="default",
                ready=True,
                settled=True,
                reasons=(),
                notes=(),
                pods=PODS,
                services=(
                    protocol.ServiceStatus("shop", "web", ("10.1.0.9", "fd00::9"), (80,), ()),
                    protocol.ServiceStatus("shop", "db", (), (5432,), ()),
                ),
                control_plane={},
                pid=1,
                state="/run",
            )
        assert isinstance(request, protocol.Exec)
        assert request.container == "pillion-proxy"
        status, body = self.admin[request.argv[-2]]
        os.write(fds[1], b"%d\n" % status + (body if isinstance(body, bytes) else json.dumps(body).encode()))
        return protocol.Exited(self.exit_code)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> FakeMesh:
    fake = FakeMesh()
    monkeypatch.setattr(client, "ask", fake.ask)
    return fake


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[int, object]]]:
    """A policy controller's diagnostics socket: target -> (status, JSON)."""
    answers: dict[str, tuple[int, object]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    path = tmp_path / "d.sock"
    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("PILLION_DIAGNOSTICS_SOCKET", str(path))
        yield answers
        server.shutdown()
        thread.join()


@pytest.fixture
def identity_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Answer]]:
    """An identity service's operator socket that gives these answers in turn; the asks are checked to be asks."""
    import msgspec

    answers: list[Answer] = []
    path = tmp_path / "i.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    line = connection.recv(65536)
                    if not line:
                        return
                    msgspec.json.decode(line, type=Ask)
                    connection.sendall(msgspec.json.encode(answers.pop(0)) + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setenv("PILLION_IDENTITY_ADMIN_SOCKET", str(path))
        yield answers
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
        thread.join()


STATUS = Status(
    "cluster.local",
    2,
    [AnchorStatus("a1", 1, 1e9), AnchorStatus("a2", 2, 2e9)],
    "i1",
    1e9,
    "switch",
    ["shop/cart-1"],
    [WorkloadStatus("shop/cart-1", "spiffe://cluster.local/ns/shop/sa/cart", "u", 1, "i1", 1e9, 3.0, False)],
)


def run(*words: str, stdin: str | None = None) -> Result:
    return CliRunner(env={"KUBECONFIG": "", "HOME": "/nonexistent"}).invoke(cli, list(words), input=stdin, prog_name="pillion")


def test_every_command_is_there_and_explains_itself() -> None:
    for name in cli_main._COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0, result.output
    for name in ("authz", "identity", "diagnostics", "local", "inject", "version", "completion"):
        assert name in run("--help").output


def test_a_part_that_is_absent_breaks_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli_main._COMMANDS, "local", ("local.absent:local", "Run a mesh."))
    result = run("local", "up")
    assert result.exit_code == 1
    assert "`pillion local` is not part of this installation" in result.stderr and "try: " in result.stderr
    assert run("--help").exit_code == 0
    assert run("version").exit_code == 0


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("nope").exit_code == 2
    assert run("authz").exit_code == 2
    assert run("diagnostics", "policy", "cart", "-p", "0").exit_code == 2
    assert run("diagnostics", "endpoints").exit_code == 2


def test_a_file_where_a_folder_is_wanted_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("")
    result = run("local", "up", "-f", str(tmp_path / "app.yaml"))
    assert result.exit_code == 2 and f"is a file: name its folder, {tmp_path}" in " ".join(result.stderr.split())


def test_version_and_completion() -> None:
    assert json.loads(run("version", "-o", "json").stdout)["pillion"] == "0.1.0"
    for shell in ("zsh", "fish"):
        assert "_PILLION_COMPLETE" in run("completion", shell).stdout


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deploy/cart", ["cart-1", "cart-2"]),
        ("deployments/cart", ["cart-1", "cart-2"]),
        ("Deployment/cart", ["cart-1", "cart-2"]),
        ("cart", ["cart"]),
        ("pod/cart-1", ["cart-1"]),
        ("old", ["old-1"]),
        ("sts/cart", []),
        ("nope", []),
    ],
)
def test_a_workload_is_a_pod_an_owner_or_kind_and_name(name: str, expected: list[str]) -> None:
    assert [found.name for found in match_pods(PODS, "shop", name)] == expected
    assert match_pods(PODS, "default", name) == []


def test_authz_lists_who_may_and_by_which_policy(mesh: FakeMesh, controller: dict[str, tuple[int, object]]) -> None:
    row = {
        "port": 8080,
        "server": SERVER,
        "route": None,
        "authorization": {**SERVER, "kind": "AuthorizationPolicy", "name": "web"},
        "clients": "spiffe://x",
    }
    controller["/diagnostics/authz?namespace=shop&pod=cart-1"] = (200, [row, {**row, "port": 4143}, {**row, "port": 4191}])
    result = run("authz", "deploy/cart", "-n", "shop")
    assert result.exit_code == 0, result.output
    cells = re.split(r" {2,}", result.stdout.splitlines()[1])
    assert cells == ["8080", "server shop/cart", "-", "authorizationpolicy shop/web", "spiffe://x"]
    assert len(result.stdout.splitlines()) == 2
    assert json.loads(run("authz", "deploy/cart", "-n", "shop", "-o", "json").stdout) == [row]


def test_an_unknown_workload_is_named_with_those_that_exist(mesh: FakeMesh) -> None:
    result = run("authz", "crat", "-n", "shop")
    assert result.exit_code == 1
    assert "error: no pod or workload 'crat' in namespace shop\n  try: one of: shop/cart," in result.stderr
    assert result.stdout == ""


def test_an_unmeshed_workload_is_said_to_be_one(mesh: FakeMesh) -> None:
    result = run("identity", "old", "-n", "shop")
    assert result.exit_code == 1
    assert "old in namespace shop is not meshed: pillion.dev/inject is disabled\n" in result.stderr


@pytest.mark.parametrize("words", [("authz", "cart"), ("identity", "cart"), ("identity", "status"), ("diagnostics", "config", "cart")])
def test_no_mesh_running_says_how_to_start_one(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.setattr(client, "running", list)
    result = run(*words, "--name", "other")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: no mesh named 'other' is running here\n  try: pillion local up -f DIR --name other --detach\n",
    )


@pytest.mark.parametrize(
    "content", [b"[]", b"hello", b"\xff\xfe", b"!!python/name:os.system x", b"contexts: 5", b"current-context: c\ncontexts: [null]"]
)
def test_a_file_that_is_no_kubeconfig_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config").write_bytes(content)
    result = CliRunner(env={"KUBECONFIG": str(tmp_path / "config")}).invoke(cli, ["authz", "web"], prog_name="pillion")
    assert result.exit_code == 1 and result.output.startswith("error: no cluster: "), result.output
    with pytest.raises(NoCluster, match="kubeconfig"):
        kubeconfig_access(str(tmp_path / "config"))


def test_neither_a_mesh_here_nor_a_kubeconfig_says_how_to_name_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(name: str, *_: object) -> protocol.Answer:
        raise client.NotRunning(name)

    monkeypatch.setattr(client, "ask", nobody)
    monkeypatch.setattr(client, "running", list)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    result = run("authz", "cart")
    step = "pillion local up -f DIR --name default --detach; for a cluster: --kubeconfig FILE, or set KUBECONFIG"
    assert result.stderr == f"error: no mesh named 'default' is running here\n  try: {step}\n"


def test_an_api_server_that_is_away_is_named_with_the_cause_alone(tmp_path: Path) -> None:
    port = unused_port()
    config = {
        "clusters": [{"name": "a", "cluster": {"server": f"https://127.0.0.1:{port}"}}],
        "users": [{"name": "a", "user": {"token": "x"}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        "current-context": "a",
    }
    (tmp_path / "config").write_text(json.dumps(config), "utf-8")
    result = run("authz", "cart", "--kubeconfig", str(tmp_path / "config"))
    told = f"error: the API server at https://127.0.0.1:{port} does not answer: Connection refused\n  try: kubectl cluster-info\n"
    assert result.stderr.endswith(told)


def test_no_mesh_of_that_name_says_which_ones_run(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "running", lambda: ["demo", "shop"])
    result = run("authz", "cart", "--name", "other")
    assert result.stderr == "error: no mesh named 'other' is running here\n  try: --name with one of: demo, shop\n"


def test_a_silent_controller_is_named(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PILLION_DIAGNOSTICS_SOCKET", str(tmp_path / "none.sock"))
    result = run("authz", "cart", "-n", "shop")
    assert result.exit_code == 1
    assert "the policy controller of mesh 'default' does not answer" in result.stderr


def test_a_controllers_own_error_is_passed_on(mesh: FakeMesh, controller: dict[str, tuple[int, object]]) -> None:
    controller["/diagnostics/endpoints?addr=10.0.0.1%3A80"] = (503, {"error": "no Service is known yet"})
    result = run("diagnostics", "endpoints", "10.0.0.1:80")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the policy controller answered 503: no Service is known yet\n")


@pytest.mark.parametrize("address", ["web.shop", "web.shop:http", "web.shop.pod:80", "10.0.0.1", "10.0.0.1.:80", "fd00::1:80", "[fd00::1]"])
def test_an_address_that_is_none_is_refused_with_where_to_find_one(mesh: FakeMesh, address: str) -> None:
    result = run("diagnostics", "endpoints", "--name", "default", address)
    assert result.exit_code == 1 and address in result.stderr
    assert result.stderr.endswith("\n  try: pillion local status\n")


@pytest.mark.parametrize("words", [["web:80", "-n", "shop"], ["web.shop:80"], ["web.shop.svc:80"], ["web.shop.svc.cluster.local:80"]])
def test_endpoints_are_asked_for_by_the_name_that_an_app_dials(
    mesh: FakeMesh, controller: dict[str, tuple[int, object]], words: list[str]
) -> None:
    for address in ("10.1.0.9:80", "[fd00::9]:80"):
        found = {"kind": "service", "ref": {**SERVER, "kind": "Service", "name": "web"}, "endpoints": []}
        controller[f"/diagnostics/endpoints?{urlencode({'addr': address})}"] = (200, found)
    result = run("diagnostics", "endpoints", *words, "-o", "json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)) == ["10.1.0.9:80", "[fd00::9]:80"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wbe.shop:80", "there is no Service wbe in namespace shop"),
        ("web:80", "there is no Service web in namespace default"),
        ("db.shop:5432", "service shop/db has no address of its own"),
    ],
)
def test_a_service_that_is_not_there_or_has_no_address_is_said(mesh: FakeMesh, name: str, said: str) -> None:
    result = run("diagnostics", "endpoints", name)
    assert result.exit_code == 1 and said in result.stderr


def test_identity_shows_every_pods_certificate(mesh: FakeMesh) -> None:
    result = run("identity", "deploy/cart", "-n", "shop")
    assert result.exit_code == 0, result.output
    assert "shop/cart-1" in result.stdout and "shop/cart-2" in result.stdout
    assert "spiffe://cluster.local/ns/shop/sa/cart" in result.stdout and "1970-01-02 00:00:00Z" in result.stdout
    assert json.loads(run("identity", "-n", "shop", "cart", "-o", "json").stdout) == {"shop/cart": CERTS}


def test_identity_fails_for_a_pod_that_is_not_certified(mesh: FakeMesh) -> None:
    mesh.admin["/certs"] = (200, None)
    result = run("identity", "cart", "-n", "shop")
    assert result.exit_code == 1
    assert "not certified: shop/cart" in result.stderr


def test_a_sidecar_that_does_not_answer_is_named_with_its_log(mesh: FakeMesh) -> None:
    mesh.exit_code = 1
    result = run("diagnostics", "config", "cart", "-n", "shop")
    assert result.exit_code == 1
    assert "the sidecar of shop/cart does not answer" in result.stderr
    assert "pillion local logs -n shop cart -c pillion-proxy" in result.stderr


def test_diagnostics_show_what_a_sidecar_holds(mesh: FakeMesh) -> None:
    assert "8080  server shop/cart" in run("diagnostics", "policy", "cart", "-n", "shop").stdout
    assert "not known yet" in run("diagnostics", "policy", "cart", "-n", "shop").stdout
    assert "trust_domain   cluster.local" in run("diagnostics", "config", "cart", "-n", "shop").stdout
    known = run("diagnostics", "endpoints", "--of", "cart", "-n", "shop").stdout
    assert "10.1.0.1:80" in known and "(none)" in known and "10.1.0.2:80" in known
    only = run("diagnostics", "endpoints", "10.1.0.2:80", "--of", "cart", "-n", "shop", "-o", "json").stdout
    assert json.loads(only) == {"10.1.0.2:80": None}


def test_metrics_stay_readable_for_prometheus(mesh: FakeMesh) -> None:
    text = run("diagnostics", "proxy-metrics", "cart", "-n", "shop").stdout
    assert [family.name for family in text_string_to_metric_families(text)] == ["pillion_request"]
    found = json.loads(run("diagnostics", "proxy-metrics", "deploy/cart", "-n", "shop", "-o", "json").stdout)
    assert found["shop/cart-2"] == [{"name": "pillion_request_total", "labels": {"direction": "inbound"}, "value": 3}]


def test_nothing_that_a_pod_says_steers_the_terminal(mesh: FakeMesh, controller: dict[str, tuple[int, object]]) -> None:
    hostile = "a\x1b]0;title\x07\x9b2Jb\u202ec\rd"
    mesh.admin["/metrics"] = (200, f"# HELP x {hostile}\nx 1\n".encode())
    report: dict[str, Any] = {"why": hostile, "shadowed": [{**SERVER, "name": hostile}], "grants": [], "routes": []}
    controller["/diagnostics/policy?namespace=shop&pod=cart&port=8080"] = (200, report)
    controller["/diagnostics/authz?namespace=shop&pod=cart"] = (500, {"error": hostile})
    results = [
        run("diagnostics", "proxy-metrics", "cart", "-n", "shop"),
        run("diagnostics", "policy", "cart", "-n", "shop", "-p", "8080"),
        run("authz", "cart", "-n", "shop"),
    ]
    for shown in [result.stdout + result.stderr for result in results]:
        assert "a?]0;title??2Jb?c?d" in shown
        assert all(line.isprintable() for line in shown.split("\n"))


def test_diagnostics_policy_names_what_lets_requests_in_at_a_port_with_routes(mesh: FakeMesh) -> None:
    granted = [{"ref": {**SERVER, "kind": "AuthorizationPolicy", "name": "of-the-route"}}]
    routed = {**POLICY, "routes": [{"authorizations": granted}, {"authorizations": granted}, {"authorizations": []}]}
    mesh.admin["/policy"] = (200, {"8080": routed})
    [_, row] = run("diagnostics", "policy", "cart", "-n", "shop").stdout.splitlines()
    assert row.split() == ["8080", "server", "shop/cart", "http1", "3", "authorizationpolicy", "shop/of-the-route"]


def test_diagnostics_policy_of_a_port_explains_itself(mesh: FakeMesh, controller: dict[str, tuple[int, object]]) -> None:
    grant = {"policy": {**SERVER, "name": "web"}, "clients": "nobody", "problem": "no such MeshTLSAuthentication"}
    report: dict[str, Any] = {"why": "server shop/cart takes the port over", "shadowed": [SERVER], "grants": [grant], "routes": []}
    controller["/diagnostics/policy?namespace=shop&pod=cart&port=8080"] = (200, report)
    shown = run("diagnostics", "policy", "cart", "-n", "shop", "-p", "8080").stdout
    assert shown.startswith("server shop/cart takes the port over\nwithout effect")
    assert "no such MeshTLSAuthentication" in shown


def test_identity_status_and_a_step_of_a_rotation(identity_service: list[Answer]) -> None:
    identity_service += [Answer(status=STATUS), Answer(done="add", status=STATUS)]
    shown = run("identity", "status").stdout
    assert "next step of a rotation: switch" in shown and "shop/cart-1" in shown and "the next step waits: shop/cart-1" in shown
    result = run("identity", "rotate", "-o", "json")
    assert result.exit_code == 0
    assert result.stderr == "add: done; next step: switch\n"
    assert json.loads(result.stdout)["generation"] == 2


def test_a_refused_step_names_who_it_waits_for(identity_service: list[Answer]) -> None:
    identity_service.append(Answer(error="the step would break 1 workload", blocking=["shop/cart-1"]))
    result = run("identity", "rotate", "--step", "drop")
    assert result.exit_code == 1
    assert result.stderr == "error: the step would break 1 workload\n  not yet: shop/cart-1\n  try: pillion identity status\n"


def test_rotating_through_neither_forces_nor_picks_a_step() -> None:
    assert run("identity", "rotate", "--through", "--force").exit_code == 2


DEPLOYMENT = """apiVersion: apps/v1
kind: Deployment
metadata: {name: cart}
spec:
  template:
    metadata: {labels: {app: cart}}
    spec: {containers: [{name: app, command: [sleep], ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart}
"""


def test_inject_annotates_workloads_and_uninject_takes_it_back() -> None:
    import yaml

    injected = run("inject", "-", stdin=DEPLOYMENT)
    assert injected.exit_code == 0, injected.output
    deployment, service = yaml.safe_load_all(injected.stdout)
    assert deployment["spec"]["template"]["metadata"]["annotations"] == {"pillion.dev/inject": "enabled"}
    original = list(yaml.safe_load_all(DEPLOYMENT))
    assert service == original[1]
    assert run("inject", "-", stdin=injected.stdout).stdout == injected.stdout
    assert list(yaml.safe_load_all(run("uninject", "-", stdin=injected.stdout).stdout)) == original


def test_a_manifest_cannot_steer_the_terminal() -> None:
    manifest = {"kind": "Pod", "metadata": {"name": "a\x1b]0;b\x07", "annotations": {"pillion.dev/inject": "disabled"}}, "spec": {}}
    told = run("inject", "-", stdin=json.dumps(manifest)).stderr
    assert "left as it is" in told and all(line.isprintable() for line in told.split("\n"))


def test_manual_injection_writes_the_sidecar_and_uninject_takes_it_out_again() -> None:
    import yaml

    manual = run("inject", "--manual", "-", stdin=DEPLOYMENT)
    assert manual.exit_code == 0, manual.output
    template = next(yaml.safe_load_all(manual.stdout))["spec"]["template"]
    assert [container["name"] for container in template["spec"]["initContainers"]] == ["pillion-capture", "pillion-proxy"]
    assert run("inject", "--manual", "-", stdin=manual.stdout).stdout == manual.stdout
    result = run("uninject", "-", stdin=manual.stdout)
    assert "deployment cart: the sidecar is taken out" in result.stderr
    assert list(yaml.safe_load_all(result.stdout)) == list(yaml.safe_load_all(DEPLOYMENT))


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "kind: Deployment\nmetadata: 3\nspec: 4", "kind: Deployment\nspec: {template: {metadata: []}}"]
)
def test_a_manifest_that_is_none_is_refused_with_its_place(text: str) -> None:
    result = run("inject", "-", stdin=text)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.UsageError("no such option"), 2, "Error: no such option"),
        (CommandFailed("no cluster", "set KUBECONFIG"), 1, "error: no cluster\n  try: set KUBECONFIG"),
        (click.exceptions.Exit(3), 3, ""),
    ],
    ids=["ctrl-c", "usage", "failed", "exit"],
)
def test_however_a_command_ends_its_exit_code_is_the_documented_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], raised: BaseException, code: int, told: str
) -> None:
    @click.command()
    def command() -> None:
        raise raised

    monkeypatch.setattr(sys, "argv", ["pillion"])
    monkeypatch.setattr(cli_main, "cli", command)
    with pytest.raises(SystemExit) as ended:
        cli_main.main()
    assert ended.value.code == code
    assert capfd.readouterr().err.strip().endswith(told)


def test_a_reader_that_has_left_ends_a_command_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "cli.main", "completion", "bash"]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
