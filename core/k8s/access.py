"""What each component may ask of the API server: one row per grant, with its reason. Pure.

The chart's roles are this table, which a test compares; `pillion check` asks the API server whether they still are; and a cluster test
proves from the audit log that every row is used and that nothing else was asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

CONTROL = "pillion"
"""A Role in our own namespace; a grant with namespace "" is cluster-wide."""

When = Literal["", "given-issuer", "own-serving"]

Component = Literal["identity", "policy", "injector", "agent"]


class Grant(NamedTuple):
    """verbs on resources of one API group. names: only objects of these names (no names: any). namespace: CONTROL, or "" for all.

    when: a variant of the installation without which the component does not ask: "given-issuer" (the authority is somebody else's) or
    "own-serving" (webhooks make their certificates themselves, which else cert-manager does).
    """

    component: Component
    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    reason: str
    namespace: str = ""
    names: tuple[str, ...] = ()
    when: When = ""


class Question(NamedTuple):
    """One thing that a grant allows, as a SubjectAccessReview asks it."""

    component: Component
    verb: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str


_READ = ("list", "watch")
_GATEWAY, _OURS = "gateway.networking.k8s.io", "policy.pillion.dev"
_KINDS = ("servers", "authorizationpolicies", "meshtlsauthentications", "networkauthentications")
_ROUTES = ("httproutes", "grpcroutes")

GRANTS: tuple[Grant, ...] = (
    Grant("identity", "authentication.k8s.io", ("tokenreviews",), ("create",), "asks whose a token is"),
    Grant("identity", "", ("namespaces",), _READ, "knows where the trust bundle belongs"),
    Grant("identity", "", ("pods",), ("list",), "knows which pods still hold certificates"),
    Grant(
        "identity",
        "",
        ("configmaps",),
        ("create", "list", "watch", "patch"),
        "keeps the trust bundle of every namespace current",
        names=("pillion-trust-anchors",),
    ),
    Grant("identity", "", ("secrets",), ("get", "update"), "keeps the authority", CONTROL, ("pillion-issuer",)),
    Grant(
        "identity",
        "",
        ("secrets",),
        ("get", "update"),
        "keeps what belongs to an authority that is not its own",
        CONTROL,
        ("pillion-identity-state",),
        "given-issuer",
    ),
    Grant("identity", "coordination.k8s.io", ("leases",), ("create",), "elects who writes", CONTROL),
    Grant("identity", "coordination.k8s.io", ("leases",), ("get", "update"), "elects who writes", CONTROL, ("pillion-identity",)),
    Grant("identity", "events.k8s.io", ("events",), ("create", "patch"), "says why a certificate was not issued"),
    Grant("policy", "", ("namespaces", "nodes", "pods", "services"), _READ, "knows who is where"),
    Grant("policy", "discovery.k8s.io", ("endpointslices",), _READ, "knows who is ready behind a Service"),
    Grant("policy", _OURS, _KINDS, _READ, "reads policy"),
    Grant("policy", _GATEWAY, _ROUTES, _READ, "reads routes"),
    Grant("policy", _OURS, tuple(f"{kind}/status" for kind in _KINDS), ("patch",), "says what became of a policy"),
    Grant("policy", _GATEWAY, tuple(f"{kind}/status" for kind in _ROUTES), ("patch",), "says what became of a route"),
    Grant("policy", "coordination.k8s.io", ("leases",), ("create",), "elects who writes", CONTROL),
    Grant("policy", "coordination.k8s.io", ("leases",), ("get", "update"), "elects who writes", CONTROL, ("pillion-policy",)),
    Grant("policy", "", ("secrets",), ("get",), "serves the webhook's certificate", CONTROL, ("pillion-policy-tls",)),
    Grant("policy", "", ("secrets",), ("update",), "keeps the webhook's certificate", CONTROL, ("pillion-policy-tls",), "own-serving"),
    Grant(
        "policy",
        "admissionregistration.k8s.io",
        ("validatingwebhookconfigurations",),
        ("get", "patch"),
        "tells the API server what the webhook's certificate is signed by",
        names=("pillion-policy",),
    ),
    Grant("injector", "", ("namespaces",), ("get",), "reads annotations of namespaces"),
    Grant("injector", "events.k8s.io", ("events",), ("create", "patch"), "says why a pod got no sidecar"),
    Grant("injector", "", ("secrets",), ("get",), "serves the webhook's certificate", CONTROL, ("pillion-injector-tls",)),
    Grant("injector", "", ("secrets",), ("update",), "keeps the webhook's certificate", CONTROL, ("pillion-injector-tls",), "own-serving"),
    Grant(
        "injector",
        "admissionregistration.k8s.io",
        ("mutatingwebhookconfigurations",),
        ("get", "patch"),
        "tells the API server what the webhook's certificate is signed by",
        names=("pillion-injector",),
    ),
    Grant("agent", "", ("pods",), _READ, "knows which pods of its node are meshed"),
)


def grants_of(component: Component) -> Iterator[Grant]:
    """The rows of one component."""
    return (grant for grant in GRANTS if grant.component == component)


def variants(values: Mapping[str, Any]) -> frozenset[When]:
    """Which variants an installation with these settings (of the chart) is."""
    found: set[When] = {""}
    if values["identity"]["issuer"]["source"] != "made":
        found.add("given-issuer")
    if not values["certManager"]["enabled"]:
        found.add("own-serving")
    return frozenset(found)


def questions(grant: Grant) -> Iterator[Question]:
    """Everything that a grant allows, one by one."""
    for resource in grant.resources:
        plural, _, subresource = resource.partition("/")
        for verb in grant.verbs:
            for name in grant.names or ("",):
                yield Question(grant.component, verb, grant.group, plural, subresource, grant.namespace, name)
