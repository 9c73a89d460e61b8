"""`pillion check` on an installation in memory: all is well, then one thing after the other is not, and the right check says so."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from cli.check import command
from cli.check.catalogue import CONTROL_PLANE, DATA_PLANE, PRE
from cli.check.certificates import PROBE_POLICY
from cli.check.cluster import Cluster
from cli.check.command import as_json, lines, summary
from cli.check.model import Category, Check, Failed, Result, Skipped
from cli.check.run import run_checks
from cli.check.server import needed_kinds
from cli.main import cli
from cli.render.chart import load_chart, render
from core.k8s.access import GRANTS, questions
from core.k8s.api import Listing, object_path
from core.k8s.errors import Forbidden, NotFound, Unavailable
from core.k8s.serving_pair import make_pair
from identity.issuer import make_issuer, make_root
from policy.admission import admit

NOW = datetime(2026, 6, 1, tzinfo=UTC).timestamp()
PLURALS = {"NetworkPolicy": "networkpolicies", "GRPCRoute": "grpcroutes", "HTTPRoute": "httproutes"}


def plural(kind: str) -> str:
    return PLURALS.get(kind) or (kind.lower().removesuffix("y") + "ies" if kind.endswith("y") else kind.lower() + "s")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class FakeApi:
    """Objects by path; who asks for what is not there gets NotFound. denied: reviews that are answered with no."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, str] = {}
        self.denied: Callable[[Mapping[str, Any]], bool] = lambda spec: (
            "exec" in str(spec)
            or (
                spec["resourceAttributes"].get("name") is None
                and (
                    spec["resourceAttributes"]["resource"] in ("secrets", "clusterrolebindings", "serviceaccounts")
                    or (spec["resourceAttributes"]["resource"], spec["resourceAttributes"]["verb"]) == ("pods", "create")
                )
            )
        )
        self.injects = self.validates = True
        self.down = False

    def put(self, item: Mapping[str, Any]) -> dict[str, Any]:
        item = copy.deepcopy(dict(item))
        group, _, version = item["apiVersion"].rpartition("/")
        meta = item["metadata"]
        self.objects[object_path(group, version, plural(item["kind"]), meta.get("namespace", ""), meta["name"])] = item
        return item

    def find(self, kind: str, name: str) -> dict[str, Any]:
        return next(item for item in self.objects.values() if item["kind"] == kind and item["metadata"]["name"] == name)

    def drop(self, kind: str, name: str) -> None:
        self.objects = {path: item for path, item in self.objects.items() if (item["kind"], item["metadata"]["name"]) != (kind, name)}

    async def get(self, path: str, **query: str) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if self.down:
            raise Unavailable("GET: no answer")
        if path == "/version":
            return {"major": "1", "minor": "34+", "gitVersion": "v1.34.4"}
        if path not in self.objects:
            raise NotFound(f"GET {path}: not found", 404)
        return self.objects[path]

    async def text(self, path: str, **query: str) -> str:
        await trio.lowlevel.checkpoint()
        return self.texts[path]

    async def list(self, path: str, *, label_selector: str = "", field_selector: str = "") -> Listing[dict[str, Any]]:
        await trio.lowlevel.checkpoint()
        prefix, _, resource = path.rpartition("/")
        found = [item for key, item in self.objects.items() if key.startswith(f"{prefix}/") and key.split("/")[-2] == resource]
        return Listing(found, "1")

    async def post(self, path: str, body: Mapping[str, Any], **query: str) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if path.endswith("accessreviews"):
            return {"status": {"allowed": not self.denied(body["spec"])}}
        assert query == {"dryRun": "All"}, "check changes nothing"
        made = copy.deepcopy(dict(body))
        if path.endswith("/pods") and self.injects:
            made["spec"]["initContainers"] = [{"name": "pillion-proxy"}]
        if path.endswith("/meshtlsauthentications") and self.validates:
            raise Forbidden(f'admission webhook "policy.pillion.dev" denied the request: {admit(made)}', 403)
        made["metadata"]["creationTimestamp"] = datetime.fromtimestamp(NOW, UTC).isoformat()
        return made


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


