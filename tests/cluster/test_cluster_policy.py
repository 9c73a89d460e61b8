"""Every kind of policy from `kubectl apply` to the answer a caller gets, what the objects' statuses say, and what is refused at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.kube import OUTSIDE, Object, Refused, Space, client, container, pod, pod_spec, service, until, workload

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

OURS, GATEWAY = "policy.pillion.dev", "gateway.networking.k8s.io"


def ours(kind: str, name: str, **spec: Any) -> Object:
    return {"apiVersion": f"{OURS}/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def server(name: str = "web-http", port: int | str = "http", **spec: Any) -> Object:
    return ours("Server", name, podSelector={"matchLabels": {"app": "web"}}, port=port, **spec)


def allow(name: str, target: str, *refs: Object, kind: str = "Server") -> Object:
    group = OURS if kind == "Server" else GATEWAY
    return ours(
        "AuthorizationPolicy", name, targetRef={"group": group, "kind": kind, "name": target}, requiredAuthenticationRefs=list(refs)
    )


def account(name: str) -> Object:
    return {"kind": "ServiceAccount", "name": name}


def route(kind: str, name: str, *matches: Object, parent: str = "web-http") -> Object:
    parents = [{"group": OURS, "kind": "Server", "name": parent}]
    return {
        "apiVersion": f"{GATEWAY}/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {"parentRefs": parents, "rules": [{"matches": list(matches)}]},
    }


@pytest.fixture(scope="module")
def bank(make_space: Callable[..., Space]) -> Space:
    """``web`` with HTTP, gRPC and a console, called by ``alice`` and ``bob`` (meshed, own service accounts) and by ``stranger``."""
    made = make_space("bank")
    for name in ("alice", "bob"):
        made.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
        made.apply(pod(name, pod_spec(container("app", "serve", "--http", "8080"), serviceAccountName=name)))
    ports = [{"name": name, "containerPort": port} for name, port in (("http", 8080), ("grpc", 9090), ("console", 2525))]
    serving = container("app", "serve", "--http", "8080", "--grpc", "9090", "--tcp", "2525", ports=ports)
    ready = {"readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 1}}
    named = [{"name": name, "port": port, "targetPort": name} for name, port in (("http", 80), ("grpc", 9090), ("console", 2525))]
    made.apply(workload("Deployment", "web", pod_spec({**serving, **ready})), service("web", ports=named))
    made.apply(client("stranger", annotations=OUTSIDE))
    made.rolled_out("deployment/web")
    made.ready("alice", "bob", "stranger")
    return made


@pytest.fixture
def clean(bank: Space) -> Iterator[Space]:
    """The bank without policies before and after."""
    yield bank
    bank.run("delete", "servers,authorizationpolicies,meshtlsauthentications,networkauthentications,httproutes,grpcroutes", "--all")
    bank.run("annotate", "namespace", bank.name, "config.pillion.dev/default-inbound-policy-")
    answers(bank, "/", alice=200, bob=200, stranger=200)


def answers(space: Space, path: str, *, method: str = "GET", **expected: int) -> None:
    """Within seconds every caller gets its status."""

    def asked() -> bool:
        seen.update({who: space.call(who, f"http://web{path}", "--method", method).get("status", 0) for who in expected})
        return seen == expected

    seen: dict[str, int] = {}
    try:
        until(f"{path} answers {expected}", asked)
    except AssertionError as error:
        raise AssertionError(f"{error}; seen: {seen}") from None


def test_a_server_lets_in_whom_a_policy_names(clean: Space) -> None:
    clean.apply(server())
    answers(clean, "/", alice=403, bob=403, stranger=403)
    clean.apply(allow("alice-only", "web-http", account("alice")))
    answers(clean, "/", alice=200, bob=403, stranger=403)
    clean.run("delete", "authorizationpolicy", "alice-only")
    answers(clean, "/", alice=403, bob=403, stranger=403)


@pytest.mark.parametrize(
    ("policy", "alice", "stranger"),
    [("deny", 403, 403), ("all-authenticated", 200, 403), ("all-unauthenticated", 200, 200), ("audit", 200, 200)],
)
def test_an_access_policy_of_a_server(clean: Space, policy: str, alice: int, stranger: int) -> None:
    clean.apply(server(accessPolicy=policy))
    answers(clean, "/", alice=alice, stranger=stranger)


def test_routes_split_a_port_by_requests(clean: Space) -> None:
    clean.apply(
        server(proxyProtocol="HTTP/1"),
        route("HTTPRoute", "reads", {"method": "GET", "path": {"type": "PathPrefix", "value": "/accounts"}}),
        route("HTTPRoute", "writes", {"method": "POST", "path": {"type": "PathPrefix", "value": "/accounts"}}),
        allow("both-read", "reads", kind="HTTPRoute"),
        allow("alice-writes", "writes", account("alice"), kind="HTTPRoute"),
    )
    answers(clean, "/accounts/1", alice=200, bob=200, stranger=200)
    answers(clean, "/accounts/1", method="POST", alice=200, bob=403, stranger=403)
    answers(clean, "/elsewhere", alice=404, bob=404)


def test_mesh_identities_and_networks_are_authentications(clean: Space) -> None:
    address = clean.json("get", "pod", "stranger")["status"]["podIP"]
    clean.apply(
        server(),
        ours("MeshTLSAuthentication", "staff", identities=[f"spiffe://cluster.local/ns/{clean.name}/sa/bob"]),
        ours("NetworkAuthentication", "one-machine", networks=[{"cidr": f"{address}/32"}]),
        allow("staff", "web-http", {"group": OURS, "kind": "MeshTLSAuthentication", "name": "staff"}),
        allow("machine", "web-http", {"group": OURS, "kind": "NetworkAuthentication", "name": "one-machine"}),
    )
    answers(clean, "/", alice=403, bob=200, stranger=200)


def test_grpc_routes_split_a_port_by_methods(clean: Space) -> None:
    clean.apply(
        server("web-grpc", "grpc", proxyProtocol="gRPC"),
        route("GRPCRoute", "prices", {"method": {"service": "bank.Prices", "method": "Get"}}, parent="web-grpc"),
        allow("alice-asks", "prices", account("alice"), kind="GRPCRoute"),
    )

    def status(who: str, path: str) -> str:
        answered = clean.app(who, "grpc", "web", "9090", path)
        return str(answered.get("grpc-status", answered))

    expected = {("alice", "/bank.Prices/Get"): "0", ("bob", "/bank.Prices/Get"): "7", ("alice", "/bank.Prices/Set"): "12"}
    until("gRPC statuses", lambda: {key: status(*key) for key in expected} == expected)


def test_opaque_connections_are_authorized_as_a_whole(clean: Space) -> None:
    clean.apply(server("web-console", "console", proxyProtocol="opaque"), allow("bob-uses", "web-console", account("bob")))

    def greeted(who: str) -> bool:
        return bool(clean.app(who, "tcp", "web", "2525", "--timeout", "3").get("greeting"))

    until("only bob is greeted", lambda: [greeted(who) for who in ("alice", "bob", "stranger")] == [False, True, False])


def test_the_default_policy_of_a_namespace_changes_live(clean: Space) -> None:
    before = [pod["metadata"]["uid"] for pod in clean.pods("app=web")]
    for policy, alice, stranger in (("all-authenticated", 200, 403), ("deny", 403, 403), ("all-unauthenticated", 200, 200)):
        clean.run("annotate", "--overwrite", "namespace", clean.name, f"config.pillion.dev/default-inbound-policy={policy}")
        answers(clean, "/", alice=alice, stranger=stranger)
    assert [pod["metadata"]["uid"] for pod in clean.pods("app=web")] == before


def conditions(space: Space, kind: str, name: str) -> dict[str, str]:
    """{condition: status} of a route's first parent, or of one of our objects."""
    status = space.json("get", kind, name).get("status", {})
    listed = status.get("conditions") or (status.get("parents") or [{}])[0].get("conditions", [])
    return {each["type"]: f"{each['status']}/{each['reason']}" for each in listed}


