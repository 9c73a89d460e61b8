"""Checks of what is installed: kinds and settings; and what other checks ask about the installation."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from cli.check.cluster import NAMESPACE, Cluster, Object, condition
from cli.check.model import Category, Check, Failed
from cli.render.chart import load_chart, render
from cli.render.values import checked, retained
from core.k8s.access import Component
from injector.mesh import InvalidMesh, Mesh, read_mesh

COMPONENTS: tuple[Component, ...] = ("identity", "policy", "injector")
INSTALL = "pillion install | kubectl apply -f -"
UPGRADE = "pillion upgrade | kubectl apply -f -"


@cache
def own_kinds() -> tuple[Object, ...]:
    """Our CustomResourceDefinitions, as this version has them."""
    return tuple(item for item in render(load_chart(), {}) if item["kind"] == "CustomResourceDefinition")


async def kinds_established(cluster: Cluster) -> str:
    """Our four."""
    missing = []
    for item in own_kinds():
        found = await cluster.find("apiextensions.k8s.io", "v1", "customresourcedefinitions", item["metadata"]["name"])
        if not condition(found or {}, "Established"):
            missing.append(item["metadata"]["name"])
    if missing and await cluster.find("", "v1", "namespaces", NAMESPACE) is None:
        raise Failed(f"Pillion is not installed on this cluster: it has no namespace {NAMESPACE}", final=True)
    if missing:
        settings_there = await cluster.find("", "v1", "configmaps", "pillion-config", NAMESPACE) is not None
        raise Failed(f"not there, or not served: {', '.join(missing)}", UPGRADE if settings_there else INSTALL)
    return f"{len(own_kinds())} kinds"


async def kinds_current(cluster: Cluster) -> None:
    """Their schemas are this version's."""
    other = []
    for item in own_kinds():
        found = await cluster.find("apiextensions.k8s.io", "v1", "customresourcedefinitions", item["metadata"]["name"])
        if found and _schemas(found) != _schemas(item):
            other.append(item["metadata"]["name"])
    if other:
        raise Failed(f"of another version than this command: {', '.join(other)}")


def _schemas(crd: Object) -> list[Any]:
    return [version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"]]


async def mesh_settings(cluster: Cluster) -> Mesh:
    """The installation's mesh.yaml; raises Failed."""
    config = await cluster.find("", "v1", "configmaps", "pillion-config", NAMESPACE)
    if config is None:
        raise Failed(f"ConfigMap {NAMESPACE}/pillion-config is not there")
    try:
        return read_mesh(str((config.get("data") or {}).get("mesh.yaml", "")).encode())
    except InvalidMesh as error:
        raise Failed(f"ConfigMap {NAMESPACE}/pillion-config, mesh.yaml: {error}") from None


async def settings_readable(cluster: Cluster) -> str:
    """What the injector reads."""
    mesh = await mesh_settings(cluster)
    return f"trust domain {mesh.trust_domain}, capture by {mesh.capture}"


async def settings_known(cluster: Cluster) -> None:
    """What `pillion upgrade` would render with."""
    await stored_values(cluster)


async def stored_values(cluster: Cluster) -> dict[str, Any]:
    """The settings of the installation, whole; raises Failed."""
    await mesh_settings(cluster)
    config = await cluster.find("", "v1", "configmaps", "pillion-config", NAMESPACE)
    try:
        return checked(retained(yaml.safe_load((config or {})["data"]["values.yaml"]))[0])
    except (AttributeError, KeyError, ValueError, TypeError, yaml.YAMLError) as error:
        raise Failed(f"ConfigMap {NAMESPACE}/pillion-config, values.yaml: {error}") from None


async def agent_installed(cluster: Cluster) -> bool:
    """Whether the installation has agents."""
    return "pillion-agent" in await cluster.ours("daemonsets")


KINDS = Category(
    "kinds",
    "Kinds of Pillion",
    (
        Check("crds", "Server, AuthorizationPolicy and authentications are served", "fatal", kinds_established, INSTALL, settles=True),
        Check("crds-version", "their schemas are this version's", "warning", kinds_current, UPGRADE),
    ),
)
SETTINGS = Category(
    "settings",
    "Settings",
    (
        Check("config", "the injector's settings can be read", "fatal", settings_readable, INSTALL),
        Check("config-values", "the settings of the installation can be rendered again", "warning", settings_known, INSTALL),
    ),
)
