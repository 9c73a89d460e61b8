"""An installation in memory, in which all is well, for tests of `pillion check`."""

from __future__ import annotations

from typing import Any

import pytest

from cli.render.chart import load_chart, render
from core.k8s.serving_pair import make_pair
from identity.issuer import make_issuer, make_root
from tests.cli.check_lab import NOW, FakeApi, b64, meshed_pod, pod


@pytest.fixture(scope="module")
def authority() -> dict[str, bytes]:
    root = make_root("cluster.local", NOW)
    issuer = make_issuer("cluster.local", root, NOW)
    return {"tls.crt": issuer.pair.certificate_pem, "tls.key": issuer.pair.key_pem, "ca.crt": root.certificate_pem}


@pytest.fixture(scope="module")
def rendered() -> list[dict[str, Any]]:
    return render(load_chart(), {"createNamespace": True})


@pytest.fixture
def api(authority: dict[str, bytes], rendered: list[dict[str, Any]]) -> FakeApi:
    """An installation in which all is well, with one meshed pod."""
    api = FakeApi()
    for item in rendered:
        stored = api.put(item)
        if item["kind"] == "CustomResourceDefinition":
            stored["status"] = {"conditions": [{"type": "Established", "status": "True"}]}
        if item["kind"] == "Deployment":
            stored["status"] = {"readyReplicas": 1, "updatedReplicas": 1, "observedGeneration": 1}
            stored["metadata"]["generation"] = 1
        if item["kind"] == "DaemonSet":
            stored["status"] = {"desiredNumberScheduled": 1, "numberReady": 1}
    for name in ("httproutes", "grpcroutes"):
        meta = {"name": f"{name}.gateway.networking.k8s.io", "annotations": {"gateway.networking.k8s.io/bundle-version": "v1.6.3"}}
        spec = {"versions": [{"name": "v1", "served": True}]}
        api.put({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": meta, "spec": spec})
    api.find("Secret", "pillion-issuer")["data"] = {name: b64(data) for name, data in authority.items()}
    for component, kind in (("injector", "MutatingWebhookConfiguration"), ("policy", "ValidatingWebhookConfiguration")):
        pair = make_pair([f"pillion-{component}.pillion.svc"], NOW)
        api.find("Secret", f"pillion-{component}-tls")["data"] = {name: b64(data) for name, data in pair.files().items()}
        for hook in api.find(kind, f"pillion-{component}")["webhooks"]:
            hook["clientConfig"]["caBundle"] = b64(pair.ca_pem)
    for namespace in ("pillion", "shop"):
        data = {"ca-bundle.crt": authority["ca.crt"].decode()}
        api.put(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "pillion-trust-anchors", "namespace": namespace}, "data": data}
        )
    api.put({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}})
    api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "annotations": {"pillion.dev/inject": "enabled"}}})
    agent = pod("agent-1", "pillion", {"app.kubernetes.io/component": "agent"})
    agent["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    agent["metadata"]["annotations"] = {}
    api.put(agent)
    api.objects["/api/v1/namespaces/pillion/pods/agent-1:9991/proxy/status"] = {
        "kind": "Status",
        "metadata": {"name": ""},
        "node": {"level": 1, "kernel": "6.18", "ability": {"connect": ""}},
    }
    api.put(meshed_pod("cart-1"))
    api.texts["/api/v1/namespaces/shop/pods/cart-1:4191/proxy/metrics"] = (
        f"pillion_identity_cert_expiration_timestamp_seconds {NOW + 3600}\n"
    )
    return api
