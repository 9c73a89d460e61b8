"""cert-manager as docs/install.md says it is used: it issues what the webhooks serve, and no renewal lets a pod go without its sidecar."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cli.check.certificates import WEBHOOKS
from core.names import WorkloadId
from identity.issuer import load_issuer, sign_leaf
from tests.cluster import images, kit
from tests.cluster.conftest import Ground
from tests.cluster.kube import Kube, Object, Refused, Space, client, until
from tests.cluster.test_cluster_install import checked
from tools import helm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

_DOCS = Path(__file__).parents[2] / "docs" / "install.md"
_HOOKS = {"injector": "mutatingwebhookconfiguration", "policy": "validatingwebhookconfiguration"}
_DEPLOYMENTS = [f"deployment/pillion-{component}" for component in _HOOKS]
_SECRETS = [f"pillion-{component}-tls" for component in _HOOKS]
_CERTIFICATES = [f"pillion-{component}" for component in _HOOKS]
_RENEWED_WITHIN_S = 180.0  # components look every 10 s; the rest is for a machine that has much else to do


def documented(*, authority: bool = False) -> list[Object]:
    """What docs/install.md says to apply: for the webhooks' certificates, or for the mesh's authority."""
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", _DOCS.read_text(), re.S) if "cert-manager.io/v1" in block]
    (found,) = [block for block in blocks if ("isCA" in block) is authority]
    return list(yaml.safe_load_all(found))


# --- cert-manager --------------------------------------------------------------------------------------------------------------------


def _chart(kube: Kube) -> str:
    """The manifests of cert-manager's own chart, all components from our image."""
    repository, _, tag = images.CERT_MANAGER_IMAGE.rpartition(":")

    def component(role: str) -> Object:
        image = {"repository": repository, "tag": tag}  # names no user, as cert-manager's own does
        return {"image": image, "securityContext": {"runAsUser": 1000}, "extraEnv": [{"name": "ROLE", "value": role}]}

    values = {
        **component("controller"),
        "cainjector": component("cainjector"),
        "webhook": component("webhook"),
        "crds": {"enabled": True, "keep": False},
        "livenessProbe": {"enabled": False},  # asks how the leader's election goes
        "startupapicheck": {"enabled": False},  # a program that we do not have
    }
    version = kube.json("version")["serverVersion"]["gitVersion"]
    chart = str(kit.have("cert-manager") / "chart")
    words = [str(helm.ensure()), "template", "cert-manager", chart, "-n=cert-manager", f"--kube-version={version}", "-f=-"]
    done = subprocess.run(words, input=yaml.safe_dump(values), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cert_manager(ground: Ground) -> Iterator[None]:
    """cert-manager, up and answering; gone afterwards with its kinds and everything that has them."""
    if ground.nodes is None:
        pytest.skip("the machines of this cluster are out of reach, and with them its images")
    if missing := helm.available():
        pytest.skip(missing)
    kube = ground.kube
    ground.nodes.load(images.cert_manager())
    manifests = _chart(kube)
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "cert-manager"}}
    started = time.monotonic()
    try:
        kube.apply(namespace)
        kube.apply(manifests)
        Space(kube, "cert-manager").rolled_out(*(f"deployment/cert-manager{part}" for part in ("", "-cainjector", "-webhook")))
        until("cert-manager's webhook answers", lambda: _accepted(kube, *documented()))
        kit.say(f"cert-manager {kit.CERT_MANAGER} is up after {time.monotonic() - started:.0f} s")
        yield
    finally:
        kube.run("delete", "--ignore-not-found", "--timeout=120s", "-f", "-", input=manifests, timeout=180)
        kube.run("delete", "namespace", "cert-manager", "--ignore-not-found", timeout=180)


def _accepted(kube: Kube, *wanted: Object) -> bool:
    try:
        kube.apply(*wanted)
    except Refused:  # the API server does not know yet what the webhook's certificate is signed by
        return False
    return True


