"""The local runner as a user sees it: pods, Services, files, probes, commands, live edits, and nothing left behind. No sidecars here."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_lab import COMMAND, PATIENCE_S, LocalMesh, descriptors, namespaces, wait_until

pytestmark = [pytest.mark.netns, pytest.mark.needs("curl", "setpriv")]

MANIFESTS = """
apiVersion: v1
kind: ConfigMap
metadata: {name: page, namespace: shop}
data: {index.html: "version 1\\n"}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
        - name: web
          image: python:3
          command: [python3, -m, http.server, "$(PORT)", --bind, "::"]
          workingDir: /pillion-test/not/on/this/machine
          env: [{name: PORT, value: "80"}]
          ports: [{name: http, containerPort: 80}]
          readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1}
          volumeMounts: [{name: page, mountPath: /pillion-test/not/on/this/machine}]
      volumes: [{name: page, configMap: {name: page}}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ipFamilyPolicy: PreferDualStack
  ports: [{port: 8080, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: shop}
spec: {selector: {app: nobody}, ports: [{port: 80}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop}
spec:
  serviceName: db
  replicas: 1
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: db
          command: [python3, -m, http.server, "5432"]
          readinessProbe: {exec: {command: [sh, -c, "test $HOSTNAME = db-0"]}, periodSeconds: 1}
          livenessProbe: {exec: {command: [test, "!", -e, /var/tmp/pillion-db/sick]}, periodSeconds: 1, failureThreshold: 2}
          volumeMounts: [{name: data, mountPath: /var/tmp/pillion-db}]
  volumeClaimTemplates: [{metadata: {name: data}}]
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 5432}]}
---
apiVersion: batch/v1
kind: Job
metadata: {name: once, namespace: shop}
spec:
  template:
    spec:
      restartPolicy: OnFailure
      volumes: [{name: tmp, emptyDir: {}}]
      containers:
        - name: main
          command: [sh, -c, "echo try; test -e /var/tmp/pillion-once/done || { touch /var/tmp/pillion-once/done; exit 3; }"]
          volumeMounts: [{name: tmp, mountPath: /var/tmp/pillion-once}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec:
  terminationGracePeriodSeconds: 1
  initContainers: [{name: first, command: [sh, -c, "echo init ran"]}]
  containers:
    - {name: main, command: [sleep, infinity]}
    - {name: second, command: [sh, -c, "trap 'exit 0' TERM; echo hi; sleep 3600 & wait"]}
"""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """One mesh for all tests that do not end it."""
    folder = tmp_path_factory.mktemp("manifests")
    (folder / "app.yaml").write_text(MANIFESTS)
    found = LocalMesh(f"test-{os.getpid()}", folder)
    try:
        started = found.up()
        assert started.returncode == 0, started.stderr + (found.state / "runner.log").read_text()
        assert started.stderr.count("images are ignored") == 1
        yield found
    finally:
        found.run("down")


def test_services_are_reached_by_name_over_ipv4_and_ipv6(mesh: LocalMesh) -> None:
    for name in ("web", "web.shop", "web.shop.svc.cluster.local"):
        for family in ("-4", "-6"):
            assert mesh.sh("client", f"curl -sS {family} -m 30 http://{name}:8080/index.html").stdout == "version 1\n", (name, family)


def test_both_replicas_answer(mesh: LocalMesh) -> None:
    mesh.sh("client", "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do curl -s http://web:8080/index.html; done")
    logs = mesh.run("logs", "-n", "shop", "web").stdout
    askers = {line.split("]")[0] for line in logs.splitlines() if "GET /index.html" in line}
    assert len(askers) == 2, logs


def test_a_headless_service_leads_to_its_pod(mesh: LocalMesh) -> None:
    address = mesh.pods()["db-0"]["addresses"][0]
    assert mesh.sh("client", "getent ahostsv4 db-0.db.shop.svc.cluster.local").stdout.startswith(address)
    assert mesh.sh("client", "curl -sS -m 30 -o /dev/null -w '%{http_code}' http://db:5432/").stdout == "200"


def test_a_service_with_nobody_behind_it_refuses_at_once(mesh: LocalMesh) -> None:
    found = mesh.sh("client", "curl -sS -m 30 http://nobody/")
    assert found.returncode == 7 and "Timeout" not in found.stderr


def test_an_unknown_name_fails_at_once(mesh: LocalMesh) -> None:
    assert mesh.sh("client", "curl -sS -m 3 http://no-such-name/").returncode == 6


def test_exec_is_the_pods_world_and_the_apps_user(mesh: LocalMesh) -> None:
    found = mesh.sh("client", "id -u; hostname; ls /proc | grep -c '^[0-9]*$'; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status")
    uid, hostname, count, *powers = found.stdout.split("\n")
    assert (uid, hostname) == ("65532", "client")
    assert int(count) < 15, "other pods' processes are visible"
    assert [line.split() for line in powers if line] == [["CapBnd:", "0" * 16], ["CapEff:", "0" * 16], ["NoNewPrivs:", "1"]] or [
        line.split()[1].strip("0") for line in powers if line
    ] == ["", "", "1"]


def test_exec_passes_on_code_input_and_output(mesh: LocalMesh) -> None:
    found = mesh.run("exec", "-n", "shop", "client", "--", "sh", "-c", "cat; echo err >&2; exit 42", input="in\n")
    assert (found.returncode, found.stdout, found.stderr) == (42, "in\n", "err\n")
    assert mesh.sh("web", "hostname").stdout.startswith("web-"), "POD may be a Deployment"
    assert mesh.run("exec", "-n", "shop", "client", "-c", "second", "--", "true").returncode == 0
    missing = mesh.run("exec", "-n", "shop", "nobody", "--", "true")
    assert missing.returncode == 1 and "no pod or workload 'nobody' in namespace shop" in missing.stderr


def test_a_command_that_is_interrupted_ends_in_the_pod(mesh: LocalMesh) -> None:
    words = [*COMMAND, "exec", "--name", mesh.name, "-n", "shop", "client", "--", "sleep", "98765"]
    running = subprocess.Popen(words)
    wait_until(lambda: "98765" in mesh.sh("client", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout.replace("cat", ""), "sleep runs")
    running.kill()
    running.wait()
    wait_until(lambda: "sleep 98765" not in mesh.sh("client", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout, "sleep has ended")


def test_files_of_a_config_map_appear_where_the_machine_has_no_such_folder(mesh: LocalMesh) -> None:
    assert not Path("/pillion-test").exists()
    assert mesh.sh("web", "ls /pillion-test/not/on/this/machine; pwd").stdout.split() == ["index.html", "/pillion-test/not/on/this/machine"]
    assert mesh.sh("client", "ls /pillion-test").returncode != 0, "only the container that mounts it sees it"


def test_logs_are_kept_by_container(mesh: LocalMesh) -> None:
    assert mesh.run("logs", "-n", "shop", "client", "-c", "first").stdout == "init ran\n"
    wait_until(lambda: mesh.run("logs", "-n", "shop", "client", "-c", "second").stdout == "hi\n", "its shell has said so")


def test_a_job_is_tried_again_and_ends(mesh: LocalMesh) -> None:
    wait_until(lambda: next(pod for name, pod in mesh.pods().items() if name.startswith("once-"))["phase"] == "Succeeded", "the job ends")
    assert mesh.run("logs", "-n", "shop", "once").stdout == "try\ntry\n"


def test_a_failing_liveness_probe_restarts_the_container(mesh: LocalMesh) -> None:
    before = mesh.pods()["db-0"]["containers"][0]["restarts"]
    assert mesh.sh("db", "touch /var/tmp/pillion-db/sick").returncode == 0
    wait_until(lambda: mesh.pods()["db-0"]["containers"][0]["restarts"] > before, "db restarts")
    assert "liveness probe kept failing" in mesh.run("logs", "-n", "shop", "db").stdout
    wait_until(lambda: mesh.sh("db", "rm /var/tmp/pillion-db/sick").returncode == 0, "the volume outlives the container")
    wait_until(lambda: mesh.pods()["db-0"]["ready"], "db is ready again")


def test_an_edited_config_map_reaches_the_running_pods(mesh: LocalMesh) -> None:
    file = mesh.folder / "app.yaml"
    before = set(mesh.pods())
    file.write_text(file.read_text().replace("version 1", "version 2"))
    wait_until(lambda: mesh.sh("client", "curl -s http://web:8080/").stdout == "version 2\n", "the new content is served")
    assert set(mesh.pods()) == before
    file.write_text(file.read_text().replace("version 2", "version 1"))
    wait_until(lambda: mesh.sh("client", "curl -s http://web:8080/").stdout == "version 1\n", "the old content is back")


def test_an_edited_template_is_rolled_out_and_an_edited_count_scales(mesh: LocalMesh) -> None:
    file = mesh.folder / "app.yaml"
    before = {name for name in mesh.pods() if name.startswith("web-")}
    file.write_text(file.read_text().replace('value: "80"}', 'value: "80"}, {name: NEW, value: "1"}').replace("replicas: 2", "replicas: 3"))

    def rolled() -> bool:
        now = {name: pod for name, pod in mesh.pods().items() if name.startswith("web-")}
        return not before & set(now) and len(now) == 3 and all(pod["ready"] for pod in now.values())

    wait_until(rolled, "three new pods, no old one", 3 * PATIENCE_S)
    assert mesh.sh("web", "echo $NEW").stdout == "1\n"
    file.write_text(file.read_text().replace("replicas: 3", "replicas: 2"))
    wait_until(lambda: len([name for name in mesh.pods() if name.startswith("web-")]) == 2, "one pod goes")


def test_a_broken_edit_keeps_the_last_good_state_and_says_so(mesh: LocalMesh) -> None:
    file = mesh.folder / "app.yaml"
    good = file.read_text()
    file.write_text(good.replace("kind: Deployment\nmetadata: {name: web", "kind: Deployment\nmetadata: {name: Web!", 1) + "\n---\n{broken")
    wait_until(lambda: any("app.yaml" in reason for reason in mesh.status()["reasons"]), "the refusal is shown")
    assert mesh.sh("client", "curl -s http://web:8080/").stdout == "version 1\n"
    file.write_text(good)
    wait_until(lambda: not mesh.status()["reasons"], "the refusal is gone")


def test_objects_are_applied_and_deleted_beside_the_folder(mesh: LocalMesh, tmp_path: Path) -> None:
    file = tmp_path / "extra.yaml"
    file.write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: extra, namespace: shop}\nspec: {containers: [{name: a, command: [sleep, '9999']}]}\n"
    )
    assert mesh.run("apply", "-f", str(file)).stdout == "pod shop/extra created\n"
    wait_until(lambda: mesh.pods().get("extra", {}).get("ready"), "the pod is ready")
    assert mesh.run("delete", "-f", str(file)).stdout == "pod shop/extra deleted\n"
    wait_until(lambda: "extra" not in mesh.pods(), "the pod is gone")
    assert mesh.run("delete", "-f", str(file)).returncode == 1
    file.write_text("apiVersion: v1\nkind: Pod\nmetadata: {name: extra}\nspec: {containers: [{name: a}]}\n")
    refused = mesh.run("apply", "-f", str(file))
    assert refused.returncode == 1 and "spec.containers[0].command" in refused.stderr


def test_a_second_mesh_of_the_same_name_is_refused(mesh: LocalMesh) -> None:
    again = mesh.up()
    assert again.returncode == 1 and "is running already" in again.stderr


def test_up_fails_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        """
apiVersion: v1
kind: Pod
metadata: {name: crashes}
spec: {containers: [{name: main, command: [/no/such/program]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: waits}
spec: {containers: [{name: main, command: [sleep, "9"], envFrom: [{configMapRef: {name: missing}}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: typo, annotations: {pillion.dev/inject: enabled, config.pillion.dev/log-level: loud}}
spec: {containers: [{name: main, command: [sleep, "9"]}]}
"""
    )
    mesh = LocalMesh(f"bad-{os.getpid()}", tmp_path)
    try:
        for seconds in ("2", "20"):  # what a pod waits for is known at once, that it crashes when it has started
            found = mesh.run("up", "-f", str(tmp_path), "--detach", "--timeout", seconds)
            assert found.returncode == 1
            if "exited with" in found.stderr:
                break
            mesh.run("down")
        assert "pod default/crashes: container main exited with 127" in found.stderr
        assert "pod default/waits: ConfigMap missing does not exist" in found.stderr
        assert "config.pillion.dev/log-level of the pod is 'loud'" in found.stderr
    finally:
        mesh.run("down")


def test_in_the_foreground_the_mesh_ends_with_its_command(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: one}\nspec: {containers: [{name: a, command: [sleep, '9999']}]}\n"
    (tmp_path / "app.yaml").write_text(pod)
    mesh = LocalMesh(f"fore-{os.getpid()}", tmp_path)
    request.addfinalizer(lambda: mesh.run("down"))
    command = subprocess.Popen([*COMMAND, "up", "--name", mesh.name, "-f", str(tmp_path)], stderr=subprocess.PIPE)
    assert command.stderr is not None
    with command.stderr as said:
        while b"1 of 1 pods ready" not in said.readline():
            pass
    runner = os.pidfd_open(mesh.runner_pid())
    command.kill()  # not even a chance to clean up
    command.wait()
    assert select.select([runner], [], [], PATIENCE_S)[0], "the runner survived"
    os.close(runner)


@pytest.mark.parametrize("how", ["down", "kill"])
def test_nothing_is_left_after_down_or_a_killed_runner(how: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "app.yaml").write_text(MANIFESTS)
    mesh = LocalMesh(f"gone-{how}-{os.getpid()}", tmp_path)
    before = set(Path("/proc/self/mounts").read_text().splitlines())
    request.addfinalizer(lambda: mesh.run("down"))
    assert mesh.up().returncode == 0
    members = mesh.members()
    assert len(namespaces(members, "net")) == 5, "the node and four pods; the job has ended"
    fds = descriptors(members)
    if how == "kill":
        os.kill(mesh.runner_pid(), signal.SIGKILL)
    else:
        assert mesh.run("down").returncode == 0
    for fd in fds:
        assert select.select([fd], [], [], PATIENCE_S)[0], "a process survived"
        os.close(fd)
    mounts = set(Path("/proc/self/mounts").read_text().splitlines()) - before  # others mount things meanwhile
    assert not [line for line in mounts if mesh.name in line or line.split()[1].startswith(("/etc/", "/root", "/home", "/run/pillion"))]
    if how == "down":
        assert not mesh.state.exists()
    else:
        assert mesh.up().returncode == 0, "what a killed runner leaves must not be in the way"
        assert mesh.run("down").returncode == 0
