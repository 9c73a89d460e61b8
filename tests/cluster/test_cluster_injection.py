"""Injection by the webhook that a real API server calls: what pods get, who is told why not, and that a second look changes nothing."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.k8s.serving_pair import make_pair
from tests.cluster.conftest import Ground
from tests.cluster.kube import OUTSIDE, Object, Refused, Space, client, container, pod, pod_spec, service, until, workload

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PREFIX = "config.pillion.dev/"
BY_INIT = {"pillion.dev/inject": "enabled", PREFIX + "capture": "init"}


def created(space: Space, what: Object, *, dry: bool = True) -> Object:
    """What the API server makes of an object, without storing it unless asked to."""
    words = ["create", "-f", "-", "-o", "json", *(["--dry-run=server"] if dry else [])]
    found: Object = json.loads(space.run(*words, input=json.dumps(what)))
    return found


def names(found: Object, field: str = "initContainers") -> list[str]:
    return [each["name"] for each in found["spec"].get(field, [])]


def events(space: Space, reason: str) -> list[Object]:
    found: list[Object] = space.json("get", "events.events.k8s.io")["items"]
    return [event for event in found if event["reason"] == reason]


def test_a_dry_run_shows_the_pod_as_it_would_be_and_does_nothing(space: Space) -> None:
    assert names(created(space, client())) == ["pillion-proxy"]
    refused = client(annotations={PREFIX + "log-level": "loud"})
    with pytest.raises(Refused, match="'loud': expected one of debug, info, warning, error"):
        created(space, refused)
    with pytest.raises(Refused):
        created(space, refused, dry=False)
    until("the event of the second one", lambda: events(space, "InjectionRefused"))
    (event,) = events(space, "InjectionRefused")
    assert "series" not in event, "the dry run left no trace"


def test_a_pod_in_a_user_namespace_of_its_own_is_captured_by_an_init_container_or_refused(space: Space) -> None:
    own = client(annotations={PREFIX + "capture": "agent"})
    own["spec"]["hostUsers"] = False
    with pytest.raises(Refused, match=r"hostUsers: false.*config.pillion.dev/capture: init"):
        created(space, own)
    own["metadata"]["annotations"] = {PREFIX + "capture": "init"}
    found = created(space, own)
    assert names(found) == ["pillion-capture", "pillion-proxy"] and found["spec"]["hostUsers"] is False


def test_the_owner_of_a_pod_is_told_why_it_has_no_sidecar(space: Space) -> None:
    space.apply(workload("Deployment", "outside", pod_spec(container("app", "serve", "--http", "18099"), hostNetwork=True)))
    (event,) = until("an event", lambda: events(space, "InjectionSkipped"))
    assert event["regarding"]["kind"] == "ReplicaSet" and "hostNetwork" in event["note"]
    assert event["reportingController"] == "pillion.dev/injector"
    space.rolled_out("deployment/outside")


@pytest.fixture(scope="module")
def refused(make_space: Callable[..., Space]) -> Space:
    """A Deployment whose pods are asked for again and again, in vain."""
    made = make_space("refused")
    made.apply(workload("Deployment", "wrong", annotations={PREFIX + "skip-inbound-ports": "http 9000"}))
    return made


def test_a_deployment_that_is_refused_says_so(refused: Space) -> None:
    def failed() -> list[str]:
        (found,) = refused.json("get", "replicasets")["items"] or [{}]
        conditions = found.get("status", {}).get("conditions", [])
        return [each["message"] for each in conditions if each["type"] == "ReplicaFailure"]

    (message,) = until("the ReplicaSet to say why", failed)
    assert "annotation config.pillion.dev/skip-inbound-ports of the pod is 'http 9000'" in message
    until("an event", lambda: events(refused, "InjectionRefused"))


def test_without_an_agent_an_init_container_captures(make_space: Callable[..., Space]) -> None:
    space = make_space("by-init", BY_INIT)
    space.apply(workload("Deployment", "web"), service("web"), client(), client("outside", annotations=OUTSIDE))
    space.rolled_out("deployment/web")
    space.ready("client", "outside")
    answered = space.call("client", "http://web/")
    assert answered["body"]["headers"]["pillion-client-id"] == f"spiffe://cluster.local/ns/{space.name}/sa/default"
    space.run("annotate", "namespace", space.name, PREFIX + "default-inbound-policy=all-authenticated")
    until("the default policy to count", lambda: space.call("outside", "http://web/").get("status") == 403)
    assert space.call("client", "http://web/")["status"] == 200


def test_a_classic_sidecar_is_ready_first_and_serves_while_the_app_ends(make_space: Callable[..., Space]) -> None:
    space = make_space("classic", BY_INIT)
    space.apply(workload("Deployment", "web", annotations={PREFIX + "access-log": "all"}), service("web"))
    space.rolled_out("deployment/web")
    once = container("app", "call", "http://web/")
    classic = {"pillion.dev/inject": "enabled", PREFIX + "native-sidecar": "false"}
    # an app that ends with its pod still has its sidecar for a while
    last = "trap 'python3 /app/app.py call http://web/last-words; exit 0' TERM; sleep 600 & wait"
    late = pod("late", pod_spec(container("app", "-c", last, command=["sh"])), annotations=classic)
    space.apply(pod("once", pod_spec(once, restartPolicy="Never"), annotations=classic), late)
    asked = until("the app to end", lambda: _ended(space, "once"))
    assert asked["exitCode"] == 0, space.run("logs", "once", "-c", "app")
    answered = json.loads(space.run("logs", "once", "-c", "app"))
    assert answered["status"] == 200 and "pillion-client-id" in answered["body"]["headers"], "its very first call went through the mesh"
    space.ready("late")
    space.run("delete", "pod", "late", "--wait=false")
    (line,) = until("its last words", lambda: _logged(space, "/last-words"))
    assert json.loads(line)["client_id"].endswith("/sa/default"), line


def _logged(space: Space, path: str) -> list[str]:
    """What the sidecar of ``web`` has in its access log about a path."""
    log = space.run("logs", "deployment/web", "-c", "pillion-proxy")
    return [line for line in log.splitlines() if path in line]


def _ended(space: Space, name: str) -> Any:
    found = space.json("get", "pod", name)["status"].get("containerStatuses", [])
    return next((each["state"]["terminated"] for each in found if each["name"] == "app" and "terminated" in each["state"]), None)


def test_by_hand_is_as_by_webhook_and_a_second_time_changes_nothing(space: Space, ground: Ground, tmp_path: Path) -> None:
    settings = tmp_path / "mesh.yaml"
    settings.write_text(ground.kube.run("--namespace=pillion", "get", "configmap", "pillion-config", "-o", r"jsonpath={.data.mesh\.yaml}"))
    # nothing that the API server fills in before webhooks are asked
    probe = {
        "httpGet": {"path": "/ready", "port": 8080, "scheme": "HTTP"},
        "periodSeconds": 10,
        "timeoutSeconds": 1,
        "successThreshold": 1,
        "failureThreshold": 3,
    }
    plain = client(annotations={"pillion.dev/inject": "enabled"})
    plain["spec"]["automountServiceAccountToken"] = False
    plain["spec"]["containers"][0]["livenessProbe"] = probe
    words = [sys.executable, "-m", "cli.main", "inject", "--manual", "--mesh", str(settings), "-"]
    done = subprocess.run(words, input=yaml.safe_dump(plain), capture_output=True, text=True, check=True)
    by_hand, by_webhook = (_bare(created(space, what)) for what in (yaml.safe_load(done.stdout), plain))
    assert by_hand == by_webhook
    assert _bare(created(space, {key: value for key, value in by_webhook.items() if key != "status"})) == by_webhook


def _bare(found: Object) -> Object:
    for key in ("uid", "creationTimestamp", "resourceVersion", "managedFields"):
        found["metadata"].pop(key, None)
    return found


LATE = """
import base64, json, ssl, http.server
PATCH = [{"op": "add", "path": "/spec/containers/-", "value": {
    "name": "late", "image": "%(image)s", "imagePullPolicy": "IfNotPresent", "args": ["serve", "--http", "8090"],
    "ports": [{"containerPort": 8090}], "readinessProbe": {"httpGet": {"path": "/ready", "port": 8090}, "periodSeconds": 1}}}]
