"""What is installed on a cluster: its settings, and every object that says that it is ours. Reads; called by upgrade and uninstall."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import click
import trio
import yaml

from cli.output import WHICH_CLUSTER, CommandFailed
from cli.render.chart import NAMESPACE
from core.k8s.api import Api, object_path
from core.k8s.cluster import NoCluster, connect
from core.k8s.errors import ApiError, NotFound

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

OURS = "app.kubernetes.io/part-of=pillion"
_HELM = "meta.helm.sh/release-name"

# What an installation of any version may consist of, in the order in which it is taken away: webhooks first, so that nothing is asked of
# a control plane that is gone; then rights, so that programs which take a while to end make nothing again that is deleted elsewhere; the
# namespace last.
KINDS: tuple[tuple[str, str, str], ...] = (
    ("admissionregistration.k8s.io", "v1", "mutatingwebhookconfigurations"),
    ("admissionregistration.k8s.io", "v1", "validatingwebhookconfigurations"),
    ("rbac.authorization.k8s.io", "v1", "clusterrolebindings"),
    ("apps", "v1", "daemonsets"),
    ("apps", "v1", "deployments"),
    ("policy", "v1", "poddisruptionbudgets"),
    ("networking.k8s.io", "v1", "networkpolicies"),
    ("", "v1", "services"),
    ("rbac.authorization.k8s.io", "v1", "clusterroles"),
    ("rbac.authorization.k8s.io", "v1", "rolebindings"),
    ("rbac.authorization.k8s.io", "v1", "roles"),
    ("cert-manager.io", "v1", "certificates"),
    ("", "v1", "configmaps"),
    ("", "v1", "secrets"),
    ("", "v1", "serviceaccounts"),
    ("coordination.k8s.io", "v1", "leases"),
    ("", "v1", "namespaces"),
)
CRDS = ("apiextensions.k8s.io", "v1", "customresourcedefinitions")


def cluster_options(command: F) -> F:
    """``--kubeconfig`` and ``--context``."""
    command = click.option("--context", default="", help="Of the kubeconfig.")(command)
    return click.option("--kubeconfig", default="", help="Default: KUBECONFIG, else ~/.kube/config.")(command)


def ask_cluster(question: Callable[[Api], Awaitable[T]], kubeconfig: str, context: str) -> T:
    """Run one question against the cluster; raises CommandFailed for everything that keeps it from being answered."""

    async def ask() -> T:
        async with connect(kubeconfig, context, user_agent="pillion-cli") as api:
            return await question(api)

    try:
        return trio.run(ask)
    except NoCluster as error:
        raise CommandFailed(str(error), WHICH_CLUSTER) from None
    except ApiError as error:
        raise CommandFailed(error.message, "pillion check") from None


async def stored(api: Api) -> tuple[dict[str, Any], str]:
    """Settings and version of the installation; raises CommandFailed when there is none, or when Helm keeps it."""
    try:
        config = await api.get(object_path("", "v1", "configmaps", NAMESPACE, "pillion-config"))
    except NotFound:
        raise CommandFailed("Pillion is not installed on this cluster", "pillion install | kubectl apply -f -") from None
    release = (config["metadata"].get("annotations") or {}).get(_HELM)
    if release:
        raise CommandFailed(
            f"this installation is kept by Helm (release {release})", f"helm upgrade {release} manifests/helm -n {NAMESPACE}"
        )
    data = config.get("data") or {}
    try:
        settings = yaml.safe_load(data["values.yaml"])
        if not isinstance(settings, dict):
            raise ValueError("not an object")
    except (KeyError, ValueError, yaml.YAMLError) as error:
        raise CommandFailed(f"ConfigMap {NAMESPACE}/pillion-config, values.yaml: {error}", "pillion install with your settings") from None
    return settings, str(data.get("version", ""))


async def installed(api: Api, *, crds: bool) -> list[dict[str, Any]]:
    """Every object with our label, as little of it as names it, in the order in which it can be deleted."""
    found = []
    for kind in (*((CRDS,) if crds else ()), *KINDS):
        try:
            listing = await api.list(object_path(*kind), label_selector=OURS)
        except NotFound:
            continue  # such as cert-manager's kinds where there is no cert-manager
        found += [named(item) for item in listing.items]
    return found


def named(item: Mapping[str, Any]) -> dict[str, Any]:
    """apiVersion, kind, name and namespace."""
    meta = item["metadata"]
    where = {"namespace": meta["namespace"]} if meta.get("namespace") else {}
    return {"apiVersion": item["apiVersion"], "kind": item["kind"], "metadata": {"name": meta["name"], **where}}


def identity_of(item: Mapping[str, Any]) -> tuple[str, str, str]:
    """(kind, namespace, name)."""
    return str(item["kind"]), str(item["metadata"].get("namespace", "")), str(item["metadata"]["name"])
