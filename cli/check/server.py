"""Checks of the API server, of the Gateway API's kinds, and of what an installation needs before it is there."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from cli.check.cluster import NAMESPACE, Cluster, name_of, some
from cli.check.model import Category, Check, Failed, Skipped
from cli.render.chart import load_chart, render
from core.k8s.errors import ApiError, Forbidden

GATEWAY_API = "v1.6.3"
GATEWAY_COMMAND = (
    f"kubectl apply --server-side -f https://github.com/kubernetes-sigs/gateway-api/releases/download/{GATEWAY_API}/standard-install.yaml"
)
_MINOR_MIN = 29  # native sidecars are on by default (KEP-753)
_MINOR_CLASSIC = 26
_SKEW_S = 60.0  # our certificates count from a minute in the past
_GATEWAY_GROUP = "gateway.networking.k8s.io"


async def api_answers(cluster: Cluster) -> str:
    """GET /version."""
    found = await cluster.raw("/version")
    return str(found.get("gitVersion", "of an unknown version"))


async def version_suffices(cluster: Cluster) -> str:
    """Native sidecars, unless the installation does without them."""
    found = await cluster.raw("/version")
    minor = "".join(filter(str.isdigit, str(found.get("minor", ""))))
    config = await cluster.find("", "v1", "configmaps", "pillion-config", NAMESPACE)
    classic = "nativeSidecar: false" in ((config or {}).get("data") or {}).get("mesh.yaml", "")
    least = _MINOR_CLASSIC if classic else _MINOR_MIN
    if str(found.get("major")) != "1" or not minor or int(minor) < least:
        raise Failed(f"the API server is {found.get('gitVersion')}; expected at least 1.{least}")
    return f"1.{minor}"


async def clocks_agree(cluster: Cluster) -> str:
    """A dry run is answered with the API server's time."""
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "pillion-check-", "namespace": "default"}}
    try:
        made = await cluster.api.post("/api/v1/namespaces/default/configmaps", body, dryRun="All")
    except Forbidden as error:
        raise Skipped("you may not create a ConfigMap in namespace default, not even as a dry run") from error
    theirs = datetime.fromisoformat(str(made["metadata"]["creationTimestamp"])).timestamp()
    skew = cluster.clock() - theirs
    if abs(skew) > _SKEW_S:
        raise Failed(f"this machine's clock is {skew:+.0f} s away from the API server's")
    return f"{abs(skew):.0f} s apart"


async def gateway_kinds_served(cluster: Cluster) -> str:
    """HTTPRoute and GRPCRoute, v1."""
    missing = []
    channel = bundle = ""
    for plural in ("httproutes", "grpcroutes"):
        found = await cluster.find("apiextensions.k8s.io", "v1", "customresourcedefinitions", f"{plural}.{_GATEWAY_GROUP}")
        versions = [version["name"] for version in ((found or {}).get("spec") or {}).get("versions") or [] if version.get("served")]
        if "v1" not in versions:
            missing.append(f"{plural}.{_GATEWAY_GROUP}/v1" + (f" (served: {', '.join(versions)})" if versions else ""))
        annotations = ((found or {}).get("metadata") or {}).get("annotations") or {}
        bundle = annotations.get(f"{_GATEWAY_GROUP}/bundle-version", bundle)
        channel = annotations.get(f"{_GATEWAY_GROUP}/channel", channel)
    if missing:
        raise Failed(f"not served: {', '.join(missing)}")
    return f"{bundle} {channel}".strip()


# --- before installing ---------------------------------------------------------------------------------------------------------------


async def namespace_free(cluster: Cluster) -> str:
    """Absent, or one that was made for us."""
    found = await cluster.find("", "v1", "namespaces", NAMESPACE)
    if found is None:
        return "it will be made"
    labels = found["metadata"].get("labels") or {}
    if labels.get("app.kubernetes.io/part-of") == "pillion":
        raise Skipped("Pillion is installed already; `pillion upgrade` brings it up to date")
    pods = await cluster.objects("", "v1", "pods", NAMESPACE)
    if pods:
        raise Failed(f"namespace {NAMESPACE} exists and has pods of somebody else: {some([name_of(pod) for pod in pods])}")
    return "it exists and is empty"


def needed_kinds(objects: list[dict[str, Any]]) -> set[tuple[str, str, bool]]:
    """(group, plural, namespaced) of everything that an installation creates."""
    found = set()
    for item in objects:
        group = item["apiVersion"].rpartition("/")[0]
        found.add((group, _plural(item["kind"]), "namespace" in item["metadata"]))
    return found


def _plural(kind: str) -> str:
    return kind.lower().removesuffix("y") + ("ies" if kind.endswith("y") else "s")


async def may_install(cluster: Cluster) -> str:
    """Create everything that would be installed."""
    kinds = sorted(needed_kinds(render(load_chart(), {"createNamespace": True}, ha=True)))
    missing = []
    for group, plural, namespaced in kinds:
        attributes = {"verb": "create", "group": group, "resource": plural, "namespace": NAMESPACE if namespaced else ""}
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}}
        answer = await cluster.api.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
        if not (answer.get("status") or {}).get("allowed"):
            missing.append(f"{plural}.{group}" if group else plural)
    if missing:
        raise Failed(f"you may not create {', '.join(missing)}")
    return f"{len(kinds)} kinds"


async def privileged_allowed(cluster: Cluster) -> str:
    """A dry run of the namespace with the label that the agent needs."""
    if await cluster.find("", "v1", "namespaces", NAMESPACE) is not None:
        raise Skipped("the namespace is there")
    labels = {"pod-security.kubernetes.io/enforce": "privileged", "app.kubernetes.io/part-of": "pillion"}
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}
    try:
        await cluster.api.post("/api/v1/namespaces", body, dryRun="All")
    except ApiError as error:
        raise Failed(f"a namespace that may run the agent is refused: {error.message}") from error
    return ""


API = Category(
    "kubernetes-api",
    "Kubernetes API",
    (
        Check("k8s-api", "the API server answers", "fatal", api_answers, "kubectl cluster-info"),
        Check("k8s-version", "its version has what sidecars need", "error", version_suffices),
        Check("k8s-clock", "its clock and this machine's agree", "warning", clocks_agree),
    ),
)
GATEWAY = Category(
    "gateway-api",
    "Gateway API",
    (Check("gateway-api-crds", "HTTPRoute and GRPCRoute are served", "fatal", gateway_kinds_served, GATEWAY_COMMAND),),
)
BEFORE = Category(
    "pre-installation",
    "Before the installation",
    (
        Check("pre-namespace", f"namespace {NAMESPACE} is free", "error", namespace_free),
        Check("pre-permissions", "you may create everything that is installed", "error", may_install),
        Check(
            "pre-privileged",
            "the agent may run",
            "warning",
            privileged_allowed,
            "pillion install --set agent.enabled=false captures without it",
        ),
    ),
)
