"""`pillion install`: prints what a cluster needs, for ``kubectl apply -f -``. Talks to no cluster, makes no key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.output import CommandFailed
from cli.render.chart import as_yaml, load_chart, render
from cli.render.values import InvalidValues, assigned, merged
from core.k8s.manifests import InvalidManifest, read_manifests

F = TypeVar("F", bound=Callable[..., Any])
_SETTINGS = "settings and their meaning: manifests/helm/values.yaml"


def settings_options(command: F) -> F:
    """The options of `install` and `upgrade` that choose settings; see `read_settings`."""
    options = (
        click.option("--ha", is_flag=True, help="Three replicas of everything, and no pod without its sidecar."),
        click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A setting, as Helm reads it; may be repeated."),
        click.option(
            "-f",
            "--values",
            "files",
            multiple=True,
            type=click.Path(exists=True, dir_okay=False),
            help="Settings as YAML; may be repeated.",
        ),
        click.option("--image", default="", help="Image of sidecar and control plane."),
        click.option("--agent-image", default="", help="Image of the eBPF agent."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def read_settings(assignments: tuple[str, ...], files: tuple[str, ...], image: str, agent_image: str) -> dict[str, Any]:
    """One mapping from all the options, later ones over earlier ones; raises CommandFailed."""
    settings: dict[str, Any] = {}
    for file in files:
        settings = merged(settings, _read_values(file))
    try:
        settings = merged(settings, assigned(assignments))
    except InvalidValues as error:
        raise CommandFailed(str(error), "--set name=value, as in manifests/helm/values.yaml") from None
    images = {"image": image, "agentImage": agent_image}
    return {**settings, **{name: value for name, value in images.items() if value}}


def _read_values(file: str) -> dict[str, Any]:
    """The settings of one file, none of an empty one; raises CommandFailed."""
    try:
        documents = read_manifests(Path(file).read_bytes(), is_json=file.endswith(".json"))
    except (OSError, InvalidManifest) as error:
        raise CommandFailed(f"{file}: {error}", _SETTINGS) from None
    if len(documents) > 1:
        raise CommandFailed(f"{file}: expected one document, found {len(documents)}", _SETTINGS)
    return documents[0] if documents else {}


def rendered(settings: dict[str, Any], *, ha: bool) -> list[dict[str, Any]]:
    """The objects of an installation; raises CommandFailed for a setting that means nothing."""
    try:
        return render(load_chart(), {"createNamespace": True, **settings}, ha=ha)
    except InvalidValues as error:
        raise CommandFailed(str(error), _SETTINGS) from None


@click.command()
@settings_options
@click.option("--crds", is_flag=True, help="Only the CustomResourceDefinitions.")
def install(ha: bool, assignments: tuple[str, ...], files: tuple[str, ...], image: str, agent_image: str, crds: bool) -> None:
    """Print the manifests of an installation: `pillion install | kubectl apply -f -`.

    Applying them again changes nothing that the mesh has made itself: its certificate authority stays. The CustomResourceDefinitions of
    the Gateway API must be there before; `pillion check --pre` says how to install them.
    """
    objects = rendered(read_settings(assignments, files, image, agent_image), ha=ha)
    kept = [found for found in objects if found["kind"] == "CustomResourceDefinition" or not crds]
    click.echo(as_yaml(kept), nl=False)
