"""What leads nowhere is said; what is right is not talked about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from core.k8s.objects import Service, read_core_object
from core.refs import Ref
from local.hints import hints
from local.network import Addresses
from local.objects import Manifest, read_manifest
from local.services import PodFacts

POD = PodFacts(
    Ref("", "Pod", "shop", "web-1"),
    {"app": "web"},
    Addresses("10.142.0.10", ""),
    False,
    {"http": 8080, "admin": 9000, "pillion-inbound": 4143},
    meshed=True,
)
POLICY = "policy.pillion.dev/v1alpha1"


def manifest(version: str, kind: str, spec: dict[str, Any], name: str = "x") -> Manifest:
    found = read_manifest({"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
    assert found is not None
    return found


def told(*manifests: Manifest, pods: tuple[PodFacts, ...] = (POD,)) -> list[str]:
    """What is told about manifests of the namespace shop, which is there."""
    shop = read_manifest({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})
    assert shop is not None
    known = {one.ref: one for one in (shop, *manifests)}
    services = [typed for one in manifests if isinstance(typed := read_core_object(one.raw), Service)]
    return hints(known, services, pods, [*(one.raw for one in manifests), *map(api_object, pods)])


def api_object(pod: PodFacts) -> dict[str, Any]:
    """As the runner writes it for the policy controller."""
    ports = [{"name": name, "containerPort": number} for name, number in pod.ports.items()]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod.ref.name, "namespace": pod.ref.namespace, "labels": dict(pod.labels)},
        "spec": {"serviceAccountName": "web", "containers": [{"name": "app", "ports": ports}]},
    }


def service(target: int | str, app: str = "web") -> Manifest:
    return manifest("v1", "Service", {"selector": {"app": app}, "ports": [{"port": 80, "targetPort": target}]})


def server(port: int | str, app: str = "web") -> Manifest:
    return manifest(POLICY, "Server", {"podSelector": {"matchLabels": {"app": app}}, "port": port})


def policy(server_name: str, authentication: str) -> Manifest:
    group = POLICY.partition("/")[0]
    required = [{"group": group, "kind": "MeshTLSAuthentication", "name": authentication}]
    target = {"group": group, "kind": "Server", "name": server_name}
    return manifest(POLICY, "AuthorizationPolicy", {"targetRef": target, "requiredAuthenticationRefs": required})


@pytest.mark.parametrize("make", [service, server])
@pytest.mark.parametrize("port", ["http", 8080, 81])
def test_ports_that_pods_may_have_are_no_matter(make: Any, port: int | str) -> None:
    assert told(make(port)) == []


@pytest.mark.parametrize(("make", "kind"), [(service, "service"), (server, "server")])
def test_a_port_name_that_no_selected_pod_has_is_told_with_those_there_are(make: Any, kind: str) -> None:
    assert told(make("htpp")) == [f"{kind} shop/x: no pod that it selects has a container port named 'htpp' (named are: admin, http)"]


@pytest.mark.parametrize(("make", "kind"), [(service, "service"), (server, "server")])
def test_what_selects_no_pod_is_told(make: Any, kind: str) -> None:
    assert told(make("http", "wbe")) == [f"{kind} shop/x: selects no pod"]
    elsewhere = PodFacts(Ref("", "Pod", "else", "web-1"), POD.labels, POD.addresses, True, POD.ports)
    assert told(make("http"), pods=(elsewhere,)) == [f"{kind} shop/x: selects no pod"]


def test_a_policy_names_the_target_and_the_authentication_that_are_missing() -> None:
    assert told(policy("wbe", "clients"), server("http")) == [
        "authorizationpolicy shop/x: server shop/wbe does not exist, so the policy has no effect",
        "authorizationpolicy shop/x: meshtlsauthentication shop/clients does not exist, so the whole policy grants nothing",
    ]


def test_an_account_that_a_policy_lets_in_and_that_is_not_there_is_told() -> None:
    identities = ["spiffe://cluster.local/ns/shop/sa/wbe", "spiffe://cluster.local/ns/shop/*", "spiffe://elsewhere/ns/shop/sa/wbe"]
    assert told(manifest(POLICY, "MeshTLSAuthentication", {"identities": identities})) == [
        "meshtlsauthentication shop/x: there is no service account wbe in namespace shop, so nobody comes as it"
    ]
    account = read_manifest({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "batch", "namespace": "shop"}})
    assert account is not None
    refs = [{"kind": "ServiceAccount", "name": name} for name in ("batch", "web")] + [{"kind": "Namespace", "name": "shop"}]
    assert told(manifest(POLICY, "MeshTLSAuthentication", {"identityRefs": refs}), account) == []


def test_a_server_that_another_one_displaces_is_told() -> None:
    first = server("http")
    second = manifest(POLICY, "Server", {"podSelector": {"matchLabels": {"app": "web"}}, "port": 8080}, "y")
    assert told(first, second) == ["server shop/y: no effect on port 8080 of pod shop/web-1: the older server shop/x selects it too"]


def test_a_route_names_the_parent_and_the_backend_that_are_missing() -> None:
    parents = [{"group": POLICY.partition("/")[0], "kind": "Server", "name": "wbe"}]
    of_server = manifest("gateway.networking.k8s.io/v1", "HTTPRoute", {"parentRefs": parents, "rules": [{}]}, "a")
    parents = [{"group": "", "kind": "Service", "name": "x", "port": 80}]
    rules = [{"backendRefs": [{"name": "y", "port": 80}]}]
    of_service = manifest("gateway.networking.k8s.io/v1", "HTTPRoute", {"parentRefs": parents, "rules": rules}, "b")
    assert told(of_server, of_service, service("http")) == [
        "httproute shop/a: there is no Server wbe in namespace shop",
        "httproute shop/b: there is no Service y in namespace shop; its share of the requests gets an error",
    ]


def test_a_policy_whose_names_are_there_is_no_matter() -> None:
    clients = manifest(POLICY, "MeshTLSAuthentication", {"identities": ["*"]})
    assert told(policy("x", "x"), server("http"), clients) == []


def test_a_server_for_pods_without_a_sidecar_names_them() -> None:
    plain = replace(POD, ref=Ref("", "Pod", "shop", "web-2"), meshed=False)
    assert told(server("http"), pods=(POD, plain)) == ["server shop/x: nobody enforces it on pods without a sidecar: web-2"]


def test_an_annotation_that_nobody_reads_is_told_where_it_stands() -> None:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "annotations": {"pillion.dev/injct": "enabled"}}}
    annotations = {"pillion.dev/inject": "enabled", "config.pillion.dev/log-levl": "debug"}
    template = {"metadata": {"labels": {"app": "x"}, "annotations": annotations}, "spec": {"containers": [{"name": "x", "command": ["x"]}]}}
    deployment = manifest("apps/v1", "Deployment", {"selector": {"matchLabels": {"app": "x"}}, "template": template})
    found = [read_manifest(namespace), deployment]
    assert told(*(one for one in found if one is not None)) == [
        "namespace shop: annotation pillion.dev/injct is read by nobody; there is pillion.dev/inject",
        "deployment shop/x: annotation config.pillion.dev/log-levl is read by nobody; there is config.pillion.dev/log-level",
    ]


def test_an_annotation_of_linkerd_is_told_with_ours() -> None:
    annotations = {"linkerd.io/inject": "enabled", "config.linkerd.io/await": "true", "config.linkerd.io/proxy-uid": "1"}
    found = read_manifest({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "annotations": annotations}})
    assert found is not None
    assert told(found) == [
        "namespace shop: annotation config.linkerd.io/await is Linkerd's and read by nobody here; there is config.pillion.dev/await",
        "namespace shop: annotation config.linkerd.io/proxy-uid is Linkerd's and read by nobody here",
        "namespace shop: annotation linkerd.io/inject is Linkerd's and read by nobody here; there is pillion.dev/inject",
    ]


def test_our_annotation_on_a_deployment_instead_of_its_template_is_told() -> None:
    template = {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "x", "command": ["x"]}]}}
    raw = manifest("apps/v1", "Deployment", {"selector": {"matchLabels": {"app": "x"}}, "template": template}).raw
    found = read_manifest({**raw, "metadata": {**raw["metadata"], "annotations": {"pillion.dev/inject": "enabled"}}})
    assert found is not None
    assert told(found) == [
        "deployment shop/x: annotation pillion.dev/inject is read by nobody here; "
        "it belongs on the pod template (spec.template.metadata) or the namespace"
    ]


def workload(**spec: Any) -> Manifest:
    template = {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "x", "command": ["x"]}], **spec}}
    return manifest("apps/v1", "Deployment", {"selector": {"matchLabels": {"app": "x"}}, "template": template})


def test_a_namespace_that_is_nowhere_written_down_is_told_once() -> None:
    found = [
        read_manifest({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}})
        for name, namespace in (("b", "shpo"), ("a", "shpo"), ("a", "default"), ("a", "shop"))
    ]
    assert told(*(one for one in found if one is not None)) == [
        "serviceaccount shpo/a: there is no Namespace shpo; a cluster would refuse it"
    ]


def test_a_service_account_that_a_workload_names_and_that_is_not_there_is_told() -> None:
    account = read_manifest({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web", "namespace": "shop"}})
    assert account is not None
    assert told(workload(serviceAccountName="web")) == [
        "deployment shop/x: there is no ServiceAccount web in namespace shop; a cluster would refuse its pods"
    ]
    assert told(workload(serviceAccountName="web"), account) == told(workload()) == []


def test_a_route_that_names_no_service_and_no_server_is_told() -> None:
    def route(**parent: str) -> Manifest:
        return manifest("gateway.networking.k8s.io/v1", "HTTPRoute", {"parentRefs": [{"name": "x", **parent}], "rules": [{}]})

    assert told(route(), service("http")) == ["httproute shop/x: none of its parents is a Service or a Server, so it does nothing here"]
    assert told(route(kind="Service"), service("http")) == [
        'httproute shop/x: spec.parentRefs[0]: no Service is in the group "gateway.networking.k8s.io", the one when none is given; '
        'write group: ""'
    ]