class Late(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["request"]
        answer = {"uid": asked["uid"], "allowed": True}
        if not any(each["name"] == "late" for each in asked["object"]["spec"]["containers"]):
            answer |= {"patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(PATCH).encode()).decode()}
        body = json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
server = http.server.ThreadingHTTPServer(("", 8443), Late)
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain("/tls/tls.crt", "/tls/tls.key")
server.socket = tls.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def test_what_another_webhook_adds_afterwards_is_meshed_too(make_space: Callable[..., Space]) -> None:
    space = make_space("late")
    pair = make_pair([f"late.{space.name}.svc"], time.time())
    data = {name: base64.b64encode(content).decode() for name, content in pair.files().items()}
    script = LATE % {"image": container()["image"]}
    app = {**container("app", "-c", script, command=["python3"]), "volumeMounts": [{"name": "tls", "mountPath": "/tls"}]}
    hook = pod("late", pod_spec(app, volumes=[{"name": "tls", "secret": {"secretName": "late"}}]), annotations=OUTSIDE)
    space.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "late"}, "data": data}, hook, service("late", 443, 8443))
    space.ready("late")
    webhook = {
        "name": "late.example.org",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
        "clientConfig": {
            "service": {"name": "late", "namespace": space.name},
            "caBundle": base64.b64encode(pair.ca_pem).decode(),
        },
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": space.name}},
        "objectSelector": {"matchLabels": {"app": "web"}},
    }
    # the API server asks in the order of the configurations' names: this one after ours
    name = f"zz-{space.name}"
    configuration = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration", "metadata": {"name": name}}
    space.kube.apply({**configuration, "webhooks": [webhook]})
    try:
        until("the other webhook to be asked", lambda: "late" in names(created(space, pod("web")), "containers"))
        found = created(space, pod("web"), dry=False)
        (late,) = [each for each in found["spec"]["containers"] if each["name"] == "late"]
        assert late["readinessProbe"]["httpGet"]["path"] == "/pillion-probe/late/readinessProbe"
        (proxy,) = [each for each in found["spec"]["initContainers"] if each["name"] == "pillion-proxy"]
        env = {each["name"]: each.get("value") for each in proxy["env"]}
        assert env["PILLION_INBOUND_PORTS"] == "8080,8090"
        space.ready("web")
    finally:
        space.kube.run("delete", "mutatingwebhookconfiguration", name)


