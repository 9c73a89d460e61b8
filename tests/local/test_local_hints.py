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
    Ref("", "Pod", "shop", "web-1"), {"app": "web"}, Addresses("10.142.0.10", ""), False, {"http": 8080, "admin": 9000}, meshed=True
)
POLICY = "policy.pillion.dev/v1alpha1"


def manifest(version: str, kind: str, spec: dict[str, Any]) -> Manifest:
    found = read_manifest({"apiVersion": version, "kind": kind, "metadata": {"name": "x", "namespace": "shop"}, "spec": spec})
    assert found is not None
    return found


def told(*manifests: Manifest, pods: tuple[PodFacts, ...] = (POD,)) -> list[str]:
    known = {one.ref: one for one in manifests}
    services = [typed for one in manifests if isinstance(typed := read_core_object(one.raw), Service)]
    return hints(known, services, pods)


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
        "authorizationpolicy shop/x: server shop/wbe does not exist, so it lets nobody in",
        "authorizationpolicy shop/x: meshtlsauthentication shop/clients does not exist, so it lets nobody in",
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
