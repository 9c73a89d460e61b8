"""`pillion uninstall`: names every object of the installation, for ``kubectl delete -f -``. Deletes nothing itself."""

from __future__ import annotations

from typing import Any

import click

from cli.check.certificates import is_meshed
from cli.installed import ask_cluster, cluster_options, installed
from cli.output import CommandFailed
from cli.render.chart import NAMESPACE, as_yaml
from core.k8s.api import Api, object_path


@click.command()
@click.option("--crds", is_flag=True, help="The kinds too, and with them every Server, AuthorizationPolicy and authentication.")
@click.option("--force", is_flag=True, help="Even while pods have sidecars: they lose their certificates within a day.")
@cluster_options
def uninstall(crds: bool, force: bool, kubeconfig: str, context: str) -> None:
    """Print what to delete: `pillion uninstall | kubectl delete -f -`.

    Policies stay, with the kinds that they are of, unless --crds is given.
    """
    meshed, objects = ask_cluster(lambda api: _state(api, crds=crds), kubeconfig, context)
    if not objects:
        raise CommandFailed("Pillion is not installed on this cluster")
    if meshed and not force:
        shown = ", ".join(meshed[:5]) + (f" and {len(meshed) - 5} more" if len(meshed) > 5 else "")
        raise CommandFailed(
            f"{len(meshed)} pods still have sidecars: {shown}",
            "take them out of the mesh (pillion.dev/inject: disabled, then kubectl rollout restart), or --force",
        )
    click.echo(as_yaml(objects), nl=False)


async def _state(api: Api, *, crds: bool) -> tuple[list[str], list[dict[str, Any]]]:
    pods = (await api.list(object_path("", "v1", "pods"))).items
    meshed = [
        f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        for pod in pods
        if is_meshed(pod) and (pod.get("status") or {}).get("phase") in ("Pending", "Running")
    ]
    return meshed, [item for item in await installed(api, crds=crds) if not goes_with_namespace(item)]


def goes_with_namespace(item: dict[str, Any]) -> bool:
    """What lies in our namespace; but programs are ended first, or they would make again what is deleted elsewhere."""
    return item["metadata"].get("namespace") == NAMESPACE and item["kind"] not in ("Deployment", "DaemonSet")
