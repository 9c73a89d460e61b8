"""`pillion upgrade`: the manifests of this version with the settings of the installation. Changes nothing itself, makes no key.

The certificate authority stays, because it is data of a Secret that no manifest names.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import click

from cli.install import read_settings, settings_options
from cli.installed import ask_cluster, cluster_options, identity_of, installed, stored
from cli.output import CommandFailed
from cli.render.chart import as_yaml, load_chart, render
from cli.render.values import InvalidValues, merged, retained
from core.k8s.api import Api

_KEPT_KINDS = ("Secret", "ConfigMap", "Lease", "Namespace", "CustomResourceDefinition")
"""Of these the components make some themselves, so one that is in no manifest is not a leftover."""


@click.command()
@settings_options
@click.option("--reset-settings", is_flag=True, help="Begin with the defaults instead of the installation's settings.")
@cluster_options
def upgrade(
    ha: bool,
    assignments: tuple[str, ...],
    files: tuple[str, ...],
    image: str,
    agent_image: str,
    reset_settings: bool,
    kubeconfig: str,
    context: str,
) -> None:
    """Print the manifests of this version for an installation that is there: `pillion upgrade | kubectl apply -f -`.

    Keeps the certificate authority and all settings; options change them. Sidecars stay as they are until their pods are restarted.
    """
    given = read_settings(assignments, files, image, agent_image)
    (found, version), there = ask_cluster(_state, kubeconfig, context)
    kept, gone = retained(found)
    for name in gone:
        click.echo(f"setting {name} does not exist any more and is left out", err=True)
    chart = load_chart()
    base = (
        {"trustDomain": kept["trustDomain"]}
        if reset_settings and "trustDomain" in kept
        else {}
        if reset_settings
        else following(kept, version)
    )
    settings = merged(merged(base, chart.high_availability if ha else {}), given)
    if settings.get("trustDomain", kept.get("trustDomain")) != kept.get("trustDomain"):
        raise CommandFailed(
            f"the trust domain is {kept.get('trustDomain')} and cannot change: every identity and policy has it in its name",
            "pillion uninstall, then install anew",
        )
    try:
        objects = render(chart, {**settings, "createNamespace": True})
    except InvalidValues as error:
        raise CommandFailed(str(error), "settings and their meaning: manifests/helm/values.yaml") from None
    _tell_leftovers(there, objects)
    click.echo(as_yaml(objects), nl=False)


async def _state(api: Api) -> tuple[tuple[dict[str, Any], str], list[dict[str, Any]]]:
    return await stored(api), await installed(api, crds=False)


def following(settings: dict[str, Any], version: str) -> dict[str, Any]:
    """Images that had the installation's version get this one's; those of a version of their own stay."""
    now = metadata.version("pillion")
    images = {
        name: text.removesuffix(f":{version}") + f":{now}"
        for name in ("image", "agentImage")
        if version and (text := str(settings.get(name, ""))).endswith(f":{version}")
    }
    return {**settings, **images}


def leftovers(there: list[dict[str, Any]], objects: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What is installed and no manifest of this version has: (kind, namespace, name)."""
    wanted = {identity_of(item) for item in objects}
    return [found for item in there if item["kind"] not in _KEPT_KINDS and (found := identity_of(item)) not in wanted]


def _tell_leftovers(there: list[dict[str, Any]], objects: list[dict[str, Any]]) -> None:
    for kind, namespace, name in leftovers(there, objects):
        where = f" -n {namespace}" if namespace else ""
        click.echo(f"not part of the installation any more: kubectl delete {kind.lower()} {name}{where}", err=True)
