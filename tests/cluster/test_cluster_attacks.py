"""Who is not who it says, on a real API server: tokens, certificates and subscriptions of others, tried from hostile pods."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.kube import OUTSIDE, Space, client, container, pod, pod_spec, until, workload
from tests.cluster.test_cluster_workloads import identity

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

AUDIENCE = "identity.pillion.dev"
CERTIFY = "https://pillion-identity.pillion.svc.cluster.local:8080/v1/certify"


@pytest.fixture(scope="module")
def arena(make_space: Callable[..., Space]) -> Space:
    """``web`` for authenticated callers only; ``victim``, a meshed pod of its own service account; ``hostile``, an unmeshed pod."""
    made = make_space("arena", {"pillion.dev/inject": "enabled", "config.pillion.dev/default-inbound-policy": "all-authenticated"})
    for name in ("victim", "hostile"):
        made.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
    idle = container("app", "serve")
    # in the image of the app the tests' programs may write to /tmp, which some attacks need for a moment
    made.apply(
        workload("Deployment", "web"),
        pod("victim", pod_spec(idle, serviceAccountName="victim")),
        pod("hostile", pod_spec(idle, serviceAccountName="hostile"), annotations=OUTSIDE),
        pod("insider", pod_spec(idle, serviceAccountName="hostile")),
    )
    made.rolled_out("deployment/web")
    made.ready("victim", "hostile", "insider")
    return made


def attack(arena: Space, who: str = "hostile", **wanted: Any) -> Any:
    """Run app/attacks.py in a pod."""
    return json.loads(arena.run("exec", "-i", who, "-c", "app", "--", "python3", "/app/attacks.py", input=json.dumps(wanted)))


def token(arena: Space, account: str, audience: str = AUDIENCE, pod: str = "") -> str:
    """As the kubelet gets it for a pod."""
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod}"] if pod else []
    return arena.run("create", "token", account, f"--audience={audience}", *bound).strip()


def certify(arena: Space, token: str, account: str) -> Any:
    return attack(arena, do="certify", url=CERTIFY, token=token, uri=identity(arena, account))


def call_web(arena: Space, key: str = "", chain: str = "") -> Any:
    """TLS straight to the sidecar of ``web``, past any sidecar of the caller's."""
    found = arena.pod("app=web")
    name = f"default.{arena.name}.sa.pillion.cluster.local"
    wanted = {"host": found["status"]["podIP"], "port": 8080, "name": name, "alpn": "pillion-http/1.1"}
    return attack(arena, do="tls", key=key, chain=chain, send="GET /stolen HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n", **wanted)


def test_a_pods_own_token_certifies_its_own_service_account_and_no_other(arena: Space) -> None:
    own = token(arena, "victim", pod="victim")
    assert certify(arena, own, "victim")["status"] == 200
    refused = certify(arena, own, "hostile")
    assert refused["status"] == 403 and "sa/hostile" in refused["said"], refused


def test_a_token_of_another_audience_certifies_nobody(arena: Space) -> None:
    refused = certify(arena, token(arena, "victim", "https://kubernetes.default.svc.cluster.local", "victim"), "victim")
    assert refused["status"] == 401, refused


def test_a_token_that_is_bound_to_no_pod_certifies_nobody(arena: Space) -> None:
    assert certify(arena, token(arena, "victim"), "victim")["status"] in (401, 403)


def test_the_token_of_a_deleted_pod_certifies_nobody(arena: Space) -> None:
    arena.apply(client("gone", annotations=OUTSIDE))
    arena.ready("gone")
    kept = token(arena, "default", pod="gone")
    assert certify(arena, kept, "default")["status"] == 200
    arena.run("delete", "pod", "gone", "--now")
    # the API server's authenticator may remember a token for ten seconds
    until("the token is refused", lambda: certify(arena, kept, "default")["status"] == 401, pause=1)


def test_a_forged_token_certifies_nobody(arena: Space) -> None:
    real = token(arena, "victim", pod="victim")
    header, _, signature = real.split(".")
    forged = json.dumps({"sub": f"system:serviceaccount:{arena.name}:victim", "aud": [AUDIENCE]})
    import base64

    body = base64.urlsafe_b64encode(forged.encode()).decode().rstrip("=")
    for tried in (f"{header}.{body}.{signature}", real[:-4] + "AAAA", "x", "a.b.c"):
        assert certify(arena, tried, "victim")["status"] == 401


def test_a_genuine_certificate_is_let_in(arena: Space) -> None:
    """Or the refusals below would mean nothing."""
    made = certify(arena, token(arena, "victim", pod="victim"), "victim")
    answered = call_web(arena, made["key"], made["chain"])
    assert answered.get("received", "").startswith("HTTP/1.1 200"), answered
    assert identity(arena, "victim") in answered["received"]


def test_a_self_made_certificate_is_refused_in_the_handshake(arena: Space) -> None:
    for issuer in ("my own", "pillion"):
        forged = attack(arena, do="forge", uri=identity(arena, "victim"), issuer=issuer)
        answered = call_web(arena, forged["key"], forged["chain"])
        assert not answered.get("received"), answered


def test_no_certificate_is_refused_by_policy(arena: Space) -> None:
    answered = call_web(arena)
    assert not answered.get("received", "").startswith("HTTP/1.1 200"), answered
    plain = arena.call("hostile", f"http://{arena.pod('app=web')['status']['podIP']}:8080/")
    assert plain.get("status") == 403, plain


def subscribe(arena: Space, pod: str, key: str, chain: str, namespace: str = "", who: str = "hostile") -> str:
    """What the policy controller says to somebody who claims to be this pod's sidecar."""
    hello = json.dumps({"type": "hello", "namespace": namespace or arena.name, "pod": pod, "version": "0"})
    watch = json.dumps({"type": "watch-port", "port": 8080})
    wanted = {"host": "pillion-policy.pillion.svc.cluster.local", "port": 8090, "name": "pillion-policy.pillion.sa.pillion.cluster.local"}
    said = attack(arena, who, do="tls", alpn="pillion-policy/1", key=key, chain=chain, send=f"{hello}\n{watch}\n", **wanted)
    return str(said.get("received") or said.get("error"))


def test_a_compromised_pod_cannot_subscribe_as_another_workload(arena: Space) -> None:
    made = certify(arena, token(arena, "hostile", pod="insider"), "hostile")
    for other in ("victim", arena.pod("app=web")["metadata"]["name"]):
        said = subscribe(arena, other, made["key"], made["chain"])
        assert "port-policy" not in said and "refused" in said, said


def test_a_stolen_key_subscribes_from_no_other_address(arena: Space) -> None:
    made = certify(arena, token(arena, "victim", pod="victim"), "victim")
    said = subscribe(arena, "victim", made["key"], made["chain"])
    assert "port-policy" not in said, said


def test_a_stranger_subscribes_to_nothing(arena: Space) -> None:
    forged = attack(arena, do="forge", uri=identity(arena, "victim"), issuer="pillion")
    assert "port-policy" not in subscribe(arena, "victim", forged["key"], forged["chain"])
    assert "port-policy" not in subscribe(arena, "victim", "", "")


def test_an_app_cannot_read_its_sidecars_token(arena: Space) -> None:
    tried = "import glob; print([glob.glob(top + '/var/run/secrets/pillion.dev/*') for top in ('', '/proc/*/root')])"
    assert arena.exec("insider", "python3", "-c", tried).strip() == "[[], []]"