def test_mesh_settings_are_followed_while_the_injector_runs(space: Space, mesh: Space) -> None:
    """The kubelet brings a changed ConfigMap within a minute or so, at once to a pod that changes itself."""
    before = mesh.json("get", "configmap", "pillion-config")["data"]["mesh.yaml"]
    marked = yaml.safe_load(before)
    marked["defaults"] = {**(marked.get("defaults") or {}), "detect-timeout": "11s"}

    def write(settings: str) -> None:
        mesh.run("patch", "configmap", "pillion-config", "-p", json.dumps({"data": {"mesh.yaml": settings}}))
        mesh.run("annotate", "pods", "--selector=app.kubernetes.io/component=injector", "--overwrite", f"look-again={time.monotonic()}")

    def seen() -> bool:
        found = created(space, client())
        sidecars = [each for each in found["spec"].get("initContainers", []) if each["name"] == "pillion-proxy"]
        return any(each["name"] == "PILLION_DETECT_TIMEOUT_S" for sidecar in sidecars for each in sidecar["env"])

    try:
        write(yaml.safe_dump(marked))
        until("the new default", seen, seconds=150, pause=1)
    finally:
        write(before)
    until("the old one again", lambda: not seen(), seconds=150, pause=1)


def test_a_serving_certificate_that_is_lost_is_made_again_and_known(space: Space, mesh: Space) -> None:
    def bundle() -> str:
        found = mesh.kube.json("get", "mutatingwebhookconfiguration", "pillion-injector")
        return str(found["webhooks"][0]["clientConfig"]["caBundle"])

    before = bundle()
    lost = dict.fromkeys(("tls.crt", "tls.key", "ca.crt"), "")  # empty, because a Secret that cert-manager made must have the first two
    mesh.run("patch", "secret", "pillion-injector-tls", "--type=merge", "-p", json.dumps({"data": lost}))
    until("a new authority", lambda: bundle() != before, pause=1)
    until("the webhook to be asked again", lambda: names(created(space, client())) == ["pillion-proxy"])


def test_what_is_refused_again_and_again_is_counted_on_its_event(refused: Space) -> None:
    """Last, because a count is brought up to date half a minute after its Event."""
    until("a count", lambda: [event for event in events(refused, "InjectionRefused") if (event.get("series") or {}).get("count", 0) > 1])