def pod(name: str, namespace: str = "shop", labels: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
        "spec": {"nodeName": "node1", "containers": [{"name": "app", "image": "app:1"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.9", "podIPs": [{"ip": "10.0.0.9"}]},
    }


def meshed_pod(name: str, *, ready: bool = True, image: str = "pillion:0.1.0") -> dict[str, Any]:
    made = pod(name)
    made["spec"]["initContainers"] = [{"name": "pillion-proxy", "image": image, "restartPolicy": "Always"}]
    made["status"]["initContainerStatuses"] = [{"name": "pillion-proxy", "ready": ready}]
    made["metadata"]["annotations"] = {"pillion.dev/status": "injected"}
    return made


async def results_of(api: FakeApi, categories: Any = (*CONTROL_PLANE, *DATA_PLANE), only: str = "", wait_s: float = 0.0) -> list[Result]:
    cluster = Cluster(api, "0.1.0", only, clock=lambda: NOW)
    return await run_checks(categories, cluster, wait_s, lambda *_: None, lambda _: None)


async def wrong(api: FakeApi, **more: Any) -> dict[str, str]:
    """id -> text of what is not as it should be."""
    return {found.check.id: found.text for found in await results_of(api, **more) if found.outcome in ("error", "warning")}


async def test_nothing_is_wrong_with_an_installation_in_order(api: FakeApi) -> None:
    found = await results_of(api)
    assert {result.check.id: result.text for result in found if result.outcome in ("error", "warning")} == {}
    assert [result.check.id for result in found if result.outcome == "skipped"] == ["control-plane-replicas"]
    assert len(found) == sum(len(category.checks) for category in (*CONTROL_PLANE, *DATA_PLANE))


async def test_before_an_installation_everything_needed_is_asked_for() -> None:
    api = FakeApi()
    for name in ("httproutes", "grpcroutes"):
        spec = {"versions": [{"name": "v1", "served": True}]}
        meta = {"name": f"{name}.gateway.networking.k8s.io"}
        api.put({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": meta, "spec": spec})
    api.denied = lambda spec: False
    assert await wrong(api, categories=PRE) == {}
    api.denied = lambda spec: spec["resourceAttributes"]["resource"] in ("clusterroles", "networkpolicies")
    told = await wrong(api, categories=PRE)
    assert told == {"pre-permissions": "you may not create networkpolicies.networking.k8s.io, clusterroles.rbac.authorization.k8s.io"}


def test_plurals_of_what_is_installed_are_those_of_the_api() -> None:
    found = {name for _, name, _ in needed_kinds(render(load_chart(), {"createNamespace": True}, ha=True))}
    assert {"networkpolicies", "mutatingwebhookconfigurations", "poddisruptionbudgets", "daemonsets", "namespaces"} <= found


async def test_a_namespace_of_somebody_else_is_not_taken() -> None:
    api = FakeApi()
    api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "pillion"}})
    api.put(pod("theirs", "pillion"))
    told = {found.check.id: found.text for found in await results_of(api, PRE[2:]) if found.outcome == "error"}
    assert told["pre-namespace"] == "namespace pillion exists and has pods of somebody else: pillion/theirs"


def missing_route(api: FakeApi) -> None:
    api.drop("CustomResourceDefinition", "grpcroutes.gateway.networking.k8s.io")


def old_route(api: FakeApi) -> None:
    api.find("CustomResourceDefinition", "httproutes.gateway.networking.k8s.io")["spec"]["versions"][0]["name"] = "v1beta1"


def no_kind(api: FakeApi) -> None:
    api.drop("CustomResourceDefinition", "servers.policy.pillion.dev")


def other_schema(api: FakeApi) -> None:
    crd = api.find("CustomResourceDefinition", "servers.policy.pillion.dev")
    del crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["proxyProtocol"]


def broken_mesh(api: FakeApi) -> None:
    api.find("ConfigMap", "pillion-config")["data"]["mesh.yaml"] = "capture: maybe\n"


def broken_values(api: FakeApi) -> None:
    api.find("ConfigMap", "pillion-config")["data"]["values.yaml"] = "logLevel: loud\n"


def no_account(api: FakeApi) -> None:
    api.drop("ServiceAccount", "pillion-agent")


def fewer_rights(api: FakeApi) -> None:
    denied = api.denied
    api.denied = lambda spec: denied(spec) or spec["resourceAttributes"]["resource"] == "tokenreviews"


def more_rights(api: FakeApi) -> None:
    api.denied = lambda spec: False


def no_issuer(api: FakeApi) -> None:
    del api.find("Secret", "pillion-issuer")["data"]


def foreign_key(api: FakeApi) -> None:
    api.find("Secret", "pillion-issuer")["data"]["tls.key"] = b64(make_root("cluster.local", NOW).key_pem)


def old_issuer(api: FakeApi) -> None:
    root = make_root("cluster.local", NOW - 340 * 86400)
    issuer = make_issuer("cluster.local", root, NOW - 340 * 86400)
    files = {"tls.crt": issuer.pair.certificate_pem, "tls.key": issuer.pair.key_pem, "ca.crt": root.certificate_pem}
    api.find("Secret", "pillion-issuer")["data"] = {name: b64(data) for name, data in files.items()}


def other_bundle(api: FakeApi) -> None:
    path = object_path("", "v1", "configmaps", "shop", "pillion-trust-anchors")
    api.objects[path]["data"]["ca-bundle.crt"] = make_root("cluster.local", NOW).certificate_pem.decode()


def no_bundle(api: FakeApi) -> None:
    del api.objects[object_path("", "v1", "configmaps", "shop", "pillion-trust-anchors")]


def no_deployment(api: FakeApi) -> None:
    api.drop("Deployment", "pillion-injector")


def not_ready(api: FakeApi) -> None:
    api.find("Deployment", "pillion-policy")["status"]["readyReplicas"] = 0
    ill = pod("pillion-policy-x", "pillion", {"app.kubernetes.io/component": "policy"})
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    ill["status"]["containerStatuses"] = [{"name": "policy", "state": {"waiting": waiting}}]
    api.put(ill)


def scaled_away(api: FakeApi) -> None:
    api.find("Deployment", "pillion-policy")["spec"]["replicas"] = 0


def crashing(api: FakeApi) -> None:
    ill = pod("pillion-policy-x", "pillion", {"app.kubernetes.io/component": "policy"})
    last = {"terminated": {"reason": "Error", "exitCode": 1, "message": "PILLION_POLICY_SOURCE is not set"}}
    ill["status"]["containerStatuses"] = [{"name": "policy", "restartCount": 4, "lastState": last, "state": {}}]
    api.put(ill)


def other_version(api: FakeApi) -> None:
    api.find("Deployment", "pillion-identity")["metadata"]["labels"]["app.kubernetes.io/version"] = "0.0.9"


def single_replicas(api: FakeApi) -> None:
    for name in ("node2", "node3"):
        api.put({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    api.find("DaemonSet", "pillion-agent")["status"]["desiredNumberScheduled"] = 1


def empty_bundle(api: FakeApi) -> None:
    del api.find("MutatingWebhookConfiguration", "pillion-injector")["webhooks"][0]["clientConfig"]["caBundle"]


def foreign_bundle(api: FakeApi) -> None:
    bundle = b64(make_pair(["x.pillion.svc"], NOW).ca_pem)
    api.find("ValidatingWebhookConfiguration", "pillion-policy")["webhooks"][0]["clientConfig"]["caBundle"] = bundle


def stale_serving(api: FakeApi) -> None:
    pair = make_pair(["pillion-policy.pillion.svc"], NOW, lifetime_s=3600)
    api.find("Secret", "pillion-policy-tls")["data"] = {name: b64(data) for name, data in pair.files().items()}
    api.find("ValidatingWebhookConfiguration", "pillion-policy")["webhooks"][0]["clientConfig"]["caBundle"] = b64(pair.ca_pem)


def injects_not(api: FakeApi) -> None:
    api.injects = False


def validates_not(api: FakeApi) -> None:
    api.validates = False


def agent_away(api: FakeApi) -> None:
    api.find("DaemonSet", "pillion-agent")["status"]["numberReady"] = 0
    api.find("Pod", "agent-1")["status"]["conditions"][0]["status"] = "False"


def low_level(api: FakeApi) -> None:
    status = api.objects["/api/v1/namespaces/pillion/pods/agent-1:9991/proxy/status"]
    status["node"] = {"level": 3, "kernel": "5.4", "ability": {"connect": "no getsockopt hook", "nft": ""}}


def refused_policy(api: FakeApi) -> None:
    spec = {"identities": ["spiffe://cluster.local/x"]}
    meta = {"name": "odd", "namespace": "shop"}
    api.put({"apiVersion": "policy.pillion.dev/v1alpha1", "kind": "MeshTLSAuthentication", "metadata": meta, "spec": spec})


def idle_policy(api: FakeApi) -> None:
    spec = {"targetRef": {"group": "policy.pillion.dev", "kind": "Server", "name": "gone"}, "requiredAuthenticationRefs": []}
    meta = {"name": "idle", "namespace": "shop"}
    api.put({"apiVersion": "policy.pillion.dev/v1alpha1", "kind": "AuthorizationPolicy", "metadata": meta, "spec": spec})


def unmeshed_server(api: FakeApi) -> None:
    api.find("Namespace", "shop")["metadata"]["annotations"] = {}
    api.put(pod("stock-1", labels={"app": "stock"}))
    spec = {"podSelector": {"matchLabels": {"app": "stock"}}, "port": 80}
    meta = {"name": "stock", "namespace": "shop"}
    api.put({"apiVersion": "policy.pillion.dev/v1alpha1", "kind": "Server", "metadata": meta, "spec": spec})


def misspelt_annotation(api: FakeApi) -> None:
    api.find("Namespace", "shop")["metadata"]["annotations"] = {"pillion.dev/injct": "enabled"}


def plain_pod(api: FakeApi) -> None:
    api.put(pod("plain"))


def node_pod(api: FakeApi) -> None:
    made = pod("on-node")
    made["spec"]["hostNetwork"] = True
    api.put(made)


def refusal_told(api: FakeApi) -> None:
    about = {"kind": "ReplicaSet", "namespace": "shop", "name": "cart"}
    api.put(
        {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": "e", "namespace": "shop"},
            "reportingController": "pillion.dev/injector",
            "reason": "InjectionRefused",
            "regarding": about,
            "note": "log-level is loud",
        }
    )


def ill_sidecar(api: FakeApi) -> None:
    api.put(meshed_pod("cart-1", ready=False))


def old_sidecar(api: FakeApi) -> None:
    api.put(meshed_pod("cart-1", image="pillion:0.0.9"))


def uncertified(api: FakeApi) -> None:
    api.texts["/api/v1/namespaces/shop/pods/cart-1:4191/proxy/metrics"] = "nothing 1\n"


FAULTS = [
    (missing_route, "gateway-api-crds", "not served: grpcroutes.gateway.networking.k8s.io/v1"),
    (old_route, "gateway-api-crds", "(served: v1beta1)"),
    (no_kind, "crds", "servers.policy.pillion.dev"),
    (other_schema, "crds-version", "of another version than this command: servers.policy.pillion.dev"),
    (broken_mesh, "config", "mesh.yaml: "),
    (broken_values, "config-values", "values.yaml: logLevel"),
    (no_account, "rbac-accounts", "pillion-agent"),
    (fewer_rights, "rbac-grants", "service account pillion/pillion-identity may not create tokenreviews.authentication.k8s.io"),
    (more_rights, "rbac-surplus", "service account pillion/pillion-policy may list secrets, which it never does"),
    (no_issuer, "issuer", "has no tls.crt, tls.key, ca.crt yet"),
    (foreign_key, "issuer", "does not belong to"),
    (old_issuer, "issuer-expiry", "ends in 25 days"),
    (other_bundle, "trust-bundle", "shop"),
    (no_bundle, "trust-bundle", "shop"),
    (no_deployment, "control-plane-exists", "pillion-injector"),
    (not_ready, "control-plane-ready", "pillion-policy: 0 of 1 ready (pillion-policy-x: ImagePullBackOff no such image)"),
    (scaled_away, "control-plane-ready", "pillion-policy: 1 of 0 ready"),
    (crashing, "control-plane-restarts", "ended 4 times; the last time: Error, exit code 1: PILLION_POLICY_SOURCE is not set"),
    (other_version, "control-plane-version", "pillion-identity is 0.0.9"),
    (single_replicas, "control-plane-replicas", "one replica only: pillion-identity, pillion-injector, pillion-policy"),
    (empty_bundle, "injector-certificate", "has no caBundle"),
    (foreign_bundle, "policy-certificate", "is not what Secret pillion-policy-tls is signed by"),
    (stale_serving, "policy-certificate-expiry", "was not renewed"),
    (injects_not, "injector-answers", "is created without one"),
    (validates_not, "policy-answers", "does not reach the policy controller"),
    (agent_away, "agent-ready", "0 of 1 agents are ready; not on: node1"),
    (low_level, "capture-level", "node node1 (kernel 5.4): nftables. connect: no getsockopt hook"),
    (refused_policy, "policy-understood", "MeshTLSAuthentication shop/odd: "),
    (idle_policy, "policy-effective", "does not exist, so the policy has no effect"),
    (unmeshed_server, "policy-enforced", "server shop/stock: pod shop/stock-1 has no sidecar"),
    (
        misspelt_annotation,
        "annotations-read",
        "namespace shop: annotation pillion.dev/injct is read by nobody; there is pillion.dev/inject",
    ),
    (plain_pod, "injected", "shop/plain: was created before it was asked for"),
    (node_pod, "injected", "shop/on-node: the pod uses the network of its node"),
    (refusal_told, "injection-refused", "ReplicaSet shop/cart: log-level is loud"),
    (ill_sidecar, "data-plane-ready", "1 of 1 sidecars are not ready: shop/cart-1"),
    (old_sidecar, "data-plane-version", "shop/cart-1 (pillion:0.0.9)"),
    (uncertified, "data-plane-certificates", "shop/cart-1: it has no certificate"),
]


@pytest.mark.parametrize(("fault", "id_", "told"), FAULTS, ids=lambda value: value.__name__ if callable(value) else None)
async def test_each_fault_is_named_by_its_check(api: FakeApi, fault: Callable[[FakeApi], None], id_: str, told: str) -> None:
    fault(api)
    found = await wrong(api)
    assert told in found.pop(id_)
    assert set(found) <= {"policy-certificate-expiry", "policy-certificate", "rbac-grants"}, "and by no other one"


def test_every_check_of_an_installation_has_been_seen_to_fail() -> None:
    seen = {id_ for _, id_, _ in FAULTS}
    never = {check.id for category in (*CONTROL_PLANE, *DATA_PLANE) for check in category.checks} - seen
    # these three are asked of a real API server; the last three differ from their twins in the name only
    assert never == {"k8s-api", "k8s-version", "k8s-clock", "anchors-expiry", "policy-certificate", "injector-certificate-expiry"} - seen


async def test_a_fatal_failure_ends_the_run(api: FakeApi) -> None:
    missing_route(api)
    found = await results_of(api)
    assert found[-1].check.id == "gateway-api-crds"
    assert "stopped" in summary(found)


async def test_all_grants_of_this_variant_are_asked(api: FakeApi) -> None:
    found = {result.check.id: result.text for result in await results_of(api)}
    asked = [question for grant in GRANTS if grant.when != "given-issuer" for question in questions(grant)]
    assert found["rbac-grants"] == f"{len(asked)} verbs"


async def test_an_api_server_that_goes_away_is_an_error_of_the_check(api: FakeApi) -> None:
    api.down = True
    (found,) = await results_of(api)
    assert (found.outcome, found.text) == ("error", "GET: no answer")


def test_the_probe_is_refused_by_the_model() -> None:
    assert admit({**PROBE_POLICY, "metadata": {"name": "x", "namespace": "default"}}), "or the webhook could not refuse it"


# --- running -------------------------------------------------------------------------------------------------------------------------


def category(*checks: Check) -> Category:
    return Category("c", "C", checks)


async def test_what_settles_is_asked_again_until_it_holds(autojump_clock: trio.testing.MockClock) -> None:
    asked = []

    async def look(cluster: Cluster) -> str:
        asked.append(trio.current_time())
        if len(asked) < 4:
            raise Failed("not yet")
        return "now"

    told: list[str] = []
    cluster = Cluster(FakeApi(), "0.1.0")
    rows = [category(Check("x", "it holds", "error", look, settles=True))]
    (found,) = await run_checks(rows, cluster, 10, lambda _c, _k, cause: told.append(cause), lambda _: None)
    assert (found.outcome, found.text) == ("success", "now")
    assert told == ["", "not yet", "not yet", "not yet"]


async def test_waiting_ends_with_the_time(autojump_clock: trio.testing.MockClock) -> None:
    async def look(cluster: Cluster) -> None:
        raise Failed("never")

    start = trio.current_time()
    rows = [category(Check("x", "it holds", "error", look, settles=True), Check("y", "it too", "warning", look))]
    found = await run_checks(rows, Cluster(FakeApi(), "0.1.0"), 10, lambda *_: None, lambda _: None)
    assert [result.outcome for result in found] == ["error", "warning"]
    assert 8 <= trio.current_time() - start <= 10


async def test_a_look_that_never_ends_is_ended(autojump_clock: trio.testing.MockClock) -> None:
    async def look(cluster: Cluster) -> None:
        await trio.sleep_forever()

    (found,) = await run_checks(
        [category(Check("x", "it ends", "error", look))], Cluster(FakeApi(), "0"), 0, lambda *_: None, lambda _: None
    )
    assert found.text == "no answer within 60 s"


# --- showing -------------------------------------------------------------------------------------------------------------------------


async def nothing(cluster: Cluster) -> None:
    raise Skipped("x")


def test_text_of_the_cluster_cannot_steer_a_terminal() -> None:
    bad = Result(category(), Check("x", "it holds", "error", nothing), "error", "pod \x1b[31m[bold]x[/bold]\nnext", "do that")
    assert [line.plain for line in lines(bad)] == ["× it holds", "    pod ?[31m[bold]x[/bold]", "    next", "    try: do that"]


def test_json_has_what_programs_need(api: FakeApi) -> None:
    rows = [Result(category(), Check("x", "it holds", "error", nothing), outcome, "t", "h") for outcome in ("success", "warning", "error")]  # type: ignore[arg-type]
    assert as_json(rows) == {
        "success": False,
        "categories": [
            {
                "categoryName": "c",
                "checks": [
                    {"id": "x", "description": "it holds", "severity": "error", "result": "success", "detail": "t"},
                    {"id": "x", "description": "it holds", "severity": "error", "result": "warning", "error": "t", "hint": "h"},
                    {"id": "x", "description": "it holds", "severity": "error", "result": "error", "error": "t", "hint": "h"},
                ],
            }
        ],
    }
    assert as_json(rows[:2])["success"] is True


@pytest.mark.parametrize(("outcome", "code"), [("success", 0), ("warning", 0), ("error", 1)])
@pytest.mark.parametrize("output", ["table", "short", "json"])
def test_exit_codes_and_outputs(monkeypatch: pytest.MonkeyPatch, outcome: str, code: int, output: str) -> None:
    async def fake(categories: Any, namespace: str, wait_s: float, screen: Any, kubeconfig: str, context: str) -> list[Result]:
        found = Result(category(), Check("x", "it holds", "error", nothing), outcome, "why", "do that")  # type: ignore[arg-type]
        screen.tell(found.category, found.check, "")
        screen.done(found)
        return [found]

    monkeypatch.setattr(command, "_check", fake)
    result = CliRunner().invoke(cli, ["check", "-o", output])
    assert result.exit_code == code
    if output == "json":
        assert json.loads(result.stdout)["success"] is (code == 0)
    else:
        assert ("it holds" in result.stdout) is (output == "table" or outcome != "success")
        assert ("try: do that" in result.stdout) is (outcome != "success")


def test_pre_and_proxy_exclude_each_other() -> None:
    assert CliRunner().invoke(cli, ["check", "--pre", "--proxy"]).exit_code == 2


def test_without_a_cluster_the_next_step_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(cli, ["check"])
    assert result.exit_code == 1
    assert "set KUBECONFIG" in result.output
