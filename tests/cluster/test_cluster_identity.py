"""Certificates on a real cluster: who gets one and who does not, the trust bundle in every namespace, rotation, loss of replicas."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.conftest import PILLION, Ground
from tests.cluster.kube import OUTSIDE, Object, Refused, Space, client, service, until, workload

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

_TOKENS = "/var/run/tokens"
_ASK = """
import json, sys, trio
from pathlib import Path
from core.names import parse_workload_id
from core.runtime.watch import Cell
from identity.client import IdentitySettings, keep_certified

class Told:
    def certified(self, credentials): end(certified=credentials.identity.uri, anchors=credentials.bundle_pem.count(b"BEGIN"))
    def bundle_changed(self, credentials, generation): pass
    def failed(self, reason, detail, retry_in_s): end(reason=reason, detail=detail)

def end(**said):
    print(json.dumps(said), flush=True)
    scope.cancel()

wanted, token = sys.argv[1:]
Path("/tmp/token").write_text(Path(token).read_text() if token.startswith("/") else token)
service = parse_workload_id("spiffe://cluster.local/ns/pillion/sa/pillion-identity")
settings = IdentitySettings(
    ("pillion-identity.pillion.svc", 8080), service, parse_workload_id(wanted), Path("/tmp/token"), Path("/anchors/ca-bundle.crt"))
scope = trio.CancelScope()

async def main():
    with scope:
        await keep_certified(settings, Cell(None), Told())