# --- Pillion with it -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issued(ground: Ground, mesh: Space, cert_manager: None) -> Iterator[Space]:
    """The session's mesh with certificates from cert-manager, and afterwards with its own again, the way that is documented."""
    kube = ground.kube
    kube.apply(ground.install("--set", "certManager.enabled=true"))
    try:
        mesh.run("wait", "--for=condition=Ready", "--timeout=180s", *(f"certificate/{name}" for name in _CERTIFICATES), timeout=190)
        _settled(mesh)
        until("everybody serves what was issued", lambda: all(served(mesh, component) for component in _HOOKS), _RENEWED_WITHIN_S)
        yield mesh
    finally:
        mesh.run("delete", "certificate", "--ignore-not-found", *_CERTIFICATES)
        for secret in _SECRETS:
            with suppress(Refused):  # a test that failed half-way may have left none
                mesh.run("annotate", "secret", secret, "cert-manager.io/certificate-name-")
        kube.apply(ground.install())
        _settled(mesh)


def _settled(mesh: Space) -> None:
    """Only pods of the newest installation are there."""
    mesh.rolled_out(*_DEPLOYMENTS)
    for component in _HOOKS:
        until(f"one {component}", lambda name=component: len(_pods(mesh, name)) == 1)  # type: ignore[misc]


def _pods(mesh: Space, component: str) -> list[Object]:
    """Ending ones too."""
    return list(mesh.json("get", "pods", f"--selector=app.kubernetes.io/component={component}")["items"])


def certificate(mesh: Space, component: str) -> x509.Certificate | None:
    """What lies in the Secret; None while there is none."""
    found = mesh.json("get", "secrets", f"--field-selector=metadata.name=pillion-{component}-tls")["items"]
    text = (found[0].get("data") or {}).get("tls.crt", "") if found else ""
    return x509.load_pem_x509_certificate(base64.b64decode(text)) if text else None


def served(mesh: Space, component: str) -> bool:
    """The API server trusts what lies in the Secret (self-signed, so its own root), and the component's pod presents it."""
    wanted = certificate(mesh, component)
    if wanted is None:
        return False
    hooks = mesh.kube.json("get", _HOOKS[component], f"pillion-{component}")["webhooks"]
    bundles = [x509.load_pem_x509_certificates(base64.b64decode(hook["clientConfig"].get("caBundle") or "")) for hook in hooks]
    return all(wanted in bundle for bundle in bundles) and serving(mesh, component) == wanted.serial_number


def serving(mesh: Space, component: str) -> int:
    """Serial number of the certificate that a pod presents, asked from inside it."""
    ask = (
        "import ssl; from cryptography import x509; "
        "pem = ssl.get_server_certificate(('127.0.0.1', 8443)); print(x509.load_pem_x509_certificate(pem.encode()).serial_number)"
    )
    (pod,) = _pods(mesh, component)
    return int(mesh.run("exec", pod["metadata"]["name"], "--", "python3", "-c", ask))


# --- pods meanwhile ------------------------------------------------------------------------------------------------------------------


@dataclass
class Admissions:
    """Pods that were asked for, in dry runs, and those of them that came back without a sidecar."""

    asked: int = 0
    bare: list[str] = field(default_factory=list)


@contextmanager
def admissions(space: Space) -> Iterator[Admissions]:
    """Ask for pods, one after the other, while the body runs."""
    seen, ended = Admissions(), threading.Event()
    wanted = json.dumps(client())

    def ask() -> None:
        while not ended.is_set():
            seen.asked += 1
            try:
                made = json.loads(space.run("create", "--dry-run=server", "-o", "json", "-f", "-", input=wanted))
            except Refused as refused:
                seen.bare.append(str(refused))
                continue
            if "pillion-proxy" not in [each["name"] for each in made["spec"].get("initContainers", [])]:
                seen.bare.append(f"pod {seen.asked} has no sidecar")

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield seen
    finally:
        ended.set()
        asking.join()


def renew(space: Space, name: str) -> None:
    """What `cmctl renew` does: the condition Issuing of the Certificate's status."""
    conditions = space.json("get", "certificate", name)["status"]["conditions"]
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    asked = {"type": "Issuing", "status": "True", "reason": "ManuallyTriggered", "message": "renew", "lastTransitionTime": now}
    status = {"status": {"conditions": [*(each for each in conditions if each["type"] != "Issuing"), asked]}}
    space.run("patch", "certificate", name, "--subresource=status", "--type=merge", f"--patch={json.dumps(status)}")