def test_routes_and_policies_say_whether_they_are_in_force(clean: Space) -> None:
    path = {"path": {"type": "PathPrefix", "value": "/"}}
    clean.apply(server(proxyProtocol="HTTP/1"), route("HTTPRoute", "good", path), route("HTTPRoute", "lost", path, parent="nowhere"))
    until("the good route is accepted", lambda: conditions(clean, "httproute", "good").get("Accepted") == "True/Accepted")
    until("the lost one is not", lambda: conditions(clean, "httproute", "lost").get("Accepted", "").startswith("False/"))
    parent = clean.json("get", "httproute", "good")["status"]["parents"][0]
    assert parent["parentRef"]["name"] == "web-http"
    assert parent["controllerName"].count("/") >= 1
    assert all(each["observedGeneration"] == 1 for each in parent["conditions"])
    until("the server says so too", lambda: conditions(clean, "server", "web-http").get("Accepted", "").startswith("True/"))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (server(port=70000), "port"),
        (server(accessPolicy="everybody"), "accessPolicy"),
        (server(proxyProtocol="HTTP/3"), "proxyProtocol"),
        (ours("MeshTLSAuthentication", "empty"), "identit"),
        (ours("MeshTLSAuthentication", "bad", identities=["spiffe://Bad Name/x"]), "identit"),
        (ours("NetworkAuthentication", "bad", networks=[{"cidr": "10.0.0.0/33"}]), "cidr"),
        (allow("bad", "web", {"kind": "User", "name": "alice"}), "requiredAuthenticationRefs"),
        (allow("bad", "web", account("alice"), kind="Gateway"), "targetRef"),
        (route("HTTPRoute", "bad", {"path": {"type": "RegularExpression", "value": "("}}), "path"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["kind"],
)
def test_what_is_not_understood_is_refused_at_once(bank: Space, wrong: Object, word: str) -> None:
    with pytest.raises(Refused) as refused:
        bank.apply(wrong)
    assert word in str(refused.value)