trio.run(main)
"""
"""Asks the identity service for a certificate in the name of argument 1, by the token in (or given as) argument 2; says what came of it."""


def asker(ground: Ground, name: str, account: str) -> Object:
    """An unmeshed pod with tokens of its service account for the identity service and for somebody else."""

    def token(path: str, audience: str) -> Object:
        return {"serviceAccountToken": {"path": path, "audience": audience, "expirationSeconds": 3600}}

    mounts = [("tokens", _TOKENS), ("anchors", "/anchors"), ("tmp", "/tmp")]
    spec = {
        "serviceAccountName": account,
        "terminationGracePeriodSeconds": 0,
        "containers": [
            {
                "name": "app",
                "image": ground.image,
                "imagePullPolicy": "IfNotPresent",
                "command": ["sleep", "3600"],
                "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts],
            }
        ],
        "volumes": [
            {"name": "tokens", "projected": {"sources": [token("ours", "identity.pillion.dev"), token("vault", "vault")]}},
            {"name": "anchors", "configMap": {"name": "pillion-trust-anchors"}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "annotations": OUTSIDE}, "spec": spec}


@pytest.fixture(scope="module", autouse=True)
def three(mesh: Space) -> Iterator[Space]:
    """The identity service with three replicas, for the whole file: a rotation waits until each has been up for 45 s."""
    mesh.run("scale", "deployment/pillion-identity", "--replicas=3")
    mesh.rolled_out("deployment/pillion-identity")
    yield mesh
    mesh.run("scale", "deployment/pillion-identity", "--replicas=1")


@pytest.fixture(scope="module")
def bank(ground: Ground, make_space: Callable[..., Space]) -> Space:
    """Service accounts ``teller`` and ``thief``, each with a pod of that name."""
    made = make_space("bank")
    for name in ("teller", "thief"):
        made.run("create", "serviceaccount", name)
        made.apply(asker(ground, name, name))
    made.ready("teller", "thief")
    return made


def ask(space: Space, pod: str, account: str, token: str = f"{_TOKENS}/ours") -> Any:
    """What the identity service says to ``pod`` that wants to be ``account``."""
    return json.loads(space.exec(pod, "python", "-c", _ASK, f"spiffe://cluster.local/ns/{space.name}/sa/{account}", token))


def test_a_pod_is_certified_for_its_own_service_account(bank: Space) -> None:
    assert ask(bank, "teller", "teller")["certified"] == f"spiffe://cluster.local/ns/{bank.name}/sa/teller"


def test_the_token_of_another_service_account_is_refused_and_its_pod_says_so(bank: Space) -> None:
    said = ask(bank, "thief", "teller")
    assert said["reason"] == "status-403"
    assert f"the token is of spiffe://cluster.local/ns/{bank.name}/sa/thief" in said["detail"]
    until("an Event on the pod", lambda: "IdentityMismatch" in bank.run("describe", "pod", "thief"))
    assert "IdentityMismatch" not in bank.run("describe", "pod", "teller")


def test_a_token_for_another_audience_is_refused(bank: Space) -> None:
    said = ask(bank, "teller", "teller", f"{_TOKENS}/vault")
    assert said["reason"] == "status-401"
    assert "audience" in said["detail"]


def test_the_token_of_a_deleted_pod_is_refused(ground: Ground, bank: Space) -> None:
    bank.apply(asker(ground, "leaver", "teller"))
    bank.ready("leaver")
    token = bank.exec("leaver", "cat", f"{_TOKENS}/ours").strip()
    assert "certified" in ask(bank, "thief", "teller", token)  # whoever steals a live token is its owner: why it lives only in the pod
    bank.run("delete", "pod", "leaver")
    # kube-apiserver remembers a review for ten seconds.
    said = until("the token is refused", lambda: _refused(ask(bank, "thief", "teller", token)))
    assert said["reason"] == "status-401"
    assert "the API server does not accept the token" in said["detail"]


def _refused(said: Any) -> Any:
    return said if "reason" in said else None


def test_an_admin_token_and_nonsense_are_refused(bank: Space) -> None:
    unbound = bank.run("create", "token", "teller", "--audience=identity.pillion.dev").strip()
    assert "not bound to a pod" in ask(bank, "thief", "teller", unbound)["detail"]
    assert ask(bank, "thief", "teller", "nonsense")["reason"] == "status-401"


def bundle(space: Space) -> str:
    found = space.json("get", "configmaps", "--field-selector=metadata.name=pillion-trust-anchors")["items"]
    return str(found[0]["data"]["ca-bundle.crt"]) if found else ""


def test_the_bundle_is_written_repaired_and_restored_in_every_namespace(mesh: Space, make_space: Callable[..., Space]) -> None:
    fresh = make_space("fresh")
    wanted = until("the control plane's bundle", lambda: bundle(mesh))
    until("a new namespace's bundle", lambda: bundle(fresh) == wanted)
    fresh.run("patch", "configmap", "pillion-trust-anchors", "--type=merge", '--patch={"data": {"ca-bundle.crt": "evil"}}')
    until("the edit is repaired", lambda: bundle(fresh) == wanted)
    fresh.run("delete", "configmap", "pillion-trust-anchors")
    until("the bundle comes back", lambda: bundle(fresh) == wanted)


def pillion(ground: Ground, *words: str) -> str:
    done = tried(ground, *words)
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"
    return done.stdout


def tried(ground: Ground, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*PILLION, *words, "--kubeconfig", ground.kube.kubeconfig]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def leader(mesh: Space) -> str:
    return str(mesh.json("get", "lease", "pillion-identity")["spec"].get("holderIdentity") or "")


def test_the_trust_anchor_is_rotated_under_load_over_three_replicas(ground: Ground, bank: Space, space: Space) -> None:
    # they asked once and report no more: each would be waited for until it is called absent, but a pod that is gone is not
    bank.run("delete", "pods", "--all")
    space.apply(workload("Deployment", "web", replicas=2), service("web"), client())
    space.rolled_out("deployment/web")
    space.ready("client")
    before, old = bundle(space), set(issuers(ground, space))
    with space.load("client", "http://web/", "--fresh") as load:
        rotated = tried(ground, "identity", "rotate", "--through", "--wait", "240", "--ignore-absent")
    assert rotated.returncode == 0, rotated.stderr
    assert [line.partition(":")[0] for line in rotated.stderr.splitlines()] == ["add", "switch", "drop"]
    assert load.calls > 100
    assert load.failed == 0, load.failures
    until("the new bundle", lambda: bundle(space) not in ("", before))
    status = json.loads(pillion(ground, "identity", "status", "-o", "json"))
    assert len(status["anchors"]) == 1
    assert not old & set(issuers(ground, space))


def issuers(ground: Ground, space: Space) -> list[str]:
    """Of the certificates that web's pods present."""
    found = json.loads(pillion(ground, "identity", "web", "-n", space.name, "-o", "json"))
    return [certs["chain"][0]["issuer"] for certs in found.values()]


def test_the_loss_of_the_leader_costs_neither_certificates_nor_the_next_rotation(ground: Ground, three: Space, space: Space) -> None:
    space.apply(asker(ground, "teller", "default"))
    space.ready("teller")
    first = until("somebody leads", lambda: leader(three))
    three.run("delete", "pod", first, "--grace-period=0", "--force")
    second = until("another replica leads", lambda: (found := leader(three)) not in ("", first) and found)
    assert second != first
    assert "certified" in until("a certificate", lambda: _certified(ask(space, "teller", "default")))
    pillion(ground, "identity", "rotate", "--step", "add")
    pillion(ground, "identity", "rotate", "--step", "abort")


def _certified(said: Any) -> Any:
    return said if "certified" in said else None


def test_the_service_account_may_do_nothing_else_with_secrets(ground: Ground, mesh: Space) -> None:
    who = "--as=system:serviceaccount:pillion:pillion-identity"
    for verb, what in (
        ("list", "secrets"),
        ("create", "secrets"),
        ("get", "secrets/other"),
        ("create", "configmaps"),
        ("get", "pods/exec"),
    ):
        with pytest.raises(Refused):
            mesh.run("auth", "can-i", verb, what, who)
    assert mesh.run("auth", "can-i", "update", "secrets/pillion-issuer", who).strip() == "yes"