def _another(mesh: Space, component: str, than: x509.Certificate | None) -> Callable[[], bool]:
    return lambda: certificate(mesh, component) != than and served(mesh, component)


def test_cert_manager_issues_what_the_webhooks_serve(issued: Space, space: Space) -> None:
    for secret in _SECRETS:
        assert issued.json("get", "secret", secret)["metadata"]["annotations"]["cert-manager.io/issuer-name"] == "pillion-webhooks"
    space.apply(client())
    space.ready("client")
    assert "pillion-proxy" in json.dumps(space.json("get", "pod", "client"))
    nonsense = {"apiVersion": "policy.pillion.dev/v1alpha1", "kind": "AuthorizationPolicy", "metadata": {"name": "nonsense"}}
    nobody = {"targetRef": {"group": "", "kind": "Namespace", "name": "elsewhere"}, "requiredAuthenticationRefs": []}
    with pytest.raises(Refused, match=r'admission webhook "policy\.pillion\.dev" denied the request'):
        space.apply({**nonsense, "spec": nobody})
    _, found = checked(issued.kube, "--wait", "60")
    assert [found[check.id] for check in WEBHOOKS.checks if found[check.id]["result"] != "success"] == []


def test_renewals_below_another_root_leave_no_pod_without_its_sidecar(issued: Space, space: Space) -> None:
    """By a SelfSigned issuer, so that each renewal has another key and another root."""
    pods = {component: _pods(issued, component)[0]["metadata"]["uid"] for component in _HOOKS}
    with admissions(space) as seen:
        before = {component: certificate(issued, component) for component in _HOOKS}
        for component in _HOOKS:
            renew(issued, f"pillion-{component}")
        for component in _HOOKS:
            until(f"the {component} serves the renewal", _another(issued, component, before[component]), _RENEWED_WITHIN_S)
        before = {component: certificate(issued, component) for component in _HOOKS}
        issued.run("delete", "secret", *_SECRETS)
        for component in _HOOKS:
            until(f"the {component} serves what was issued again", _another(issued, component, before[component]), _RENEWED_WITHIN_S)
        asked = seen.asked
        until("some pods more", lambda: seen.asked > asked + 5)
    assert seen.asked > 20
    assert seen.bare == []
    assert {component: _pods(issued, component)[0]["metadata"]["uid"] for component in _HOOKS} == pods, "nothing was restarted"
    assert all(status["restartCount"] == 0 for component in _HOOKS for status in _pods(issued, component)[0]["status"]["containerStatuses"])


def test_what_cert_manager_keeps_signs_certificates_and_a_renewal_is_below_the_same_root(
    cert_manager: None, space: Space, tmp_path: Path
) -> None:
    """In a namespace of its own: the session's mesh keeps its authority."""
    wanted = documented(authority=True)
    space.apply(*({**each, "metadata": {**each["metadata"], "namespace": space.name}} for each in wanted))
    first = until("an issuer", lambda: _issuer_files(space))
    renew(space, "pillion-issuer")
    second = until("a renewed issuer", lambda: (found := _issuer_files(space)) and found["tls.crt"] != first["tls.crt"] and found)
    issuers = [load_issuer(files["tls.crt"], files["tls.key"], files["ca.crt"], time.time()) for files in (first, second)]
    assert issuers[0][0].ref.id != issuers[1][0].ref.id
    assert issuers[0][1] == issuers[1][1]
    (tmp_path / "ca.crt").write_bytes(second["ca.crt"])
    key, somebody = ec.generate_private_key(ec.SECP256R1()).public_key(), WorkloadId("cluster.local", space.name, "default")
    for number, (issuer, _) in enumerate(issuers):
        (tmp_path / f"leaf{number}").write_bytes(sign_leaf(issuer, key, somebody, time.time(), 3600).chain_pem)
        words = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", "-untrusted", f"leaf{number}", f"leaf{number}"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def _issuer_files(space: Space) -> dict[str, bytes] | None:
    """Once it is issued; before, cert-manager has no Secret or an incomplete one."""
    found = space.json("get", "secrets", "--field-selector=metadata.name=pillion-issuer")["items"]
    files = {name: base64.b64decode(text) for name, text in (found[0].get("data") or {}).items()} if found else {}
    return files if all(files.get(name) for name in ("tls.crt", "tls.key", "ca.crt")) else None
