"""Checks of rights: each component may do what the table in core.k8s.access has, and nothing that would make it worth attacking."""

from __future__ import annotations

from typing import Any

import trio

from cli.check.cluster import NAMESPACE, Cluster
from cli.check.installation import COMPONENTS, INSTALL, UPGRADE, agent_installed, stored_values
from cli.check.model import Category, Check, Failed
from core.k8s.access import GRANTS, Grant, Question, questions, variants
from core.k8s.errors import ApiError

_AT_ONCE = 8  # reviews asked at the same time


async def accounts_exist(cluster: Cluster) -> None:
    """A service account for each component."""
    found = await cluster.ours("serviceaccounts", "")
    wanted = [*COMPONENTS, *(("agent",) if await agent_installed(cluster) else ())]
    missing = [f"pillion-{name}" for name in wanted if f"pillion-{name}" not in found]
    if missing:
        raise Failed(f"missing in namespace {NAMESPACE}: {', '.join(missing)}")


async def grants_hold(cluster: Cluster) -> str:
    """Everything in the table, asked one by one."""
    agent, kinds = await agent_installed(cluster), variants(await stored_values(cluster))
    grants = [grant for grant in GRANTS if grant.when in kinds and (agent or grant.component != "agent")]
    asked = [question for grant in grants for question in questions(grant)]
    refused = await _refused(cluster, asked)
    if refused:
        raise Failed("\n".join(_told(question) for question in refused))
    return f"{len(asked)} verbs"


async def nothing_more_granted(cluster: Cluster) -> None:
    """Rights that would make a component worth attacking."""
    dangerous = [
        Grant(component, group, (resource,), (verb,), "")
        for component in COMPONENTS
        for group, resource, verb in (
            ("", "secrets", "list"),
            ("", "secrets", "create"),
            ("", "pods", "create"),
            ("", "pods/exec", "create"),
            ("", "serviceaccounts/token", "create"),
            ("rbac.authorization.k8s.io", "clusterrolebindings", "create"),
        )
    ]
    asked = [question for grant in dangerous for question in questions(grant)]
    refused = await _refused(cluster, asked)
    surplus = [question for question in asked if question not in refused]
    if surplus:
        raise Failed(
            "\n".join(f"{_account(q)} may {_what(q)}, which it never does" for q in surplus), "kubectl get clusterrolebindings -o wide"
        )


async def _refused(cluster: Cluster, asked: list[Question]) -> list[Question]:
    """Those to which the API server says no, in order; raises ApiError."""
    answers: dict[Question, bool | ApiError] = {}
    limiter = trio.CapacityLimiter(_AT_ONCE)

    async def ask(question: Question) -> None:
        async with limiter:
            try:
                answer = await cluster.api.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", review_of(question))
                answers[question] = bool((answer.get("status") or {}).get("allowed"))
            except ApiError as error:
                answers[question] = error

    async with trio.open_nursery() as nursery:
        for question in asked:
            nursery.start_soon(ask, question)
    for answer in answers.values():
        if isinstance(answer, ApiError):
            raise answer
    return [question for question in asked if not answers[question]]


def review_of(question: Question) -> dict[str, Any]:
    """A SubjectAccessReview."""
    attributes = {
        "verb": question.verb,
        "group": question.group,
        "resource": question.resource,
        "subresource": question.subresource,
        "namespace": question.namespace,
        "name": question.name,
    }
    user = f"system:serviceaccount:{NAMESPACE}:pillion-{question.component}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated"]
    spec = {"user": user, "groups": groups, "resourceAttributes": {key: value for key, value in attributes.items() if value}}
    return {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}


def _told(question: Question) -> str:
    return f"{_account(question)} may not {_what(question)}"


def _account(question: Question) -> str:
    return f"service account {NAMESPACE}/pillion-{question.component}"


def _what(question: Question) -> str:
    resource = f"{question.resource}/{question.subresource}" if question.subresource else question.resource
    kind = f"{resource}.{question.group}" if question.group else resource
    return (
        f"{question.verb} {kind}"
        + (f" {question.name}" if question.name else "")
        + (f" in {question.namespace}" if question.namespace else "")
    )


ROLES = Category(
    "rbac",
    "Roles",
    (
        Check("rbac-accounts", "every component has its service account", "fatal", accounts_exist, INSTALL),
        Check("rbac-grants", "each may do what it has to", "error", grants_hold, UPGRADE),
        Check("rbac-surplus", "none may do what it never does", "warning", nothing_more_granted),
    ),
)
